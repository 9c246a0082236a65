"""What is green, yellow or red in a run, what that means, and what to do about it: one rule per health figure.

The limits are judgements, not laws. Where one was measured or printed somewhere, the comment beside it says so; the
others are where the figure has stopped looking like that of the runs that worked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from icon2_rt.pipeline.calibrate import FLUENCY_LOSS, MANY_TIES
from icon2_rt.pipeline.config import CalibrationConfig
from icon2_rt.pipeline.consistency import DEGENERATE_SHARE
from icon2_rt.pipeline.separability import SEPARATED

Status = Literal["green", "yellow", "red"]
ORDER: tuple[Status, ...] = ("red", "yellow", "green")


@dataclass(frozen=True)
class Rule:
    """How one figure is judged: green from ``green`` on, red beyond ``red``, yellow between; the larger of the two says
    in which direction better lies. ``unsteered``: what to do in place of ``todo`` where no steering made the pairs."""

    section: str
    title: str
    green: float
    red: float
    means: str
    todo: str
    unit: Literal["%", "", "×", "nats"] = "%"
    unsteered: str = ""

    def status(self, value: float) -> Status:
        good, bad = (
            (value >= self.green, value < self.red)
            if self.green > self.red
            else (value <= self.green, value > self.red)
        )
        return "green" if good else "red" if bad else "yellow"

    def show(self, value: float) -> str:
        if self.unit == "%":
            percent = f"{100 * value:.1f}"
            return f"{percent.removesuffix('.0')} %"
        return f"{value:.3f}" if self.unit == "" else f"{value:.2f}{'×' if self.unit == '×' else ' nats'}"

    @property
    def limits(self) -> str:
        """For people: "from 20 %; red under 10 %"."""
        more = self.green > self.red
        return (
            f"green from {self.show(self.green)}, red under {self.show(self.red)}"
            if more
            else f"green up to {self.show(self.green)}, red over {self.show(self.red)}"
        )


@dataclass(frozen=True)
class Check:
    """One rule's verdict on a run. ``shown`` is the value with what it belongs to; ``todo``: what to do where it is not
    green; ``notes``: the step's own words."""

    key: str
    status: Status
    value: float
    shown: str
    todo: str
    notes: tuple[str, ...] = ()

    @property
    def rule(self) -> Rule:
        return RULES[self.key]

    def to_dict(self) -> dict[str, Any]:
        rule = self.rule
        return {
            "key": self.key,
            "status": self.status,
            "title": rule.title,
            "value": self.value,
            "shown": self.shown,
            "limits": rule.limits,
            "todo": self.todo,
            "notes": list(self.notes),
        }


RULES: dict[str, Rule] = {
    # Measured on small models: 4 % where the prompts did nothing although every other figure was fine; 35–78 % at the
    # best block of the shipped model, which heeds them.
    "contrast": Rule(
        "Directions", "Contrast ‖mean difference‖/‖h‖, at its best block", 0.2, 0.1,
        "Whether the model heeds the system prompts at all. Where it is small the direction may be noise, however good "
        "the other figures look.",
        "Make the two prompts more different or plainer; check that the chat template passes a system prompt on; try "
        "an instruction-tuned checkpoint. Do not go on with a criterion that stays red.",
    ),
    "split_half": Rule(
        "Directions", "Split-half cosine", 0.95, 0.8,
        "Whether the other half of the feature instructions gives the same direction, in the controlled blocks.",
        "Raise directions.features; if it stays low, the model reacts differently to different instructions: sharpen "
        "the prompts, or move pairs.layers to blocks where the figure is high.",
        unit="",
    ),
    "sign_agreement": Rule(
        "Directions", "Sign agreement", 0.95, 0.8,
        "The share of feature instructions whose own difference points along the direction, in the controlled blocks.",
        "As for the split-half cosine.",
    ),
    "cos_mean_difference": Rule(
        "Directions", "cos(PC1, mean difference)", 0.9, 0.7,
        "Whether the differences vary in one way. Where it is low, the principal component is about something else "
        "than what the two prompts differ in.",
        'Set directions.method = "mean_difference", or use other blocks.',
        unit="",
    ),
    "distinct": Rule(
        "Directions", "Cosine between two criteria", 0.9, 0.97,
        "Whether two criteria are one and the same to the model. c* between them is then arbitrary, which does no harm "
        "but tells nothing.",
        "Drop one of the two, or word them further apart.",
        unit="",
    ),
    "usable": Rule(
        "Instructions", "Usable instructions", 0.5, 0.1,
        "What hygiene left of the draws. Few: the model does not end its turn, repeats itself, or is no chat model.",
        "Look at what was dropped and why: raise instructions.max_new_tokens against truncation, "
        "instructions.temperature against duplicates; or give instructions.file.",
    ),
    "criteria": Rule(
        "Filter", "Most frequent c*", 0.7, DEGENERATE_SHARE,
        "Whether c* depends on the instruction. If nearly all get the same criterion, the score measures that "
        "direction's own offset.",
        'Compare filter.scale = "zscore" and "contrast"; read a few instructions of each criterion; or use one '
        "criterion, or give every instruction its criterion in instructions.file.",
    ),
    "calibrated": Rule(
        "Strengths", "Calibration: positive beats negative", CalibrationConfig.better, 0.6,
        "The paper's condition for γ⁻, on instructions that are not used for pairs; ties are left out.",
        "Add larger negative doses as long as the text stays fluent; try other pairs.layers; a low pairs.temperature "
        'or pairs.noise = "common" leaves less to chance.',
    ),
    # In the trial on a small model text collapsed beyond 20 % on the positive side and near 25 % on the negative one.
    "dose": Rule(
        "Strengths", "Largest dose ‖γu‖/‖h‖", 0.25, 0.5,
        "How large the push is beside the state that it is added to. From some dose on text breaks; the figures of the "
        "pairs say whether it did.",
        "Lower the strengths, or leave out the early blocks, where states are short.",
    ),
    # Every steered response has its last prompt token steered: one without is a fault, among half a million too.
    "acted": Rule(
        "Strengths", "Steered responses on which the steering acted", 1.0, 0.999998,
        "Counted by the engine: the positions and blocks at which each term acted. A response without any is an "
        "unsteered one under a steered one's name.",
        "Look at the strengths, at the blocks of the directions, and at what ran in manifest.json. Strengths that "
        "cannot act are refused before a run, so if nothing explains it, report it.",
    ),
    "identical": Rule(
        "Pairs", "Identical pairs", 0.05, 0.1,
        "Pairs that teach nothing. Two responses that are drawn independently come out the same only if the "
        "push is too small and the model has nearly no choice.",
        "Raise the strengths (see the dose), or more blocks in pairs.layers.",
        unsteered="Leave these pairs out; if they are many, the prompts or drafts make no difference to the model.",
    ),
    # With the same draws two branches are one text until the push changes a token: what the calibration takes as usual
    # (MANY_TIES) is no fault, and beyond half of the pairs more decoding is wasted than used.
    "identical_common": Rule(
        "Pairs", "Identical pairs, with the same draws", MANY_TIES, 0.5,
        "With common random numbers, or at temperature 0, a pair is one text until the push changes a token, so a mild "
        "push leaves many alone. They teach nothing and do no harm: the loss has no gradient there, and export and the "
        "training example leave them out. What they cost is their decoding.",
        "Raise the strengths as long as the text stays fluent, or draw more instructions. pairs.noise = "
        '"independent" makes nearly all pairs differ, in part by chance alone.',
        unsteered="Leave these pairs out; if they are many, the prompts make no difference to the model.",
    ),
    "length": Rule(
        "Pairs", "Length ratio", 1.25, 1.5,
        "Tokens of all chosen responses over those of all rejected ones, or the reverse. Far from 1, DPO learns length "
        "before anything else.",
        "Lower the strength of the side that is off; see how lengths are spread. What remains can be answered in "
        "training, with a loss that normalises by length.",
        unit="×",
        unsteered="The judge or the recipe prefers one length: see how lengths are spread. What remains can be "
        "answered in training, with a loss that normalises by length.",
    ),
    "cut_off": Rule(
        "Pairs", "Cut off by the token limit", 0.05, 0.1,
        "Half sentences, and runaways that never end; the worse side.",
        "Raise pairs.max_new_tokens; if one side alone is cut off, its strength is too large.",
        unsteered="Raise pairs.max_new_tokens.",
    ),
    "empty": Rule(
        "Pairs", "Empty responses", 0.0, 0.01,
        "The model ended at once, as too large a push makes it do; the worse side.",
        "Lower that side's strength, or drop these pairs.",
        unsteered="Drop these pairs.",
    ),
    "repetition": Rule(
        "Pairs", "Repeated 4-grams", 0.1, 0.25,
        "Loops: an early sign of text that breaks; the worse side.",
        "Lower that side's strength.",
        unsteered="Read the examples; change pairs.temperature, or set pairs.repetition_penalty.",
    ),
    "separable": Rule(
        "Pairs", "Told apart by a linear probe", 0.9, SEPARATED,
        "Whether tokens and length alone give the answer away, on pairs that the probe has not seen. Such pairs are "
        "learned at once, and in place of what they are for; the fewer pairs the probe needs, the worse.",
        "Read the examples for what always differs (an opening, a disclaimer, length); lower the strengths; make sure "
        "that no system prompt is in the pairs.",
        unsteered="Read the examples for what always differs (an opening, a disclaimer, length): it is what the judge "
        "or the recipe goes by.",
    ),
    "rendered": Rule(
        "Pairs", "Rendered as written", 1.0, 0.95,
        "Whether the chat template, by which a trainer renders prompt and response, shows a response as it was written "
        "by the model. Some templates cut out thoughts (all that stands before `</think>`), trim white space, or leave "
        "the turn open.",
        "Train on `icon2 export --style plain`, which holds the text as it was written; or train with a chat template "
        "that keeps responses whole, or set its variables in [template] if it has one for that.",
    ),
    "longer": Rule(
        "Pairs", "Same side longer", 0.75, 0.9,
        "The length figure again, pair by pair: how often the same side is the longer one.",
        "As for the length ratio.",
    ),
    "fluency": Rule(
        "Effect", "Likelihood lost per token", FLUENCY_LOSS, 0.5,
        "Against unsteered responses: how far the steering went from what the model would write. Broken text shows "
        "here first; and a rejected response that is broken makes any pair look good.",
        "Lower that side's strength.",
        unit="nats",
    ),
    "agreement": Rule(
        "Effect", "Chosen agrees more with the criterion", 0.7, 0.55,
        "Agreement: how much likelier the text is under the positive system prompt than under the negative one. At "
        "half the pairs are coin flips.",
        "Raise the strengths while the text stays fluent; try other blocks; look at the contrast of the directions.",
    ),
    "projection": Rule(
        "Effect", "Chosen projects higher on its direction", 0.55, 0.45,
        "Whether reading the text moves the unsteered model along the direction. A weak figure on its own: it stands "
        "near half on small models whose pairs are good by other measures.",
        "Look at agreement first. If both are near half, the steering has no effect that the model itself can see.",
    ),
}  # fmt: skip


def examine(report: Mapping[str, Any]) -> list[Check]:
    """Every check that the content of ``report.json`` has the figures for, in the order of :data:`RULES`.

    Sections that are not there (a dataset that was not made by steering has no directions) are left out.
    """
    found: dict[str, Check] = {}
    steered = "strengths" in report

    def add(key: str, value: float, of: str = "", notes: Sequence[str] = ()) -> None:
        rule = RULES[key]
        status = rule.status(value)
        if notes and status == "green":
            status = "yellow"  # the step itself has something to say
        todo = rule.todo if steered else rule.unsteered or rule.todo
        found[key] = Check(key, status, value, rule.show(value) + (f" ({of})" if of else ""), todo, tuple(notes))

    if directions := report.get("directions"):
        _directions(directions, report["strengths"]["layers"], add)
    if counts := report["counts"].get("instructions"):
        add("usable", counts["clean"] / counts["drawn"], f"{counts['clean']} of {counts['drawn']}")
    if consistency := report.get("consistency"):
        histogram = consistency["histogram"]
        if len(histogram) > 1:
            name = max(histogram, key=histogram.__getitem__)
            add("criteria", histogram[name] / sum(histogram.values()), name, consistency["warnings"])
    if strengths := report.get("strengths"):
        if calibration := strengths.get("calibration"):
            add("calibrated", calibration["positive_beats_negative"], notes=calibration["notes"])
        doses = {side: [d for d in strengths["dose"][side] if d is not None] for side in ("positive", "negative")}
        if any(doses.values()):
            side = max(doses, key=lambda s: max(doses[s], default=0))
            add("dose", max(doses[side]), side)
    if (steering := report.get("steering")) is not None:
        rows = steering["rows"] + steering["idle"]
        add("acted", steering["rows"] / rows if rows else 0.0, f"{steering['rows']} of {rows}")
    if report["pairs"]["pairs"]:
        _pairs(report["pairs"], add)
    if rendering := report.get("rendering"):
        add(
            "rendered",
            rendering["as_written"],
            ", ".join(f"{n} {reason}" for reason, n in rendering["reasons"].items()),
        )
    if separability := report.get("separability"):
        after = separability["separated_after"]
        add("separable", separability["accuracy"], f"{SEPARATED:.0%} after {after} pairs" if after else "")
    if (effect := report.get("effect")) and effect["pairs"]:
        _effect(effect, add)
    return [found[key] for key in RULES if key in found]


def warnings(checks: Sequence[Check]) -> list[str]:
    """A sentence for everything that is red, and whatever a step itself had to say."""
    found: list[str] = []
    for check in checks:
        if check.notes:
            found += check.notes
        elif check.status == "red":
            found.append(f"{check.rule.title}: {check.shown} ({check.rule.limits}). {check.todo}")
    return found


def _directions(directions: Mapping[str, Any], layers: Sequence[int], add: Any) -> None:
    health = directions["health"]
    for key, figure in (
        ("contrast", "contrast"),
        ("split_half", "split_half_cosine"),
        ("sign_agreement", "sign_agreement"),
        ("cos_mean_difference", "cos_mean_difference"),
    ):
        values = {
            name: max(figures[figure]) if key == "contrast" else fmean(figures[figure][i] for i in layers)
            for name, figures in health.items()
            if figure in figures
        }
        if values:
            worst = min(values, key=values.__getitem__)
            add(key, values[worst], worst if len(values) > 1 else "")
    names, cosines = directions["names"], directions["cosines"]
    pairs = [(abs(cosines[a][b]), names[a], names[b]) for a in range(len(names)) for b in range(a)]
    if pairs:
        most, a, b = max(pairs)
        add("distinct", most, f"{b}, {a}")


def _pairs(pairs: Mapping[str, Any], add: Any) -> None:
    add("identical_common" if pairs["same_draws"] else "identical", pairs["identical"])
    ratio = pairs["length_ratio"]
    longer = "chosen" if ratio >= 1 else "rejected"
    if ratio > 0:
        add("length", max(ratio, 1 / ratio), f"{longer} longer")
    for key in ("cut_off", "empty", "repetition"):
        side = max(("chosen", "rejected"), key=lambda s: pairs[s][key])
        add(key, pairs[side][key], side if pairs[side][key] else "")
    share = pairs["chosen_longer"]
    add("longer", max(share, 1 - share), "chosen" if share >= 0.5 else "rejected")


def _effect(effect: Mapping[str, Any], add: Any) -> None:
    loss = effect["loss"]
    side = max(loss, key=loss.__getitem__)
    add("fluency", loss[side], side)
    of = f"{effect['pairs']} pairs looked at"
    if effect["agreement"] is not None:
        add("agreement", effect["agreement"]["chosen_higher"], of)
    add("projection", effect["projection"]["chosen_higher"], of)
