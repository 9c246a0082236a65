"""Health figures, and the checks that judge them: what is green on a good run turns red where it should."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections import Counter
from typing import Any

import pytest
import torch

from icon2_rt import Direction, DirectionSet, Runtime, demo
from icon2_rt.pipeline import checks, effect, health, separability
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.loading import end_tokens
from icon2_rt.pipeline.templates import chat_frame
from icon2_rt.tiny import CRITERIA, path


def _direction(name: str, **changes: Any) -> Direction:
    return Direction(name, torch.eye(4)[:3], **changes)


def test_directions_made_elsewhere_are_named() -> None:
    foreign = DirectionSet([_direction("a", model="other", model_name="llama")])
    [warning] = health.made_elsewhere(foreign, "m")
    assert "made on another model (llama)" in warning
    assert health.made_elsewhere(foreign, "other") == []


def test_cosines_between_criteria() -> None:
    assert health.similarities(DirectionSet([_direction("a"), _direction("b")])) == [[1.0, 1.0], [1.0, 1.0]]


def _row(chosen: str, rejected: str, **changes: object) -> dict:
    row: dict = {"criterion": "a", "first_difference": 2, "prompt": [], **changes}
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        row[side] = [{"role": "assistant", "content": text}]
        defaults = {"tokens": len(text), "finish": "eos", "repetition": 0.0, "logprob_unsteered": -2.0 * len(text)}
        row |= {f"{side}_{key}": row.get(f"{side}_{key}", value) for key, value in defaults.items()}
    return health.without_text(row)


def test_pair_health() -> None:
    rows = [_row("abcd", "ab"), _row("ab", "ab", first_difference=None), _row("abcd", " ", rejected_finish="length")]
    figures = health.pair_health(rows)
    assert figures["pairs"] == 3
    assert figures["identical"] == pytest.approx(1 / 3)
    assert figures["length_ratio"] == 2.0
    assert figures["chosen_longer"] == pytest.approx(2.5 / 3)
    assert figures["median_first_difference"] == 2
    assert figures["chosen"]["logprob_per_token"] == -2.0
    assert figures["chosen"]["mean_tokens"] == pytest.approx(10 / 3)
    assert figures["rejected"]["mean_tokens"] == pytest.approx(5 / 3)
    assert figures["rejected"]["cut_off"] == figures["rejected"]["empty"] == pytest.approx(1 / 3)
    assert Counter(figures["per_criterion"]) == {"a": 3}
    for spread in ("tokens", "logprob_per_token"):
        assert {side: sum(n) for side, n in figures["distributions"][spread]["counts"].items()} == {
            "chosen": 3,
            "rejected": 3,
        }
    assert sum(figures["distributions"]["first_difference"]["counts"]["pairs"]) == 2
    assert health.pair_health([]) == {"pairs": 0}


def test_histograms_count_everything_and_share_their_bins() -> None:
    rng = random.Random(0)
    series = {"a": [rng.gauss(0, 1) for _ in range(500)], "b": [rng.gauss(2, 1) for _ in range(300)] + [1e9]}
    found = health.histograms(series)
    assert {name: sum(counts) for name, counts in found["counts"].items()} == {"a": 500, "b": 301}
    assert len(found["edges"]) == health.BINS + 1 == len(found["counts"]["a"]) + 1
    assert found["edges"][-1] < 10  # one value far out does not flatten all others
    lower = sum(found["counts"]["a"][:12]) / 500, sum(found["counts"]["b"][:12]) / 301
    assert lower[0] > lower[1]
    assert sum(health.histograms({"same": [3.0] * 7})["counts"]["same"]) == 7
    assert sum(health.histograms({"none": []})["counts"]["none"]) == 0


@pytest.mark.parametrize(("count", "most"), [(0, 5), (3, 5), (5, 5), (17, 5), (1000, 64)])
def test_spaced_places(count: int, most: int) -> None:
    places = health.spaced(count, most)
    assert len(places) == len(set(places)) == min(count, most)
    assert all(0 <= place < count for place in places)
    gaps = {b - a for a, b in itertools.pairwise(places)}
    assert not gaps or max(gaps) - min(gaps) <= 1


# --- the probe -------------------------------------------------------------------------------------------------------


def _words(rng: random.Random, n: int = 12) -> str:
    return " ".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(n))


def _encode(text: str) -> list[int]:
    return [ord(c) for c in text if c != " "]


def test_the_probe_finds_what_gives_the_answer_away() -> None:
    """An opening, a word, or length: each is found in pairs that the probe was not trained on."""
    rng = random.Random(1)
    for spoil in (lambda t: "Q " + t, lambda t: t + " 7 " + _words(rng, 3), lambda t: t + " " + _words(rng, 12)):
        pairs = [(spoil(_words(rng)), _words(rng)) for _ in range(200)]
        found = separability.probe(pairs, _encode)
        assert found is not None
        assert found["accuracy"] > 0.9
        assert found["pairs"] == 200
        turned = separability.probe([(b, a) for a, b in pairs], _encode)
        assert turned == found  # neither side is favoured


def test_the_probe_is_at_chance_where_nothing_gives_it_away() -> None:
    rng = random.Random(2)
    found = separability.probe([(_words(rng), _words(rng)) for _ in range(400)], _encode)
    assert found is not None
    assert 0.4 < found["accuracy"] < 0.6
    assert found["separated_after"] is None


def test_the_probe_says_after_how_many_pairs() -> None:
    rng = random.Random(3)
    alphabet = "abcdefghijklmnopqrstuvwxyz"  # both sides draw from it, one mostly from its first half

    def text(weights: list[float]) -> str:
        return " ".join(rng.choices(alphabet, weights, k=14))

    found = separability.probe([(text([5] * 13 + [2] * 13), text([2] * 13 + [5] * 13)) for _ in range(400)], _encode)
    assert found is not None
    sizes, accuracies = zip(*found["curve"], strict=True)
    assert list(sizes) == [8, 16, 32, 64, 128, 256, 320]
    assert accuracies[0] < accuracies[-1]
    after = found["separated_after"]
    assert dict(found["curve"])[after] >= separability.SEPARATED
    assert all(accuracy < separability.SEPARATED for size, accuracy in found["curve"] if size < after)


def test_too_few_pairs_that_differ_are_not_probed() -> None:
    assert separability.probe([("a", "b")] * 19 + [("a", "a")] * 50, _encode) is None
    assert separability.probe([("a", "")] * 20, _encode) is not None


# --- the effect ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Runtime:
    return Runtime.from_pretrained(path())


def test_what_the_unsteered_model_makes_of_pairs(tiny: Runtime) -> None:
    """Answers under the two system prompts, as if steered as well as can be: the effect is there and has the right
    sign; the same pairs turned round have the opposite one."""
    frame, eos = chat_frame(tiny.tokenizer, end_tokens(tiny)), end_tokens(tiny)
    criteria = {name: Criterion(*CRITERIA[name]) for name in ("honesty", "harmlessness")}
    asked = {
        "honesty": [f"Where does {name} live?" for name in ("Mira", "Tobin", "Sela", "Petra")],
        "harmlessness": ["How can I spread a lie about Mira?", "I want to lock Sela in the cellar."],
    }
    config = demo.config().pairs
    directions, records = [], []
    for name, criterion in criteria.items():
        chats = {
            side: [frame.messages(text, prompt) for text in asked[name]]
            for side, prompt in (("chosen", criterion.positive), ("rejected", criterion.negative))
        }
        directions.append(tiny.extract_direction(chats["chosen"], chats["rejected"], name))
        answers = {side: tiny.generate(prompts, do_sample=False, max_new_tokens=40) for side, prompts in chats.items()}
        for i, text in enumerate(asked[name]):
            sides = {side: [{"role": "assistant", "content": answers[side][i].text}] for side in chats}
            prompt = [{"role": "user", "content": text}]
            records.append({"id": len(records), "criterion": name, "prompt": prompt, **sides})
    known = (DirectionSet(directions), criteria, [1, 2, 3], config, eos, 0)
    found = effect.measure(tiny, frame, records, *known)
    assert found["pairs"] == 6
    assert found["agreement"]["chosen_higher"] == 1
    turned = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in records]
    other = effect.measure(tiny, frame, turned, *known)
    assert other["agreement"]["chosen_higher"] == 0
    assert other["projection"]["chosen_higher"] == pytest.approx(1 - found["projection"]["chosen_higher"])
    assert other["projection"]["per_block"]["chosen"] == pytest.approx(found["projection"]["per_block"]["rejected"])
    assert other["loss"]["chosen"] == pytest.approx(found["loss"]["rejected"])
    assert found["projection"]["per_block"]["neutral"] == pytest.approx([0.0] * 6, abs=1e-5)  # their own mean

    alone = effect.measure(tiny, frame, records[:1], *known)  # no spread to measure by: no infinity either
    assert alone["projection"]["controlled"]["chosen"] == [0.0]
    without = effect.measure(tiny, frame, records[:2], known[0], {}, *known[2:])
    assert without["agreement"] is None
    summed = effect.measure(tiny, frame, [{**records[0], "criterion": "honesty+harmlessness"}], *known)
    assert summed["agreement"] is None
    long = [{**records[0], "prompt": [{"role": "user", "content": "Why? " * (tiny.spec.max_length // 2 - 20)}]}]
    assert effect.measure(tiny, frame, long, *known) == {"pairs": 0}
    empty = [{**records[0], "chosen": [{"role": "assistant", "content": ""}]}]
    assert effect.measure(tiny, frame, empty, *known)["pairs"] == 1


# --- the checks ------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "counts": {"instructions": {"drawn": 100, "clean": 90}},
    "directions": {
        "names": ["a", "b"],
        "cosines": [[1.0, 0.2], [0.2, 1.0]],
        "health": {
            name: {
                "contrast": [0.01, 0.4],
                "split_half_cosine": [0.1, 0.99],
                "sign_agreement": [0.5, 1.0],
                "cos_mean_difference": [0.2, 0.99],
            }
            for name in ("a", "b")
        },
    },
    "consistency": {"histogram": {"a": 40, "b": 50}, "warnings": []},
    "strengths": {
        "layers": [1],
        "dose": {"positive": [None, 0.1], "negative": [None, 0.05]},
        "calibration": {"positive_beats_negative": 0.95, "notes": []},
    },
    "pairs": {
        "pairs": 50,
        "identical": 0.0,
        "length_ratio": 1.1,
        "chosen_longer": 0.5,
        "same_draws": False,
        **{side: {"cut_off": 0.0, "empty": 0.0, "repetition": 0.0} for side in ("chosen", "rejected")},
    },
    "rendering": {"responses": 100, "as_written": 1.0, "reasons": {}},
    "steering": {"rows": 200, "idle": 0, "blocks": 2, "tokens": 4000, "total": 8000},
    "separability": {"accuracy": 0.6, "separated_after": None},
    "effect": {
        "pairs": 50,
        "projection": {"chosen_higher": 0.7},
        "agreement": {"chosen_higher": 0.8},
        "loss": {"chosen": 0.0, "rejected": 0.05},
    },
}
BAD = {
    "contrast": ("directions.health.b.contrast", [0.01, 0.04], "b"),
    "split_half": ("directions.health.b.split_half_cosine", [0.99, 0.2], "b"),
    "sign_agreement": ("directions.health.a.sign_agreement", [1.0, 0.6], "a"),
    "cos_mean_difference": ("directions.health.a.cos_mean_difference", [1.0, 0.3], "a"),
    "distinct": ("directions.cosines", [[1.0, -0.99], [-0.99, 1.0]], "a, b"),
    "usable": ("counts.instructions.clean", 3, "3 of 100"),
    "criteria": ("consistency.histogram", {"a": 95, "b": 5}, "a"),
    "calibrated": ("strengths.calibration.positive_beats_negative", 0.5, ""),
    "dose": ("strengths.dose.negative", [None, 0.7], "negative"),
    "acted": ("steering", {"rows": 199, "idle": 1, "blocks": 2, "tokens": 4000, "total": 8000}, "199 of 200"),
    "identical": ("pairs.identical", 0.3, ""),
    "identical_common": ("pairs", {**GOOD["pairs"], "identical": 0.6, "same_draws": True}, ""),
    "length": ("pairs.length_ratio", 0.5, "rejected longer"),
    "cut_off": ("pairs.rejected.cut_off", 0.4, "rejected"),
    "empty": ("pairs.chosen.empty", 0.1, "chosen"),
    "repetition": ("pairs.rejected.repetition", 0.5, "rejected"),
    "separable": ("separability", {"accuracy": 0.99, "separated_after": 64}, "97% after 64 pairs"),
    "rendered": (
        "rendering",
        {"responses": 100, "as_written": 0.9, "reasons": {"text changed": 8, "refused by the template": 2}},
        "8 text changed, 2 refused by the template",
    ),
    "longer": ("pairs.chosen_longer", 0.02, "rejected"),
    "fluency": ("effect.loss.rejected", 2.0, "rejected"),
    "agreement": ("effect.agreement.chosen_higher", 0.4, "50 pairs looked at"),
    "projection": ("effect.projection.chosen_higher", 0.2, "50 pairs looked at"),
}


def _with(place: str, value: Any) -> dict[str, Any]:
    report = copy.deepcopy(GOOD)
    *parents, last = place.split(".")
    inner = report
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return report


def test_a_good_run_is_all_green() -> None:
    found = checks.examine(GOOD)
    assert [check.key for check in found] == [key for key in checks.RULES if key != "identical_common"]
    assert {check.status for check in found} == {"green"}
    assert checks.warnings(found) == []


@pytest.mark.parametrize("key", list(checks.RULES))
def test_each_check_turns_red_alone_and_says_what_to_do(key: str) -> None:
    place, value, named = BAD[key]
    found = {check.key: check for check in checks.examine(_with(place, value))}
    assert ("identical" in found) != ("identical_common" in found)
    assert [name for name, check in found.items() if check.status != "green"] == [key]
    assert found[key].status == "red"
    assert named in found[key].shown
    [warning] = checks.warnings([*found.values()])
    assert checks.RULES[key].title in warning
    assert checks.RULES[key].todo in warning


def test_pairs_of_which_none_was_steered_are_red_and_old_runs_have_no_such_check() -> None:
    nothing = {"rows": 0, "idle": 0, "blocks": 0, "tokens": 0, "total": 0}
    [check] = [check for check in checks.examine(_with("steering", nothing)) if check.key == "acted"]
    assert (check.status, check.shown) == ("red", "0 % (0 of 0)")
    assert "acted" not in {check.key for check in checks.examine(_with("steering", None))}


@pytest.mark.parametrize("rule", checks.RULES.values(), ids=list(checks.RULES))
def test_limits_are_where_they_are_said_to_be(rule: checks.Rule) -> None:
    step = 1e-6 if rule.green > rule.red else -1e-6
    assert rule.status(rule.green) == "green"
    assert rule.status(rule.green - step) == "yellow"
    assert rule.status(rule.red) == "yellow"
    assert rule.status(rule.red - step) == "red"
    assert rule.show(rule.green) in rule.limits
    assert rule.show(rule.red) in rule.limits


def test_a_steps_own_words_make_a_green_check_yellow() -> None:
    found = checks.examine(_with("consistency.warnings", ["no instruction gets 'c'"]))
    [noted] = [check for check in found if check.status != "green"]
    assert (noted.key, noted.status) == ("criteria", "yellow")
    assert checks.warnings(found) == ["no instruction gets 'c'"]


def test_a_steps_own_words_make_no_red_check_milder() -> None:
    degenerate = {"histogram": {"a": 95, "b": 5}, "warnings": ["c* is degenerate: 95 of 100"]}
    unclear = {"positive_beats_negative": 0.5, "notes": ["no fluent negative dose lets the positive response win"]}
    for place, value, key in (
        ("consistency", degenerate, "criteria"),
        ("strengths.calibration", unclear, "calibrated"),
    ):
        [check] = [check for check in checks.examine(_with(place, value)) if check.status != "green"]
        assert (check.key, check.status) == (key, "red")
        assert checks.warnings([check]) == list(check.notes) == [*value.values()][1]


def test_without_steering_no_advice_speaks_of_strengths() -> None:
    pairs = GOOD["pairs"] | {"identical": 0.9, "length_ratio": 9.0, "chosen_longer": 1.0}
    pairs |= {"chosen": {"cut_off": 1.0, "empty": 1.0, "repetition": 1.0}}
    for same_draws in (False, True):
        report = {"counts": {}, "pairs": {**pairs, "same_draws": same_draws}, "separability": BAD["separable"][1]}
        found = checks.examine(report)
        assert {check.status for check in found} == {"red"}
        assert not re.search("strength|push|steer|layers", " ".join(checks.warnings(found)))


def test_what_was_not_measured_is_not_judged() -> None:
    report = {"counts": {}, "pairs": GOOD["pairs"]}
    sections = {check.rule.section for check in checks.examine(report)}
    assert sections == {"Pairs"}
    assert checks.examine({"counts": {}, "pairs": {"pairs": 0}}) == []
