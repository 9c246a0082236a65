"""The consistency score and the filter, against the formulas written out; hygiene; figures over pairs."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest
import torch

from icon2_rt import Completion, Direction, DirectionSet, Runtime
from icon2_rt.pipeline import consistency, health
from icon2_rt.pipeline.config import FilterConfig, InstructionsConfig
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.directions import extract
from icon2_rt.pipeline.instructions import Instruction, clean, read_instructions, without_duplicates
from icon2_rt.pipeline.loading import end_tokens
from icon2_rt.pipeline.pairs import Strengths, first_difference, repetition, residual_profile
from icon2_rt.pipeline.sampling import neutral, stage_seed
from icon2_rt.pipeline.templates import chat_frame
from icon2_rt.tiny import CRITERIA, oracle, path, world
from tests.models import tiny_tokenizer

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def tiny():  # type: ignore[no-untyped-def]
    rt = Runtime.from_pretrained(path())
    return rt, chat_frame(rt.tokenizer, end_tokens(rt))


def _projections(n: int = 40, seed: int = 0) -> torch.Tensor:
    return (
        torch.randn(n, 3, 5, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1.0, 3.0, 1.0])[:, None] + 1
    )


def test_raw_is_the_mean_over_blocks() -> None:
    projected = _projections()
    verdict = consistency.judge(projected, NAMES)
    for i, row in enumerate(projected.tolist()):
        scores = [statistics.fmean(blocks) for blocks in row]
        assert verdict.scores[i].tolist() == pytest.approx(scores, abs=1e-6)
        assert verdict.best[i] == max(range(3), key=scores.__getitem__)
        assert verdict.score[i] == pytest.approx(max(scores), abs=1e-6)
        assert verdict.margin[i] == pytest.approx(sorted(scores)[-1] - sorted(scores)[-2], abs=1e-5)
    assert sum(verdict.histogram.values()) == 40


def test_zscore_brings_every_block_and_criterion_to_one_scale() -> None:
    projected = _projections()
    scores = consistency.judge(projected, NAMES, "zscore").scores
    for c in range(3):
        columns = [[row[c][layer] for row in projected.tolist()] for layer in range(5)]
        for i in range(40):
            z = [(column[i] - statistics.fmean(column)) / statistics.pstdev(column) for column in columns]
            assert float(scores[i, c]) == pytest.approx(statistics.fmean(z), abs=1e-5)


def test_zscore_does_not_see_scale_or_offset() -> None:
    projected = _projections()
    moved = projected * torch.tensor([5.0, 0.1, 2.0])[:, None] + torch.tensor([100.0, -3.0, 0.0])[:, None]
    assert torch.equal(
        consistency.judge(projected, NAMES, "zscore").best, consistency.judge(moved, NAMES, "zscore").best
    )
    assert set(consistency.judge(moved, NAMES).best.tolist()) == {0}  # raw is decided by the offset


def test_contrast_is_relative_to_the_criterion_s_mean() -> None:
    contrasts = _projections().abs()
    scores = consistency.judge(contrasts, NAMES, "contrast").scores
    for c in range(3):
        column = [statistics.fmean(row[c]) for row in contrasts.tolist()]
        expected = [value / statistics.fmean(column) for value in column]
        assert scores[:, c].tolist() == pytest.approx(expected, abs=1e-5)
    louder = contrasts * torch.tensor([7.0, 0.1, 1.0])[:, None]
    assert torch.equal(
        consistency.judge(louder, NAMES, "contrast").best, consistency.judge(contrasts, NAMES, "contrast").best
    )


def test_contrast_of_a_criterion_that_moves_nothing_is_zero() -> None:
    contrasts = _projections().abs()
    contrasts[:, 1] *= -1  # its prompts move the instructions against its own direction
    verdict = consistency.judge(contrasts, NAMES, "contrast")
    assert verdict.scores[:, 1].abs().max() == 0
    assert verdict.histogram["b"] == 0
    assert any(w.startswith("'b': all scores are 0") for w in consistency.warnings(verdict))


def test_contrasts_read_an_instruction_under_both_system_prompts(tiny) -> None:  # type: ignore[no-untyped-def]
    """Against the states themselves, and against the oracle of the tiny model's world: c* is what the text is about."""
    rt, frame = tiny
    criteria = {name: Criterion(*prompts) for name, prompts in CRITERIA.items() if name != "general"}
    rng = random.Random(0)
    texts = [world.sample_instruction(rng) for _ in range(40)]
    instructions = [Instruction(i, getattr(text, "text", text)) for i, text in enumerate(texts)]
    directions = extract(rt, frame, criteria, instructions[:20])
    contrasts = consistency.contrasts(rt, frame, instructions, directions, criteria)
    for c, d in enumerate(directions):
        states = [
            rt.hidden_states([frame.messages(item.text, system=system) for item in instructions])
            for system in (criteria[d.name].positive, criteria[d.name].negative)
        ]
        expected = ((states[0] - states[1]) * d.vectors).sum(dim=-1)
        torch.testing.assert_close(contrasts[:, c], expected, atol=1e-3, rtol=1e-4)
    verdict = consistency.judge(contrasts, directions.names, "contrast")
    about = [world.CRITERION_OF_KIND[oracle.judge(item.text, "").kind] for item in instructions]
    right = sum(verdict.names[best] == kind for best, kind in zip(verdict.best.tolist(), about, strict=True))
    assert right >= 36  # of 40


@pytest.mark.parametrize("system", [None, "You are an honest assistant."])
def test_the_common_beginning_is_prefilled_once(tiny, system: str | None, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Whatever all chats begin with is a pinned prefix, and the figures are those of the whole chats."""
    rt, frame = tiny
    instructions = [Instruction(i, text) for i, text in enumerate(world.sample_instructions(12, seed=3))]
    directions = DirectionSet([Direction("d", torch.randn(rt.spec.n_layers, rt.spec.hidden_size))])
    pinned: list[int] = []
    real = Runtime.prefix
    monkeypatch.setattr(Runtime, "prefix", lambda self, start: pinned.append(len(start)) or real(self, start))
    found = consistency._project(rt, frame, instructions, system, list(directions))
    assert len(pinned) == 1
    assert pinned[0] >= len(rt.encode(frame.messages("a", system=system))) - 8
    chats = [frame.messages(item.text, system=system) for item in instructions]
    torch.testing.assert_close(found, rt.project(chats, directions), atol=1e-3, rtol=1e-4)
    one = consistency._project(rt, frame, instructions[:1], system, list(directions))
    torch.testing.assert_close(one, found[:1], atol=1e-3, rtol=1e-4)


def test_a_function_gives_the_scores() -> None:
    projected, texts = _projections(), [f"text {i}" for i in range(40)]

    def length(instructions: list[str], projections: torch.Tensor, names: list[str]) -> list[list[float]]:
        assert instructions == texts and names == NAMES and torch.equal(projections, projected)
        return [[float(i % 3 == column) for column in range(3)] for i in range(len(instructions))]

    verdict = consistency.judge(projected, NAMES, length, texts)
    assert verdict.best.tolist() == [i % 3 for i in range(40)]
    assert verdict.score.tolist() == [1.0] * 40
    assert verdict.margin.tolist() == [1.0] * 40


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[0.0] * 2] * 40, r"scores \[40 instructions, 3 criteria\], not of shape \[40, 2\]"),
        ([[0.0, 0.0, math.nan]] * 40, "score of instruction 0 under 'c' is nan: 'text 0'"),
        ("high", "a number per instruction and criterion"),
    ],
)
def test_a_function_that_gives_no_scores_is_refused(scores: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"filter.scale: .*{message}"):
        consistency.judge(_projections(), NAMES, lambda *_: scores, [f"text {i}" for i in range(40)])


def test_zscore_of_a_block_without_spread_is_zero() -> None:
    projected = _projections()
    projected[:, :, 2] = 7.0
    scores = consistency.judge(projected, NAMES, "zscore").scores
    assert torch.isfinite(scores).all()
    assert consistency.judge(projected[:1], NAMES, "zscore").scores.abs().max() == 0


def test_bad_projections() -> None:
    with pytest.raises(ValueError, match=r"\[instructions, 3 criteria, blocks\]"):
        consistency.judge(torch.zeros(4, 2, 5), NAMES)
    with pytest.raises(ValueError):
        consistency.judge(torch.zeros(0, 3, 5), NAMES)
    projected = _projections()
    projected[7, 1, 1] = math.nan
    with pytest.raises(ValueError, match="instruction 7"):
        consistency.judge(projected, NAMES)
    with pytest.raises(ValueError, match="scale"):
        consistency.judge(_projections(), NAMES, "rank")


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.5, 1.0])
def test_the_best_share_is_kept(keep: float) -> None:
    verdict = consistency.judge(_projections(), NAMES)
    rows = consistency.select(verdict, FilterConfig(keep=keep))
    assert len(rows) == max(1, round(40 * keep))
    assert rows == sorted(set(rows))
    left = set(range(40)) - set(rows)
    if left:
        assert min(verdict.score[rows]) >= max(verdict.score[list(left)])


def test_margin_and_ties() -> None:
    verdict = consistency.judge(_projections(), NAMES)
    rows = consistency.select(verdict, FilterConfig(keep=1.0, margin=1.0))
    assert rows == [i for i in range(40) if verdict.margin[i] >= 1.0]
    assert consistency.select(verdict, FilterConfig(keep=1.0, margin=1e9)) == []
    equal = consistency.judge(torch.ones(10, 3, 5), NAMES)
    assert consistency.select(equal, FilterConfig(keep=0.3)) == [0, 1, 2]


def test_keep_is_a_share_of_all_and_a_margin_may_be_met_exactly() -> None:
    score, margin = torch.tensor([5.0, 1, 8, 2, 7, 3, 6, 4]), torch.tensor([1.0, 1, 0.5, 2, 1, 0, 0.99, 3])
    verdict = consistency.Consistency(["a", "b"], torch.zeros(8, 2), torch.zeros(8).long(), score, margin)
    assert consistency.select(verdict, FilterConfig(keep=1.0, margin=1.0)) == [0, 1, 3, 4, 7]
    assert consistency.select(verdict, FilterConfig(keep=0.5, margin=1.0)) == [0, 3, 4, 7]  # half of 8, not of 5
    assert consistency.select(verdict, FilterConfig(keep=0.25, margin=1.0)) == [0, 4]


def test_one_criterion_has_no_margin() -> None:
    verdict = consistency.judge(_projections()[:, :1], ["a"])
    assert verdict.histogram == {"a": 40}
    assert torch.isinf(verdict.margin).all()
    assert consistency.warnings(verdict) == []
    assert len(consistency.select(verdict, FilterConfig(keep=0.5, margin=3.0))) == 20


def test_a_degenerate_choice_is_told() -> None:
    projected = _projections()
    assert consistency.warnings(consistency.judge(projected, NAMES, "zscore")) == []
    projected[:, 1] += 100
    first, second = consistency.warnings(consistency.judge(projected, NAMES))
    assert "degenerate: 40 of 40 instructions get 'b'" in first
    assert "'a', 'c'" in second
    [two, none] = consistency.warnings(consistency.judge(projected[:, :2], NAMES[:2]))
    assert "40 of 40 instructions get 'b'" in two and "no instruction gets 'a'" in none


def test_a_given_criterion_is_respected() -> None:
    verdict = consistency.judge(_projections(), NAMES)
    forced = consistency.with_given(verdict, ["c", *[None] * 39])
    assert forced.best[0] == 2
    assert forced.score[0] == verdict.scores[0, 2]
    assert forced.margin[0] == verdict.scores[0, 2] - max(verdict.scores[0, :2])
    assert torch.equal(forced.best[1:], verdict.best[1:])
    assert consistency.with_given(verdict, [None] * 40) is verdict


def _completion(text: str, finish: str = "eos") -> Completion:
    ids = tiny_tokenizer().encode(text, add_special_tokens=False)
    return Completion(text, ids, [0.0] * len(ids), finish, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "config", "expected"),
    [
        (_completion("  Why?\n<|end|>"), {}, ("Why?", None)),
        (_completion(" \n<|end|>"), {}, ("", "empty")),
        (_completion("Why", "length"), {}, ("", "truncated")),
        (_completion("Why<|user|>?<|end|>"), {}, ("", "special")),
        (_completion("Why?<|end|>"), {"min_chars": 5}, ("", "length")),
        (_completion("Why?<|end|>"), {"max_chars": 3}, ("", "length")),
        (_completion("Why?<|end|>"), {"min_chars": 4, "max_chars": 4}, ("Why?", None)),
    ],
)
def test_hygiene(completion: Completion, config: dict, expected: tuple[str, str | None]) -> None:
    tokenizer = tiny_tokenizer()
    assert clean(completion, chat_frame(tokenizer), tokenizer, InstructionsConfig(**config)) == expected


def test_hygiene_cuts_at_the_stop_string() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "[INST] {{ messages[0].content }} [/INST]"
    frame = chat_frame(tokenizer)
    assert clean(_completion("Why? [/INST]", "stop_string"), frame, tokenizer, InstructionsConfig()) == ("Why?", None)


def test_duplicates_aside_from_case_and_spacing() -> None:
    found = [Instruction(i, text) for i, text in enumerate(["Why?", "why?", "Why  ?", " WHY?\n", "How?", "ﬁx", "fix"])]
    kept, dropped = without_duplicates(found)
    assert [item.id for item in kept] == [0, 2, 4, 5]
    assert dropped == 3
    kept, dropped = without_duplicates(found, seen=[Instruction(99, "HOW?")])
    assert [item.id for item in kept] == [0, 2, 5]


def test_instruction_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One?\n\n  Two?  \n")
    assert [(item.id, item.text) for item, _ in read_instructions(path)] == [(0, "One?"), (1, "Two?")]
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 7, "instruction": "One?", "criterion": "x"}\n{"id": 3, "instruction": "Two?"}\n')
    assert [item.id for item, _ in read_instructions(path)] == [7, 3]
    assert read_instructions(path)[0][1]["criterion"] == "x"
    for content, message in (
        ("", "no instruction"),
        ('{"instruction": 3}', "must be a text, not 3"),
        ('{"prompt": "x"}', "must be a text"),
        ('{"id": "x", "instruction": "y"}', "whole number"),
        ('{"id": 1, "instruction": "y"}\n{"id": 1, "instruction": "z"}', "more than once"),
        ('{"id": 1, "instr', "line 1: not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_instructions(path)


def test_first_difference_and_repetition() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert repetition([1, 2, 3]) == 0
    assert repetition(list(range(50))) == 0
    assert repetition([1, 2] * 50) == pytest.approx(1 - 2 / 97)


def test_neutral_settings_owe_nothing_to_transformers_defaults() -> None:
    config = neutral(temperature=0.7, top_p=0.9, max_new_tokens=5, eos_token_id=[3, 4], stop_string="x")
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.7, 0.9, 0)
    assert (config.repetition_penalty, config.eos_token_id, config.stop_strings) == (1.0, [3, 4], ["x"])
    assert config.min_p is None
    config = neutral(
        temperature=1, top_p=1, top_k=5, min_p=0.1, repetition_penalty=1.2, max_new_tokens=5, eos_token_id=[]
    )
    assert (config.top_k, config.min_p, config.repetition_penalty) == (5, 0.1, 1.2)
    assert neutral(temperature=0, top_p=0.9, max_new_tokens=5, eos_token_id=[]).do_sample is False


def test_stage_seeds_differ() -> None:
    seeds = [stage_seed(seed, stage) for seed in range(50) for stage in ("instructions", "pairs", "calibration")]
    assert len(set(seeds)) == 150
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_doses_and_norms() -> None:
    states = torch.zeros(2, 3, 4)
    states[:, 0, 0], states[0, 1, 1], states[1, 1, 1] = 2.0, 3.0, 5.0
    norms = health.residual_norms(states)
    assert norms == [2.0, 4.0, 0.0]
    directions = DirectionSet([Direction("d", torch.eye(4)[:3])])
    strengths = Strengths({"d": 0.1}, {"d": -0.2}, (1, 2), (1.0, 1.0))
    doses = health.doses(strengths, norms, directions)
    assert doses["positive"] == [None, pytest.approx(0.025), None]
    assert doses["negative"] == [None, pytest.approx(0.05), None]
    long = DirectionSet([Direction("d", 3 * torch.eye(4)[:3])])  # imported: a strength of 1 means its own length
    assert health.doses(strengths, norms, long)["positive"] == [None, pytest.approx(0.075), None]


def test_strengths_are_spread_over_the_blocks() -> None:
    """By dose every block gets the same share of its own norm; in residual units the same strength."""
    norms, direction = [1.0, 2.0, 6.0, 9.0], Direction("d", torch.eye(4))
    layers = (1, 2)
    band = [norms[i] for i in layers]
    assert residual_profile(band, "residual") == (1.0, 1.0)
    by_dose = Strengths({"d": 0.1 * 4.0}, {"d": -0.2 * 4.0}, layers, residual_profile(band, "dose"))
    [term] = by_dose.push(direction, by_dose.positive["d"]).terms
    assert term.alpha.tolist() == pytest.approx([0.0, 0.2, 0.6, 0.0])
    assert health.doses(by_dose, norms, DirectionSet([direction]))["negative"] == [
        None, pytest.approx(0.2), pytest.approx(0.2), None,
    ]  # fmt: skip
