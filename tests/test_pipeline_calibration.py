"""Calibration: the rule on ladders made by hand, its resampling, the ladder itself, and its picture."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from icon2_rt import Runtime
from icon2_rt.pipeline import calibrate, quality
from icon2_rt.pipeline.calibrate import CUT_OFF_GAIN, FLUENCY_LOSS, Ladder, Rule, Rung, best, choose
from icon2_rt.pipeline.config import CalibrationConfig, PairsConfig
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.directions import extract
from icon2_rt.pipeline.instructions import Instruction
from icon2_rt.pipeline.judges import verdicts
from icon2_rt.pipeline.ladder_plot import ladder_svg
from icon2_rt.pipeline.loading import end_tokens
from icon2_rt.pipeline.pairs import Kept
from icon2_rt.pipeline.templates import ChatFrame, chat_frame
from icon2_rt.steering import DirectionSet
from icon2_rt.tiny import CRITERIA, path, world

RULE = Rule()


def _rung(dose: float, marks: Sequence[float], logprob: float = -1.0, cut_off: float = 0.0, kl: float = 0.0) -> Rung:
    n = len(marks)
    return Rung(dose, 10 * dose, tuple(marks), (logprob,) * n, (kl,) * n, (cut_off,) * n)


def _ladder(*rungs: Rung, band: str = "middle") -> Ladder:
    return Ladder(band, (1, 2), (1.0, 1.0), tuple(sorted(rungs, key=lambda rung: rung.dose)))


BASE = _rung(0.0, [0.0] * 20)


def test_the_highest_fluent_quality_and_the_mildest_clear_negative() -> None:
    """The paper's rule: γ⁺ by the mean; γ⁻ the best mean among those that the positive beats in over 90 %."""
    ladder = _ladder(
        BASE,
        _rung(0.05, [0.1] * 20),
        _rung(0.1, [0.3] * 20),
        _rung(0.2, [0.9] * 20, logprob=-1.0 - 2 * FLUENCY_LOSS),  # the best, but broken
        _rung(-0.05, [0.0] * 10 + [0.5] * 10),  # mild: loses in half of them only
        _rung(-0.1, [-0.1] * 20),
        _rung(-0.2, [-0.8] * 20),
    )
    choice = choose(ladder, RULE)
    assert (choice.positive.dose, choice.negative.dose) == (0.1, -0.1)
    assert choice.positive.gamma == 1.0
    assert (choice.better, choice.better_held_out, choice.ties, choice.notes) == (1.0, 1.0, 0.0, ())
    assert choice.fluent == (True,) * 6 + (False,)


def test_exactly_ninety_percent_is_not_more() -> None:
    ladder = _ladder(BASE, _rung(0.1, [1.0] * 20), _rung(-0.1, [0.0] * 18 + [2.0] * 2), _rung(-0.2, [-1.0] * 20))
    assert choose(ladder, RULE).negative.dose == -0.2
    assert choose(ladder, Rule(better=0.89)).negative.dose == -0.1


def test_ties_are_left_out_as_long_as_they_are_not_most() -> None:
    """With common random numbers a mild push leaves most texts as they are."""
    same, worse = [0.5], [0.0]
    ladder = _ladder(
        BASE,
        _rung(0.1, [0.5] * 20),
        _rung(-0.05, same * 7 + worse * 13),
        _rung(-0.1, same * 6 + worse * 14),
        _rung(-0.2, same * 2 + worse * 18),
    )
    choice = choose(ladder, RULE)
    assert (choice.negative.dose, choice.better, choice.ties) == (-0.1, 1.0, 0.3)


def test_without_a_clear_negative_the_one_with_the_lowest_quality_is_taken_and_told() -> None:
    ladder = _ladder(
        BASE,
        _rung(0.1, [0.1] * 20),
        _rung(-0.1, [0.2] * 10 + [0.0] * 10),
        _rung(-0.2, [0.2] * 6 + [0.1] * 4 + [0.0] * 10),
    )
    choice = choose(ladder, RULE)
    assert choice.negative.dose == -0.2
    assert choice.better == pytest.approx(10 / 16)
    assert choice.ties == pytest.approx(4 / 20)
    assert "the one with the lowest quality" in choice.notes[0]


def test_without_a_fluent_rung_the_smallest_is_taken_and_told() -> None:
    ladder = _ladder(
        BASE,
        _rung(0.1, [0.5] * 20, logprob=-5.0),
        _rung(0.2, [0.9] * 20, logprob=-5.0),
        _rung(-0.1, [-1.0] * 20),
        _rung(-0.2, [-2.0] * 20),
    )
    choice = choose(ladder, RULE)
    assert choice.positive.dose == 0.1
    assert "no positive dose leaves the text fluent" in choice.notes[0]
    assert choose(ladder, Rule(fluency_loss=None)).positive.dose == 0.2


def test_running_into_the_token_limit_is_not_fluent() -> None:
    endless = _rung(0.2, [0.9] * 20, cut_off=2 * CUT_OFF_GAIN)
    choice = choose(_ladder(BASE, _rung(0.1, [0.1] * 20), endless, _rung(-0.1, [-0.1] * 20)), RULE)
    assert choice.positive.dose == 0.1
    assert choice.fluent[-1] is False


def test_fluency_is_relative_to_the_unsteered_rung() -> None:
    """A model that often runs into the limit, and writes unlikely text, is not blamed on the steering."""
    base = _rung(0.0, [0.0] * 20, logprob=-3.0, cut_off=0.2)
    ladder = _ladder(
        base,
        _rung(0.1, [0.1] * 20, logprob=-3.0 - FLUENCY_LOSS / 2, cut_off=0.22),
        _rung(0.2, [0.9] * 20, logprob=-3.0, cut_off=0.3),
        _rung(0.3, [0.9] * 20, logprob=-3.0 - 2 * FLUENCY_LOSS, cut_off=0.2),
        _rung(-0.1, [-0.1] * 20, logprob=-3.0, cut_off=0.2),
    )
    choice = choose(ladder, RULE)
    assert choice.fluent == (True, True, True, False, False)
    assert choice.positive.dose == 0.1


def test_a_bound_on_the_divergence_stops_the_ladder() -> None:
    ladder = _ladder(BASE, _rung(0.1, [0.1] * 20, kl=0.1), _rung(0.2, [0.9] * 20, kl=0.4), _rung(-0.1, [-0.1] * 20))
    assert choose(ladder, RULE).positive.dose == 0.2
    assert choose(ladder, Rule(max_divergence=0.2)).positive.dose == 0.1


def test_equal_quality_takes_the_smaller_dose() -> None:
    flat = [_rung(dose, [0.2] * 20) for dose in (0.2, 0.1)] + [_rung(dose, [-0.2] * 20) for dose in (-0.2, -0.1)]
    choice = choose(_ladder(BASE, *flat), RULE)
    assert (choice.positive.dose, choice.negative.dose) == (0.1, -0.1)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_half_a_ladder_is_refused(missing: int) -> None:
    rungs = [BASE, _rung(0.1, [0.1] * 20), _rung(-0.1, [-0.1] * 20)]
    del rungs[missing]
    with pytest.raises(ValueError, match="unsteered rung"):
        choose(_ladder(*rungs), RULE)


def _noisy(n: int, seed: int = 0) -> Ladder:
    """A ladder whose quality rises with the dose, with noise of the size of the steps."""
    generator = torch.Generator().manual_seed(seed)
    doses = (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)
    noise = 0.3 * torch.randn(len(doses), n, generator=generator, dtype=torch.double)
    return _ladder(
        *(_rung(d, (3 * d - 8 * max(0, d - 0.1) ** 2 + e).tolist()) for d, e in zip(doses, noise, strict=True))
    )


def test_intervals_come_from_resampling_the_instructions() -> None:
    """The interval of a mean is as wide as theory says, and the interval of the choice holds it."""
    small, large = choose(_noisy(25), RULE), choose(_noisy(400), RULE)
    for choice, n in ((small, 25), (large, 400)):
        for rung, (low, high) in zip(choice.ladder.rungs, choice.intervals["quality"], strict=True):
            mean = fmean(rung.quality)
            deviation = torch.tensor(rung.quality).std(unbiased=False).item() / math.sqrt(n)
            assert low < mean < high
            assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.2)
        for side in ("positive", "negative"):
            low, high = choice.intervals[side]
            assert low <= getattr(choice, side).dose <= high
        low, high = choice.intervals["better"]
        assert low <= choice.better <= high
    assert choose(_noisy(25), RULE, seed=0).intervals == small.intervals


def test_held_out_is_less_flattering_than_the_choice_itself() -> None:
    """On pure noise the chosen rungs look good on the instructions that chose them, and only there."""
    inside, outside = [], []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        marks = torch.randn(9, 40, generator=generator)
        doses = [d / 10 for d in range(-4, 5)]
        choice = choose(_ladder(*(_rung(d, m.tolist()) for d, m in zip(doses, marks, strict=True))), RULE)
        inside.append(choice.better)
        outside.append(choice.better_held_out)
    assert fmean(inside) > 0.55
    assert fmean(outside) == pytest.approx(0.5, abs=0.04)


def test_each_half_is_judged_with_what_the_other_half_chose() -> None:
    """Even rows choose the small dose, which wins in 4 of the 10 odd ones; odd rows the large one, which wins in 1."""
    small = [[1.0, 1.0 if row < 8 else 0.0][row % 2] for row in range(20)]
    large = [[1.0 if row < 2 else 0.0, 1.0][row % 2] for row in range(20)]
    ladder = _ladder(BASE, _rung(0.1, small), _rung(0.2, large), _rung(-0.1, [0.5] * 20))
    choice = choose(ladder, RULE)
    assert choice.positive.dose == 0.1
    assert choice.better == pytest.approx(14 / 20)
    assert choice.better_held_out == pytest.approx(5 / 20)
    first = choose(ladder, RULE, rows=range(10))  # of some rows alone, the halves are of those
    assert first.better_held_out == pytest.approx((4 + 1) / 10)


def test_the_band_that_reaches_the_rule_with_the_best_positive() -> None:
    def ladder(band: str, up: float, clear: bool) -> Ladder:
        down = [-1.0] * 20 if clear else [-1.0] * 12 + [5.0] * 8
        return _ladder(BASE, _rung(0.1, [up] * 20), _rung(-0.1, down), band=band)

    choices = [choose(ladder(*args), RULE) for args in (("a", 0.9, False), ("b", 0.2, True), ("c", 0.4, True))]
    assert best(choices, RULE).ladder.band == "c"
    assert best(choices[:1], RULE).ladder.band == "a"


def test_a_criterion_of_its_own_where_there_are_enough_instructions() -> None:
    """Two criteria want different doses; the third has too few instructions to say."""
    items = [Kept(Instruction(i, "x"), name, 0.0, None, {}) for i, name in enumerate("a" * 10 + "b" * 10 + "c" * 3)]
    ladder = _ladder(
        _rung(0.0, [0.0] * 23),
        _rung(0.1, [0.5] * 10 + [0.1] * 13),
        _rung(0.2, [0.1] * 10 + [0.9] * 13),
        _rung(-0.1, [-1.0] * 23),
    )
    choice = choose(ladder, RULE)
    found = calibrate.per_criterion(choice, items, ["a", "b", "c"], RULE)
    assert {name: c.positive.dose for name, c in found.items()} == {"a": 0.1, "b": 0.2, "c": 0.2}
    assert found["c"] is choice


def test_a_judge_that_reads_the_text_is_not_bound_by_fluency() -> None:
    assert Rule.of(CalibrationConfig()).fluency_loss == FLUENCY_LOSS
    assert Rule.of(CalibrationConfig(quality="projection")).fluency_loss == FLUENCY_LOSS
    assert Rule.of(CalibrationConfig(judge="mine:judge")).fluency_loss is None
    assert Rule.of(CalibrationConfig(judge="r", fluency_loss=0.3, better=0.8)) == Rule(0.3, None, 0.8)


# --- the ladder on the shipped model ---------------------------------------------------------------------------------

Tiny = tuple[Runtime, ChatFrame, dict[str, Criterion], DirectionSet, list[Kept]]


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    rt = Runtime.from_pretrained(path())
    frame = chat_frame(rt.tokenizer, end_tokens(rt))
    criteria = {name: Criterion(*CRITERIA[name]) for name in ("honesty", "harmlessness")}
    texts = [Instruction(i, text) for i, text in enumerate(world.sample_instructions(24, seed=5))]
    directions = extract(rt, frame, criteria, texts[:16])
    kept = [Kept(text, "honesty" if i % 2 else "harmlessness", 0.0, None, {}) for i, text in enumerate(texts[16:])]
    return rt, frame, criteria, directions, kept


def test_a_ladder_is_what_the_engine_says(tiny: Tiny) -> None:
    """Every figure of a rung against the runtime asked for that rung alone: bands, profile, judge, divergence."""
    rt, frame, _, directions, items = tiny
    config, pairs = CalibrationConfig(doses=(0.1,)), PairsConfig(unit="dose", temperature=0, max_new_tokens=24)
    norms = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]

    def length(instructions: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(len(response)) for response in responses]

    bands = {"1:3": (1, 2), "2:4": (2, 3)}
    ladders = calibrate.climb(rt, frame, items, directions, bands, norms, length, config, pairs, end_tokens(rt), seed=0)
    assert [(ladder.band, ladder.layers) for ladder in ladders] == list(bands.items())
    chats = [frame.messages(item.instruction.text) for item in items]
    for ladder in ladders:
        norm = fmean(norms[i] for i in ladder.layers)
        assert [rung.dose for rung in ladder.rungs] == [-0.1, 0.0, 0.1]
        for rung in ladder.rungs:
            assert rung.gamma == pytest.approx(rung.dose * norm)
            strength = [rung.dose * norms[i] if i in ladder.layers else 0.0 for i in range(6)]
            steering = [strength * directions[item.criterion] for item in items] if rung.dose else None
            alone = rt.generate(chats, steering, do_sample=False, max_new_tokens=24)
            assert rung.quality == tuple(len(completion.text or "") for completion in alone)
            plain = [fmean(s.logprobs) for s in rt.score(chats, alone)]
            assert rung.logprob == pytest.approx(plain, abs=1e-3)
            own = [fmean(completion.logprobs) for completion in alone]
            assert rung.divergence == pytest.approx([a - b for a, b in zip(own, plain, strict=True)], abs=1e-3)
            assert rung.cut_off == tuple(float(completion.finish_reason == "length") for completion in alone)


def test_the_self_contained_measures_know_a_good_response_from_a_bad_one(tiny: Tiny) -> None:
    """On responses whose quality is known: what was written under the positive prompt, and under the negative one."""
    rt, frame, criteria, directions, items = tiny
    instructions, names = [item.instruction.text for item in items], [item.criterion for item in items]

    def written(which: str) -> list[str]:
        chats = [frame.messages(t, getattr(criteria[n], which)) for t, n in zip(instructions, names, strict=True)]
        return [completion.text or "" for completion in rt.generate(chats, do_sample=False, max_new_tokens=48)]

    good, bad = written("positive"), written("negative")
    agreement = quality.agreement(rt, frame, criteria, names)
    for judge in (agreement, quality.projection(rt, frame, directions, (1, 2, 3), names)):
        assert fmean(verdicts(judge, instructions, good)) > fmean(verdicts(judge, instructions, bad))
    assert agreement(instructions, ["", *good[1:]])[0] == 0.0


def test_the_picture_is_a_whole_svg_with_every_rung() -> None:
    choices = [choose(replace(_noisy(25, seed), band=band), RULE) for seed, band in enumerate(("1:4", "1:5"))]
    calibration = {"quality": "agreement", **choices[0].to_dict(), "bands": [choice.to_dict() for choice in choices]}
    root = ElementTree.fromstring(ladder_svg(calibration))
    name = "{http://www.w3.org/2000/svg}"
    css = str(root.findtext(f"{name}style"))
    assert "var(" not in css and "#0072b2" in css  # any viewer knows the colours
    legend, charts = root.findall(f"{name}circle"), root.findall(f"{name}svg")
    assert len(legend) == len(choices) and len(charts) == 2
    text = [element.text or "" for element in root.iter(f"{name}text")]
    assert sum("(chosen)" in words for words in text) == 1
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for chart in charts:
        circles = chart.findall(f"{name}circle")
        kinds = Counter(circle.attrib["class"].split()[0] for circle in circles)
        broken = sum(not fluent for choice in choices for fluent in choice.fluent)
        assert kinds == Counter({"dot": 2 * 7 - broken, "hollow": broken, "ring": 4})
        assert sum("γ⁺" in (element.text or "") for element in chart.iter(f"{name}text")) == 2
        assert float(chart.attrib["y"]) + float(chart.attrib["height"]) <= height
        assert all(0 <= float(c.attrib["cx"]) <= width for c in circles)
        assert all(0 <= float(c.attrib["cy"]) <= float(chart.attrib["height"]) for c in circles)
