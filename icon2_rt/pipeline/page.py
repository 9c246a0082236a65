"""``report.html``: everything that ``report.json`` says, as one page for a person.

One file without scripts, fonts or pictures of its own: it opens from a disk, on a phone or a wide screen, in a light or
a dark theme. What the model wrote is escaped, and the page's own policy forbids loading anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from icon2_rt.pipeline.acted import how_much
from icon2_rt.pipeline.charts import Axis, Series, colours_and_charts, histogram, lines, style
from icon2_rt.pipeline.checks import ORDER, RULES
from icon2_rt.pipeline.costs import ASIDE, by_step
from icon2_rt.pipeline.folder import RAN
from icon2_rt.pipeline.health import histograms
from icon2_rt.pipeline.ladder_plot import ladder_charts

GLYPHS = {"green": "✓", "yellow": "!", "red": "✕"}
SIDES = ("chosen", "rejected")
STEP_NOTES = {
    "features": "Features, directions and strengths are done once, however many pairs are made.",
    "synthesis": "Synthesis: instructions written.",
    "scoring": "Scoring: how much they agree with the criteria.",
    "pairs": "Pairs: the responses.",
    "refinement": "Refinement: the answers written from drafts.",
    "judging": "Judging: which response is better.",
    "figures": "Figures: the responses read again for the dataset's columns; it belongs to no method.",
    "checks": "Checks: what this page needs; it belongs to no method.",
}
BLOCK = Axis("block", whole=True)


def render(
    report: Mapping[str, Any], manifest: Mapping[str, Any], clock: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """The whole page. Sections that the report has no figures for are left out.

    Args:
        clock: seconds and memory by step, as :func:`icon2_rt.pipeline.costs.clock` reads them.
    """
    model = str(manifest["identity"]["config"]["model"])
    sections = [
        ("checks", "Health checks", _checks(report)),
        ("directions", "Directions", _directions(report)),
        ("instructions", "Instructions", _instructions(report)),
        ("strengths", "Strengths", _strengths(report)),
        ("pairs", "Pairs", _pairs(report)),
        ("effect", "Effect", _effect(report)),
        ("costs", "Costs", _costs(report, clock or {})),
        ("examples", "Examples", _examples(report)),
        ("making", "How it was made", _making(manifest)),
    ]
    there = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in there)
    bodies = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{body}</section>' for key, title, body in there)
    css = colours_and_charts() + (files("icon2_rt.pipeline") / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(model)}: preference pairs</title><style>{css}</style></head>"
        f"<body><main><h1>Preference pairs</h1>{_head(report, model)}<nav>{links}</nav>{bodies}</main></body>"
        "</html>\n"
    )


def _head(report: Mapping[str, Any], model: str) -> str:
    pairs, counts = report["pairs"]["pairs"], report["counts"].get("instructions")
    baseline = report.get("baseline")
    if baseline:
        origin = f", by the baseline {escape(baseline['recipe'])} from {counts['clean']} instructions"
    else:
        came = "given" if "instructions" in report.get("given", {}) else "drawn"
        origin = f", from {counts['kept']} instructions kept of {counts['drawn']} {came}" if counts else ""
    return f'<p>{pairs} pairs by <b>{escape(model)}</b>{origin}. <span class="dim">Made by icon2_rt.</span></p>'


# ---------------------------------------------------------------- sections


def _checks(report: Mapping[str, Any]) -> str:
    found = report["checks"]
    counts = {status: sum(check["status"] == status for check in found) for status in ORDER}
    verdicts = "".join(
        f'<li class="{status}"><b>{GLYPHS[status]} {n}</b> {status}</li>' for status, n in counts.items() if n
    )
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in report["warnings"])
    parts = [
        f'<ul class="verdicts">{verdicts}</ul>',
        f'<ul class="warnings">{warnings}</ul>' if warnings else "",
        '<p class="dim">Open one to read what it means, and what to do when it is not green.</p>',
    ]
    for section in dict.fromkeys(RULES[check["key"]].section for check in found):
        cards = "".join(_card(check) for check in found if RULES[check["key"]].section == section)
        parts.append(f'<h3>{escape(section)}</h3><div class="cards">{cards}</div>')
    return "".join(parts)


def _card(check: Mapping[str, Any]) -> str:
    rule, status = RULES[check["key"]], check["status"]
    value, _, of = check["shown"].partition(" (")
    below = f'<span class="of">{escape(of.removesuffix(")"))}</span>' if of else ""
    notes = "".join(f"<p>{escape(note)}</p>" for note in check["notes"])
    return (
        f'<details class="{status}"><summary><span class="glyph">{GLYPHS[status]}</span><span>{escape(rule.title)}'
        f'</span><span class="value">{escape(value)}</span>{below}</summary>'
        f'<p class="dim">{escape(status)}; {escape(rule.limits)}</p>{notes}'
        f"<p>{escape(rule.means)}</p><p><b>What to do:</b> {escape(check['todo'])}</p></details>"
    )


def _directions(report: Mapping[str, Any]) -> str:
    directions = report.get("directions")
    if not directions:
        return ""
    health, layers = directions["health"], report["strengths"]["layers"]
    band = (min(layers), max(layers))
    charts = [
        ("contrast", "Contrast ‖mean Δ‖/‖h‖", True, (0.0,), "How far the two system prompts move the state."),
        ("cos_mean_difference", "cos(PC1, mean Δ)", False, (1.0,), "Near 1: the pairs differ in one way."),
        ("sign_agreement", "Sign agreement", True, (1.0,), "Pairs whose own difference points along the direction."),
        ("split_half_cosine", "Split-half cosine", False, (1.0,), "Whether the other half gives the same direction."),
    ]
    figures = []
    for key, title, percent, include, caption in charts:
        series = [
            Series(name, list(enumerate(figures_of[key])), style(i))
            for i, (name, figures_of) in enumerate(health.items())
            if key in figures_of
        ]
        if series:
            svg = lines(series, BLOCK, Axis(title, percent=percent), include=include, band=band)
            figures.append(_figure(title, svg, caption, {s.name: s.style for s in series}))
    names = directions["names"]
    table = ""
    if len(names) > 1:
        rows = [
            [name, *(f"{value:.2f}" for value in row)] for name, row in zip(names, directions["cosines"], strict=True)
        ]
        table = "<h3>Cosines between criteria, mean over blocks</h3>" + _table(["", *names], rows)
    shaded = f'<p class="dim">One direction per criterion and block (0-based). Shaded: {_blocks(layers)}.</p>'
    return f'{shaded}<div class="figures">{"".join(figures)}</div>{table}' if figures or table else ""


def _instructions(report: Mapping[str, Any]) -> str:
    counts, consistency = report["counts"].get("instructions"), report.get("consistency")
    parts = []
    if counts:
        dropped = [[f"dropped: {key}", n] for key, n in counts.items() if n and key not in ("drawn", "clean", "kept")]
        came = "given in a file" if "instructions" in report.get("given", {}) else "drawn from the model itself"
        rows: list[list[Any]] = [[came, counts["drawn"]], *dropped, ["clean", counts["clean"]]]
        if baseline := report.get("baseline"):
            rows += [[f"without a pair: {reason}", n] for reason, n in baseline["dropped"].items()]
        else:
            rows.append(["kept by the filter", counts["kept"]])
        parts.append(_table(["instructions", ""], rows))
    if consistency:
        histogram_, kept = consistency["histogram"], consistency["kept_histogram"]
        most = max(1, *histogram_.values())
        bars = [
            [
                escape(name),
                f'<span class="bar {style(i)}" style="width:{max(1, 100 * n / most):.0f}%"></span>',
                str(n),
                str(kept[name]),
            ]
            for i, (name, n) in enumerate(histogram_.items())
        ]
        head = "<tr><th>c*</th><th></th><th>clean</th><th>kept</th></tr>"
        body = "".join(
            f'<tr><td>{name}</td><td class="bars">{bar}</td><td>{n}</td><td>{k}</td></tr>' for name, bar, n, k in bars
        )
        parts.append(
            f"<h3>Which criterion each instruction got</h3>"
            f'<p class="dim">Scale of the score: {escape(consistency["scale"])}. Kept: {consistency["kept_share"]:.1%} '
            f'of the clean ones.</p><div class="scroll"><table class="wide">{head}{body}</table></div>'
        )
        spread = consistency["distributions"]
        best, by_criterion = spread["score"], spread["by_criterion"]
        styles = {"clean": "neutral", "kept": "chosen"}
        names = {name: style(i) for i, name in enumerate(by_criterion["counts"])}
        figures = [
            _figure(
                "Score under c*",
                histogram(best["edges"], {n: (styles[n], c) for n, c in best["counts"].items()}, Axis("score")),
                "Of all clean instructions, and of those that were kept.",
                styles,
            ),
            _figure(
                "Score under every criterion",
                histogram(
                    by_criterion["edges"],
                    {n: (names[n], c) for n, c in by_criterion["counts"].items()},
                    Axis("score"),
                ),
                "Of all clean instructions. One that lies to the right of all others takes every c*.",
                names,
            ),
        ]
        parts.append(f'<div class="figures">{"".join(figures)}</div>')
    return "".join(parts)


def _strengths(report: Mapping[str, Any]) -> str:
    strengths = report.get("strengths")
    if not strengths:
        return ""
    names = list(strengths["positive"])
    rows = [[name, *(f"{strengths[side][name]:+.4g}" for side in ("positive", "negative"))] for name in names]
    layers = strengths["layers"]
    band = (min(layers), max(layers))
    dose = [
        Series(side, list(enumerate(strengths["dose"][key])), side)
        for side, key in zip(SIDES, ("positive", "negative"), strict=True)
    ]
    norms = [Series("‖h‖", list(enumerate(strengths["residual_norms"])), "neutral")]
    figures = [
        _figure(
            "Dose ‖γu‖/‖h‖",
            lines(dose, BLOCK, Axis("dose", percent=True), include=(0.0,), band=band),
            "How large the push is beside the state that it is added to.",
            {side: side for side in SIDES},
        ),
        _figure(
            "Residual norm ‖h‖",
            lines(norms, BLOCK, Axis("‖h‖"), include=(0.0,), band=band),
            "After each block, the mean over instructions.",
            {},
        ),
        *_ladder(strengths.get("calibration")),
    ]
    table = _table(["", "γ⁺ (chosen)", "γ⁻ (rejected)"], rows)
    ran = report.get("steering")
    acted = f" Steering acted on {how_much(ran)}." if ran else ""
    where = f'<p class="dim">In residual units, after {_blocks(layers)}.{acted}</p>'
    return f'{where}{table}<div class="figures">{"".join(figures)}</div>'


def _ladder(calibration: Mapping[str, Any] | None) -> list[str]:
    """The calibration's ladder of doses: quality and likelihood, for every band of blocks that was tried."""
    if calibration is None:
        return []
    charts, styles = ladder_charts(calibration)
    legend = styles if len(styles) > 1 else {}
    low, high = calibration["positive_beats_negative_interval"]
    chosen = (
        f"Rings: the doses that were chosen. The positive response is better in "
        f"{calibration['positive_beats_negative']:.0%} ({low:.0%} to {high:.0%}) of the instructions where the two "
        f"differ, in {calibration['positive_beats_negative_held_out']:.0%} of those that did not choose them; "
        f"{calibration['ties']:.0%} are ties."
    )

    [(quality, first), (likelihood, second)] = charts
    fall = "Under the unsteered model. Where it falls steeply, text breaks; hollow: no longer fluent."
    return [_figure(quality, first, chosen, legend), _figure(likelihood, second, fall, legend)]


def _pairs(report: Mapping[str, Any]) -> str:
    pairs = report["pairs"]
    if not pairs["pairs"]:
        return "<p>No pairs.</p>"
    named = (
        ("tokens, mean", "mean_tokens", "{:.1f}"),
        ("log p per token, unsteered model", "logprob_per_token", "{:.3f}"),
        ("cut off by the token limit", "cut_off", "{:.1%}"),
        ("empty", "empty", "{:.1%}"),
        ("repeated 4-grams", "repetition", "{:.1%}"),
        ("reward, mean", "reward", "{:.4g}"),
    )
    rows = [
        [title, *(form.format(pairs[side][key]) for side in SIDES)]
        for title, key, form in named
        if key in pairs["chosen"]
    ]
    per = ", ".join(f"{escape(name)} {n}" for name, n in pairs["per_criterion"].items())
    first = pairs["median_first_difference"]
    text = (
        f"<p>{per + '. ' if per else ''}Identical: {pairs['identical']:.1%}. Length chosen/rejected: "
        f"{pairs['length_ratio']:.2f}. Median first token that differs: {'none' if first is None else f'{first:g}'}."
        "</p>"
    )
    spread = pairs["distributions"]
    sides = {side: side for side in SIDES}

    def two(key: str, label: str) -> str:
        values = spread[key]
        return histogram(values["edges"], {side: (side, values["counts"][side]) for side in SIDES}, Axis(label))

    figures = [
        _figure("Length", two("tokens", "tokens"), "Tokens of a response, its end included.", sides),
        _figure(
            "Likelihood under the unsteered model",
            two("logprob_per_token", "log p per token"),
            "Broken text lies far to the left.",
            sides,
        ),
    ]
    if "reward" in spread:
        figures.append(_figure("Reward", two("reward", "reward"), "What the judge gave them.", sides))
    if spread["first_difference"]:
        values = spread["first_difference"]
        svg = histogram(values["edges"], {"pairs": ("s0", values["counts"]["pairs"])}, Axis("token"))
        figures.append(_figure("First token that differs", svg, "How early the two responses part.", {}))
    if separability := report.get("separability"):
        curve = [Series("accuracy", [(size, share) for size, share in separability["curve"]], "s0")]
        svg = lines(
            curve,
            Axis("pairs trained on", log=True),
            Axis("accuracy", percent=True),
            include=(0.4, 1.0),
            marks=(0.5, RULES["separable"].red),
        )
        caption = (
            "A linear probe on tokens and length, on pairs that it has not seen. At chance (lower dashes) nothing "
            "cheap gives the answer away; soon beyond the upper dashes the pairs teach nothing else."
        )
        figures.append(_figure("How fast chosen and rejected are told apart", svg, caption, {}))
    return f'{text}{_table(["", *SIDES], rows)}<div class="figures">{"".join(figures)}</div>'


def _effect(report: Mapping[str, Any]) -> str:
    effect = report.get("effect")
    if not effect or not effect["pairs"]:
        return ""
    sides = ("chosen", "neutral", "rejected")
    styles = {side: side for side in sides}
    projection = effect["projection"]
    per_block = [Series(side, list(enumerate(projection["per_block"][side])), side) for side in sides]
    layers = report["strengths"]["layers"]
    figures = [
        _figure(
            "Projection on the pair's direction",
            lines(per_block, BLOCK, Axis("deviations"), band=(min(layers), max(layers))),
            "Where the unsteered model reads the response; in deviations of the neutral ones.",
            styles,
        ),
        _figure(
            "Projection in the controlled blocks",
            _spread(projection["controlled"], sides, "deviations"),
            f"Chosen lies higher than rejected in {projection['chosen_higher']:.0%} of the pairs.",
            styles,
        ),
    ]
    if effect["agreement"] is not None:
        caption = (
            f"How much likelier a response is under the criterion's positive prompt than under its negative one. "
            f"Chosen agrees more than rejected in {effect['agreement']['chosen_higher']:.0%} of the pairs."
        )
        svg = _spread(effect["agreement"], sides, "nats per token")
        figures.append(_figure("Agreement with the criterion", svg, caption, styles))
    rows = [["log p per token", *(f"{effect['logprob_per_token'][side]:.3f}" for side in sides)]]
    text = (
        f"<p>{effect['pairs']} pairs of the dataset beside a neutral (unsteered) response to the same instruction, as "
        f"the unsteered model reads them.</p>"
    )
    return f'{text}{_table(["", *sides], rows)}<div class="figures">{"".join(figures)}</div>'


def _costs(report: Mapping[str, Any], clock: Mapping[str, Mapping[str, float]]) -> str:
    costs = report.get("costs")
    if not costs or not costs["pairs"]:
        return ""
    steps = by_step(costs, clock)
    own = [step for step in steps if step["step"] not in ASIDE]
    counted = ("prefilled", "decoded", "scored")
    rows = [
        [
            step["step"],
            *(f"{step[key]:,}" for key in counted),
            _flops(step["flops"]),
            f"{step['share']:.1%}",
            "–" if step["seconds"] is None else _seconds(step["seconds"]),
            "–" if step["peak_bytes"] is None else f"{step['peak_bytes'] / 2**20:,.0f}",
        ]
        for step in steps
    ]
    seconds = [step["seconds"] for step in steps if step["seconds"] is not None]
    peaks = [step["peak_bytes"] for step in steps if step["peak_bytes"] is not None]
    rows.append(
        [
            "all",
            *(f"{sum(step[key] for step in steps):,}" for key in counted),
            _flops(sum(step["flops"] for step in steps)),
            "100%",
            _seconds(sum(seconds)) if seconds else "–",
            f"{max(peaks) / 2**20:,.0f}" if peaks else "–",
        ]
    )
    if judge := costs.get("judge"):
        rows.append(["reward model", f"{judge['tokens']:,}", "0", "0", _flops(judge["flops"]), "–", "–", "–"])
    head = ["step", "prefilled", "decoded", "scored", "FLOPs", "share", "seconds", "peak MiB"]
    notes = [STEP_NOTES[step["step"]] for step in steps if step["step"] in STEP_NOTES]
    took = f" and {_seconds(sum(step['seconds'] or 0 for step in own) / costs['pairs'])} s" if seconds else ""
    return (
        f"<p>A pair took {_flops(sum(step['flops'] for step in own) / costs['pairs'])} forward FLOPs of the model "
        f"itself{took}, without what belongs to no method.</p>{_table(head, rows)}"
        f'<p class="dim">In tokens. {" ".join(notes)} Seconds are of all calls that the run took; memory is the most '
        f"in use while a step's files were made: allocated on a GPU, the whole process elsewhere. The comparison with "
        f"baselines, in three accountings: <code>icon2 costs</code>.</p>"
    )


def _flops(value: float) -> str:
    """A number of operations with a unit that people can read: 4.44 G."""
    for power, unit in ((15, " P"), (12, " T"), (9, " G"), (6, " M"), (3, " k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g}{unit}"
    return f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _examples(report: Mapping[str, Any]) -> str:
    articles = []
    for example in report.get("examples", ()):
        same = _parting(example["chosen"], example["rejected"])
        sides = "".join(
            f'<div class="{side}"><h4>{side}</h4><p dir="auto">{_marked(example[side], same)}</p></div>'
            for side in SIDES
        )
        of = f' <span class="dim">({escape(example["criterion"])})</span>' if example["criterion"] else ""
        articles.append(
            f'<article><p dir="auto">{escape(example["prompt"])}{of}</p><div class="pair">{sides}</div></article>'
        )
    if not articles:
        return ""
    of = " of each criterion" if any(example["criterion"] for example in report["examples"]) else ""
    note = f'<p class="dim">The first ones{of} that differ, not the best. Marked: where they part.</p>'
    return note + "".join(articles)


def _making(manifest: Mapping[str, Any]) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in manifest.get("notes", ()))
    criteria = [[name, two["positive"], two["negative"]] for name, two in manifest.get("criteria", {}).items()]
    identity = manifest["identity"]
    shown = {
        "config": identity["config"],
        **{key: identity[key] for key in ("model", "versions", "machine") if key in identity},
        **{key: manifest[key] for key in ("sampling", "seeds", RAN) if key in manifest},
    }
    prompts = ""
    if criteria:
        articles = "".join(
            f'<article><p><b>{escape(name)}</b></p><div class="pair"><div class="chosen"><p>{escape(positive)}</p>'
            f'</div><div class="rejected"><p>{escape(negative)}</p></div></div></article>'
            for name, positive, negative in criteria
        )
        prompts = f"<h3>System prompts of the criteria</h3>{articles}"
    text = escape(json.dumps(shown, indent=2, ensure_ascii=False))
    return (
        f"{f'<ul>{notes}</ul>' if notes else ''}{prompts}"
        f"<details><summary>Settings, versions, seeds, what ran (manifest.json)</summary><pre>{text}</pre></details>"
    )


# ---------------------------------------------------------------- parts


def _figure(title: str, svg: str, caption: str, styles: Mapping[str, str]) -> str:
    legend = "".join(f'<li class="{css}">{escape(name)}</li>' for name, css in styles.items())
    return (
        f"<figure><h3>{escape(title)}</h3>{f'<ul class=legend>{legend}</ul>' if legend else ''}{svg}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def _spread(values: Mapping[str, Any], sides: Sequence[str], label: str) -> str:
    found = histograms({side: values[side] for side in sides}, bins=16)
    return histogram(found["edges"], {side: (side, found["counts"][side]) for side in sides}, Axis(label))


def _range(layers: Sequence[int]) -> str:
    return f"blocks {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"block {layers[0]}"


def _blocks(layers: Sequence[int]) -> str:
    return f"the controlled {_range(layers)}"


def _parting(a: str, b: str) -> int:
    """How many characters two texts share before the word in which they first differ; all of them if they are equal."""
    if a == b:
        return len(a)
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    while shared > 0 and not a[shared - 1].isspace():
        shared -= 1
    return shared


def _marked(text: str, same: int) -> str:
    rest = text[same:]
    word = len(rest) - len(rest.lstrip()) + len(rest.split(maxsplit=1)[0]) if rest.strip() else len(rest)
    marked = f"<mark>{escape(rest[:word])}</mark>" if word else ""
    return f'<span class="same">{escape(text[:same])}</span>{marked}{escape(rest[word:])}'
