"""The pictures of a calibration: quality and likelihood over the dose, for every band of blocks that was tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icon2_rt.pipeline.charts import Axis, Series, lines, picture, style


def ladder_charts(calibration: Mapping[str, Any]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The two charts, each with its title, and the style of every band: mean quality with its interval, and the
    log-probability per token under the unsteered model. Hollow dots are doses that are not fluent, rings γ⁺ and γ⁻.

    Args:
        calibration: that part of ``strengths.json``.
    """
    bands = calibration["bands"]
    styles = {_name(band, calibration): style(i) for i, band in enumerate(bands)}

    def ladder(key: str, label: str) -> str:
        series = [
            Series(
                name,
                [(rung["dose"], rung[key]) for rung in band["rungs"]],
                css,
                [rung["quality_interval"] for rung in band["rungs"]] if key == "quality" else (),
                {band["positive_dose"]: "γ⁺", band["negative_dose"]: "γ⁻"},
                {rung["dose"] for rung in band["rungs"] if not rung["fluent"]},
            )
            for (name, css), band in zip(styles.items(), bands, strict=True)
        ]
        return lines(series, Axis("dose ‖γu‖/‖h‖", percent=True), Axis(label))

    charts = [
        (f"Quality: {calibration['quality']}", ladder("quality", "mean quality")),
        ("Likelihood per token under the unsteered model", ladder("logprob", "log p per token")),
    ]
    return charts, styles


def ladder_svg(calibration: Mapping[str, Any]) -> str:
    """Both charts as an SVG file of its own."""
    charts, styles = ladder_charts(calibration)
    return picture(charts, styles)


def _name(band: Mapping[str, Any], calibration: Mapping[str, Any]) -> str:
    layers = band["layers"]
    blocks = f"blocks {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"block {layers[0]}"
    return f"{blocks} (chosen)" if len(calibration["bands"]) > 1 and band["band"] == calibration["band"] else blocks
