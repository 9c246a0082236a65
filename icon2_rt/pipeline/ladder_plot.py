"""The picture of a calibration: quality and fluency over the dose, for every band, with what was chosen. Plain SVG, so
that it opens anywhere and can stand inside a page; its colours follow the page's text colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, PANEL, MARGIN, HEAD, GAP = 640, 170, 56, 34, 46
COLOURS = ("#3b82f6", "#d97706", "#0d9488", "#a855f7", "#dc2626")


def ladder_svg(calibration: Mapping[str, Any]) -> str:
    """Two panels over the dose: mean quality with its interval, and log-probability per token, unsteered.

    Filled dots are fluent rungs; rings mark γ⁺ and γ⁻. ``calibration`` is that part of ``strengths.json``.
    """
    bands = calibration["bands"]
    doses = [rung["dose"] for band in bands for rung in band["rungs"]]
    panels = (
        ("mean quality", [b for band in bands for rung in band["rungs"] for b in rung["quality_interval"]]),
        ("log p per token, unsteered model", [rung["logprob"] for band in bands for rung in band["rungs"]]),
    )
    height = HEAD + len(panels) * (PANEL + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" fill="none" '
        f'stroke="currentColor" font-family="system-ui, sans-serif" font-size="12">',
        "<title>Quality and fluency of every dose that was tried</title>",
    ]
    for i, band in enumerate(bands):
        name = f"blocks {band['layers'][0]} to {band['layers'][-1]}"
        mine = " (chosen)" if len(bands) > 1 and band["band"] == calibration["band"] else ""
        x = MARGIN + i * (WIDTH - 2 * MARGIN) / len(bands)
        parts.append(f'<circle cx="{x + 4:.0f}" cy="14" r="4" fill="{_colour(i)}" stroke="none"/>')
        parts.append(_label(x + 14, 18, name + mine, "start"))
    for number, (title, values) in enumerate(panels):
        top = HEAD + number * (PANEL + GAP)
        across, up = _scale(doses, MARGIN, WIDTH - MARGIN), _scale(values, top + PANEL, top)
        parts.append(_label(MARGIN, top - 4, title, "start"))
        parts.append(_axes(sorted(set(doses)), values, across, up, top))
        for i, band in enumerate(bands):
            key = "quality" if number == 0 else "logprob"
            points = [(across(rung["dose"]), up(rung[key]), rung) for rung in band["rungs"]]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
            parts.append(f'<polyline points="{line}" stroke="{_colour(i)}" stroke-width="2"/>')
            for x, y, rung in points:
                if number == 0:
                    low, high = (up(value) for value in rung["quality_interval"])
                    parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{_colour(i)}" opacity=".5"/>')
                fill = _colour(i) if rung["fluent"] else "none"
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="{_colour(i)}" fill="{fill}"/>')
                if rung["dose"] in (band["positive_dose"], band["negative_dose"]):
                    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
                    parts.append(_label(x, y - 12, "γ⁺" if rung["dose"] > 0 else "γ⁻", "middle"))
    bottom = height - GAP + 32
    parts.append(_label(WIDTH / 2, bottom, "dose, ‖γu‖ as a share of ‖h‖; hollow: not fluent", "middle"))
    return "\n".join([*parts, "</svg>\n"])


def _axes(doses: Sequence[float], values: Sequence[float], across: Any, up: Any, top: float) -> str:
    left, right, bottom = MARGIN - 8, WIDTH - MARGIN + 8, top + PANEL + 6
    marks = [f'<path d="M{left} {top}V{bottom}H{right}" opacity=".4"/>']
    for value in (min(values), (min(values) + max(values)) / 2, max(values)):
        marks.append(f'<path d="M{left} {up(value):.1f}H{right}" opacity=".12"/>')
        marks.append(_label(left - 4, up(value) + 4, f"{value:.2f}", "end"))
    last = float("-inf")
    for dose in doses:
        if across(dose) - last >= 36:  # or the labels would run into each other
            last = across(dose)
            marks.append(_label(last, bottom + 14, f"{dose:+.0%}" if dose else "0", "middle"))
    return "\n".join(marks)


def _scale(values: Sequence[float], start: float, end: float) -> Any:
    """The linear map of the values' range to [start, end]; one value lies in the middle."""
    low, high = min(values), max(values)
    return lambda v: start + (end - start) * ((v - low) / (high - low) if high > low else 0.5)


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor" stroke="none">{escape(text)}</text>'
    )


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
