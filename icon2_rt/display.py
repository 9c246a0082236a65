"""How a run looks to a person: tables for the end, and a bar for the long work in between. Nothing else needs rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from icon2_rt.demo import Judgement
from icon2_rt.doctor import Finding
from icon2_rt.pipeline.costs import by_step
from icon2_rt.qualify.verdict import PREFILL, Qualification

WIDTH = 100
# Without a terminal a line about long work is printed at most this often.
SECONDS_BETWEEN_LINES = 15.0


def console(stderr: bool = False) -> Console:
    """As wide as the terminal, within reason; a fixed width and no colour codes where there is none.

    Text is shown as it is: paths, criteria and instructions may hold ``[brackets]`` and ``:colons:``.
    """
    plain = Console(stderr=stderr)
    width = min(plain.width, 120) if plain.is_terminal else WIDTH
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


class Steps:
    """Shows how far a run is: a bar per step on a terminal, now and then a line elsewhere. Call it as a ``Watch``."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        self._finished: set[str] = set()
        self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<22}"),
                BarColumn(bar_width=40),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> Steps:
        disable_progress_bar()  # of transformers: it would run through ours
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = self._began.setdefault(step, now)
        if self._bars is not None:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(step, total=total)
            self._bars.update(self._tasks[step], completed=done, total=total)
        elif done >= total and step not in self._finished:
            self._finished.add(step)
            if now - began >= 0.05:  # what was there already needs no line
                self._line(f"{step}: done in {now - began:.1f} s")
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line(f"{step}: {done} of {total}")

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        print(text, file=sys.stderr, flush=True)


def heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> RenderableType:
    """A titled table: the first column left, figures right, a sentence under it."""
    body = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    rows = list(rows)
    widest = min(20, max((len(str(row[0])) for row in rows), default=0))  # names are whole before figures are
    for i, column in enumerate(columns):
        body.add_column(column, justify="left" if i == 0 else "right", min_width=None if i else widest)
    for row in rows:
        body.add_row(*[cell if isinstance(cell, Text) else str(cell) for cell in row])
    parts: list[RenderableType] = [heading(title), Padding(body, (0, 0, 0, 2))]
    if caption:
        parts.append(Padding(Text(caption, style="dim"), (0, 0, 0, 2)))
    return Group(*parts)


def run_report(report: Mapping[str, Any], seconds: Mapping[str, float] | None = None) -> RenderableType:
    """Everything a run says about itself, in the order of its steps."""
    seconds = seconds or {}
    if "baseline" in report:
        shown = [baseline_table(report, _took(seconds, "instructions"))]
        if report["counts"]["pairs"]:
            shown.append(pairs_table(report, _took(seconds, "pairs"), "2"))
        return Group(*shown, checks_list(report["checks"], report["warnings"]))
    return Group(
        directions_table(
            report["directions"]["health"],
            report["strengths"]["layers"],
            _took(seconds, "feature instructions", "directions"),
        ),
        instructions_table(report, _took(seconds, "instructions", "consistency")),
        consistency_table(report),
        strengths_table(report, _took(seconds, "strengths")),
        pairs_table(report, _took(seconds, "pairs")),
        checks_list(report["checks"], report["warnings"]),
    )


def _took(seconds: Mapping[str, float], *steps: str) -> str:
    """What a step's heading says about its time; nothing where it was done in an earlier run."""
    total = sum(seconds.get(step, 0.0) for step in steps)
    return f"  ({total:.1f} s)" if total >= 0.05 else ""


def baseline_table(report: Mapping[str, Any], took: str = "") -> RenderableType:
    counts, baseline = report["counts"]["instructions"], report["baseline"]
    rows = [[_came(report), counts["drawn"]], ["clean", counts["clean"]]]
    rows += [[f"  without a pair: {reason}", n] for reason, n in baseline["dropped"].items()]
    rows.append(["pairs", report["counts"]["pairs"]])
    return table(f"1. Instructions, for the baseline {baseline['recipe']}{took}", ["", "number"], rows)


def directions_table(
    health: Mapping[str, Mapping[str, Sequence[float]]], layers: Sequence[int], took: str = ""
) -> RenderableType:
    keys = {
        "contrast": "largest ‖Δ‖/‖h‖",
        "cos_mean_difference": "cos(PC1, mean Δ)",
        "sign_agreement": "pairs that agree",
        "split_half_cosine": "split-half cos",
    }
    shown = [key for key in keys if all(key in figures for figures in health.values())]
    rows = [[name, *(_figure(figures[key], layers, key) for key in shown)] for name, figures in health.items()]
    first, last = layers[0], layers[-1]
    return table(
        f"1. Directions{took}",
        ["criterion", *(keys[key] for key in shown)],
        rows,
        f"‖Δ‖/‖h‖: how far the two system prompts move the state, at the block where it is most; under 10 % the model "
        f"hardly heeds them, however good the rest looks. The rest: means over blocks {first} to {last} (0-based).",
    )


def _figure(values: Sequence[float], layers: Sequence[int], key: str) -> str:
    if key == "contrast":
        return f"{max(values):.1%}"
    mean = fmean(values[i] for i in layers)
    return f"{mean:.1%}" if key == "sign_agreement" else f"{mean:.3f}"


def instructions_table(report: Mapping[str, Any], took: str = "") -> RenderableType:
    counts = report["counts"]["instructions"]
    dropped = {key: n for key, n in counts.items() if key not in ("drawn", "clean", "kept")}
    rows = [[_came(report), counts["drawn"]]]
    rows += [[f"  dropped: {key}", n] for key, n in dropped.items() if n]
    rows += [["clean", counts["clean"]], ["kept by the consistency filter", counts["kept"]]]
    return table(f"2. Instructions{took}", ["", "number"], rows)


def _came(report: Mapping[str, Any]) -> str:
    """Where the instructions are from."""
    files = report.get("given", {})
    return f"given in {files['instructions']}" if "instructions" in files else "drawn from the model itself"


def consistency_table(report: Mapping[str, Any]) -> RenderableType:
    figures = report["consistency"]
    histogram, kept, scores = figures["histogram"], figures["kept_histogram"], figures["scores"]
    most = max(1, *histogram.values())
    rows = [
        [
            name,
            Text("█" * round(24 * n / most) or "▏", style="cyan"),
            n,
            kept[name],
            f"{scores[name]['median']:+.3f}",
        ]
        for name, n in histogram.items()
    ]
    body = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column, justify in (("criterion c*", "left"), ("", "left"), ("clean", "right"), ("kept", "right")):
        body.add_column(column, justify=justify)  # type: ignore[arg-type]
    body.add_column("median score", justify="right")
    for row in rows:
        body.add_row(*[cell if isinstance(cell, Text) else str(cell) for cell in row])
    what = {
        "raw": "whose direction an instruction agrees with most (the paper's score)",
        "zscore": "whose direction an instruction agrees with most, each criterion on its own scale",
        "contrast": "whose two system prompts move an instruction most, relative to the other instructions",
    }.get(figures["scale"], "that the function scores highest")
    given = ", or the one that it came with" if report.get("given", {}).get("with_criterion") else ""
    caption = f"Scale: {figures['scale']}. c* is the criterion {what}{given}."
    return Group(
        heading("   Which criterion each instruction got"),
        Padding(body, (0, 0, 0, 2)),
        Padding(Text(caption, style="dim"), (0, 0, 0, 2)),
    )


def strengths_table(report: Mapping[str, Any], took: str = "") -> RenderableType:
    strengths = report["strengths"]
    positive, negative = strengths["positive"], strengths["negative"]
    calibration = strengths.get("calibration")
    if calibration is None:
        doses = strengths["dose"]
        given = [
            [f"{sign} γ = " + " / ".join(f"{gamma:+.4g}" for gamma in gammas), _range(doses[sign])]
            for sign, gammas in (
                ("positive", dict.fromkeys(positive.values())),
                ("negative", dict.fromkeys(negative.values())),
            )
        ]
        return table(f"3. Strengths, as given{took}", ["", "dose ‖γu‖/‖h‖ over the controlled blocks"], given)
    return Group(
        *(
            ladder_table(band, f"3. Strengths, calibrated by dose on this model{took}" if i == 0 else "", calibration)
            for i, band in enumerate(calibration["bands"])
        ),
        Padding(Text(ladder_caption(calibration), style="dim"), (0, 0, 0, 2)),
    )


def ladder_table(band: Mapping[str, Any], title: str, calibration: Mapping[str, Any]) -> RenderableType:
    """Every rung of one band of blocks; what was chosen is marked in the band that was."""
    mine = band["band"] == calibration["band"]
    rows: list[list[str | Text]] = []
    for rung in band["rungs"]:
        chosen = {band["positive_dose"]: "γ⁺", band["negative_dose"]: "γ⁻"}.get(rung["dose"], "")
        low, high = rung["quality_interval"]
        rows.append(
            [
                f"{rung['dose']:+.0%}" if rung["dose"] else "unsteered",
                f"{rung['gamma']:+.3g}",
                f"{rung['logprob']:.2f}",
                f"{rung['divergence']:.3f}",
                "yes" if rung["fluent"] else "no",
                f"{rung['quality']:+.3f} ± {(high - low) / 2:.2f}",
                "" if rung["beaten"] is None else f"{rung['beaten']:.0%}",
                Text(chosen if mine or not chosen else f"({chosen})", style="bold green" if mine else "dim"),
            ]
        )
    columns = ["dose of ‖h‖", "γ", "log p / token", "KL", "fluent", "quality", "P(+ better)", "chosen"]
    more = f"   Blocks {band['layers'][0]} to {band['layers'][-1]} (0-based)" if len(calibration["bands"]) > 1 else ""
    return table("\n".join(filter(None, [title, more])), columns, rows)


def ladder_caption(calibration: Mapping[str, Any]) -> str:
    """What the columns of :func:`ladder_table` are, and how sure the choice is."""
    what = {
        "agreement": "how much likelier the response is under the criterion's positive prompt than under its negative "
        "one (nats per token)",
        "projection": "the projection on the criterion's direction where the unsteered model reads the response",
    }.get(calibration["quality"], f"the score of {calibration['quality']}")
    (p_low, p_high), (n_low, n_high) = calibration["positive_interval"], calibration["negative_interval"]
    low, high = calibration["positive_beats_negative_interval"]
    return (
        f"Over {calibration['instructions']} instructions. Log p and KL (nats per token): under and from the unsteered "
        f"model. Quality: {what}, ± its 95 % interval. P(+ better): where the response at γ⁺ and the one at this dose "
        f"differ. With the "
        f"chosen doses the positive response is better in {calibration['positive_beats_negative']:.0%} of those "
        f"({low:.0%} to {high:.0%}; {calibration['positive_beats_negative_held_out']:.0%} on the half that did not "
        f"choose), and "
        f"{calibration['ties']:.0%} are ties. Other instructions like these would have chosen {p_low:+.0%} to "
        f"{p_high:+.0%} and {n_low:+.0%} to {n_high:+.0%}. The strengths printed in the paper (+0.1, −0.05) belong to "
        f"its 7B and 8B models and mean nothing on this one."
    )


def _range(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{min(there):.1%} to {max(there):.1%}" if there else "none"


def pairs_table(report: Mapping[str, Any], took: str = "", number: str = "4") -> RenderableType:
    pairs = report["pairs"]
    chosen, rejected = pairs["chosen"], pairs["rejected"]
    rows = [
        ["tokens, mean", f"{chosen['mean_tokens']:.1f}", f"{rejected['mean_tokens']:.1f}"],
        [
            "log p / token, unsteered model",
            f"{chosen['logprob_per_token']:.2f}",
            f"{rejected['logprob_per_token']:.2f}",
        ],
        ["cut off by the token limit", f"{chosen['cut_off']:.1%}", f"{rejected['cut_off']:.1%}"],
        ["empty", f"{chosen['empty']:.1%}", f"{rejected['empty']:.1%}"],
        ["repeated 4-grams", f"{chosen['repetition']:.1%}", f"{rejected['repetition']:.1%}"],
    ]
    first = pairs["median_first_difference"]
    caption = (
        f"{pairs['pairs']} pairs. Identical: {pairs['identical']:.1%}. Length chosen/rejected: "
        f"{pairs['length_ratio']:.2f}. Median first token that differs: {'none' if first is None else f'{first:g}'}."
    )
    return table(f"{number}. Pairs{took}", ["", "chosen", "rejected"], rows, caption)


def checks_list(checks: Sequence[Mapping[str, Any]], warnings: Sequence[str]) -> RenderableType:
    """How many health checks are red, yellow and green; the warnings, and what is yellow without one."""
    styles = {"red": "bold red", "yellow": "yellow", "green": "green"}
    counts = Text("\n  Health checks: ")
    for status, style in styles.items():
        if number := sum(check["status"] == status for check in checks):
            counts.append(f"{number} {status}  ", style)
    near = [
        f"{check['title']}: {check['shown']} ({check['limits']})"
        for check in checks
        if check["status"] == "yellow" and not check["notes"]
    ]
    return Group(counts, warnings_list(warnings), warnings_list(near, mark=" "))


def costs_table(name: str, costs: Mapping[str, Any], clock: Mapping[str, Mapping[str, float]]) -> RenderableType:
    """What each step of a run cost."""
    rows = [
        [
            row["step"],
            *(f"{row[key]:,}" for key in ("prefilled", "decoded", "scored")),
            f"{row['flops']:.3g}",
            "–" if row["seconds"] is None else f"{row['seconds']:.1f}",
            "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}",
        ]
        for row in by_step(costs, clock)
    ]
    if judge := costs.get("judge"):
        rows.append(["reward model", f"{judge['tokens']:,}", "0", "0", f"{judge['flops']:.3g}", "–", "–"])
    return table(
        f"{name}: {costs['pairs']} pairs",
        ["step", "prefilled", "decoded", "scored", "FLOPs", "seconds", "peak MiB"],
        rows,
        "Tokens. figures: the responses read again for the dataset's log-probabilities; checks: for the report. Both "
        "belong to no method.",
    )


def savings_table(rows: Sequence[Mapping[str, Any]], unit: str, ratio: float) -> RenderableType:
    """What a pair costs by method and accounting, and the share that the method saves."""
    names = {"all": "D_raw to all", "own": "own needs", "paper": "the paper's"}
    figures = [
        [
            row["name"],
            *(f"{row[key]:.3g}" for key in ("answering", "judging", "once")),
            *(f"{row['total'][a]:.3g}" + (f" ({row['saving'][a]:+.0%})" if row is not rows[0] else "") for a in names),
        ]
        for row in rows
    ]
    return table(
        f"A pair's cost in {unit}",
        ["", "answers", "judging", "once", *names.values()],
        figures,
        f"In brackets what icon2 saves. judging: scoring instructions for icon2. once: a pair's share of directions "
        f"and strengths. D_raw to all: everybody pays for the instructions that icon2 drew; own needs: each for as "
        f"many as it uses; the paper's: nobody, and icon2 scores only what it keeps. An instruction has {ratio:.2f} "
        f"times the tokens of a response.",
    )


def warnings_list(warnings: Sequence[str], mark: str = "!") -> RenderableType:
    return Group(*[Padding(Text(f"{mark} {warning}", style="yellow"), (0, 0, 0, 4)) for warning in warnings])


def examples(shown: Sequence[Mapping[str, str]]) -> RenderableType:
    """A few pairs side by side: the report's examples."""
    body = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", show_lines=True)
    body.add_column("instruction (criterion)", ratio=3)
    body.add_column("chosen", ratio=4)
    body.add_column("rejected", ratio=4)
    for example in shown:
        prompt = Text(example["prompt"])
        prompt.append(f"\n({example['criterion']})", style="dim")
        body.add_row(prompt, Text(example["chosen"]), Text(example["rejected"]))
    return Group(heading("A few pairs side by side (the first of each criterion)"), Padding(body, (0, 0, 0, 2)))


def judgement_table(judgement: Judgement) -> RenderableType:
    """What the tiny world's oracle says; only the demo has one."""
    rows = [
        [
            "well-formed responses",
            f"{judgement.chosen.well_formed:.0%}",
            f"{judgement.rejected.well_formed:.0%}",
        ],
        ["mean score of those, 0 to 1", _score(judgement.chosen.score), _score(judgement.rejected.score)],
    ]
    caption = (
        f"{judgement.known} of the {judgement.pairs} instructions are ones that the invented land knows. Where both "
        f"responses are well formed ({judgement.both} pairs), the chosen one is better in {judgement.better}, equal in "
        f"{judgement.ties}, worse in {judgement.worse}. c* names the criterion that an instruction is about in "
        f"{judgement.fitting} of {judgement.specific}; one in three would be chance."
    )
    if 3 * judgement.fitting < judgement.specific:
        caption += " So the consistency score does not choose well on this model."
    return table(
        "Afterwards, the oracle's opinion (the method never saw it)", ["", "chosen", "rejected"], rows, caption
    )


def _score(score: float | None) -> str:
    return "–" if score is None else f"{score:.2f}"


def qualification_table(verdict: Qualification) -> RenderableType:
    """What a device has proven: a line for each form of each op, then the engine, the verdict and its place."""
    body = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in ("op", "form"):
        body.add_column(name, no_wrap=True)
    body.add_column("used")
    body.add_column("error in fp32", justify="right")
    body.add_column("µs by rows", justify="right")
    body.add_column("what is wrong")
    chosen = {**verdict.forms, PREFILL: verdict.prefill}
    last = ""
    for result in verdict.forms_tried:
        used = verdict.status == "proven" and chosen.get(result.op) == result.form
        error = "" if result.error is None else f"{result.error:.1e}"
        times = ", ".join(f"{rows}: {micros:.1f}" for rows, micros in result.microseconds.items())
        op = result.op if result.op != last else ""
        last = result.op
        wrong = Text(result.wrong or "", style="bold red")
        body.add_row(op, result.form, "yes" if used else "", error, times, wrong)
    for engine in verdict.engines_tried:
        form = "with graphs" if engine.graphs else "without graphs"
        used = verdict.status == "proven" and engine.graphs == verdict.graphs
        times = ", ".join(f"{name}: {micros:.0f}" for name, micros in engine.microseconds.items())
        wrong = Text(engine.wrong or "", style="bold red")
        body.add_row("a whole engine", form, "yes" if used else "", "", times, wrong)
    where = f"stored in {verdict.stored}" if verdict.stored else "not stored"
    how = "read from there, not tried now" if verdict.cached else f"tried in {verdict.seconds:.0f} s"
    style = {"proven": "bold green", "refused": "bold red", "not tried": "bold yellow"}[verdict.status]
    lines = [Text(f"\n  {verdict.device}: {verdict.status}", style=style), Text(f"  {verdict.reason}")]
    if verdict.status != "not tried":
        lines.append(Text(f"  {where} ({how})", overflow="fold"))
    return Group(body, *lines) if verdict.forms_tried else Group(*lines)


def findings_table(findings: Sequence[Finding]) -> RenderableType:
    body = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    body.add_column("", no_wrap=True)
    body.add_column("", no_wrap=True)
    body.add_column("found")
    body.add_column("what it means")
    styles = {"ok": "", "missing": "bold red", "note": "yellow"}
    section = ""
    for finding in findings:
        new = finding.section != section
        section = finding.section
        body.add_row(
            Text(section if new else "", style="bold"),
            finding.name,
            Text(finding.value, style=styles[finding.state]),
            Text(finding.advice, style="dim"),
        )
    return body
