"""Sampling against the reference: the same token for every row, whatever the settings, and the same next state.

The reference races in fp64, the kernel in fp32. The kernel's arithmetic, emulated in torch, drew the same token as the
reference in all of 210 thousand draws (vocabularies 975 and 8192, logits of standard deviation 0.3 to 8), in one of
which the two best were within 1e-5 of each other. So tokens are compared for equality here.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from icon2_rt import ops
from icon2_rt.kernels import sample as module
from icon2_rt.kernels.sample import sample
from icon2_rt.ops import RowSampling, RowState
from tests.losses import DTYPES

VOCAB = 975

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and blocks so small that a small vocabulary has several, and the listed blocks several tiles."""
    monkeypatch.setattr(module, "CHUNK", 256)
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "TILE", 32)


def logits(rows: int, vocab: int = VOCAB, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def settings(rows: int, vocab: int = VOCAB, **changed: Any) -> RowSampling:
    """Every row draws, without anything else; ``changed`` replaces fields."""
    given: dict[str, Any] = {f.name: None for f in fields(RowSampling)}
    given |= {
        "sampled": torch.ones(rows, dtype=torch.bool),
        "seeds": torch.randint(2**32, (rows, 2), generator=torch.Generator().manual_seed(1)),
        "eos": torch.full((rows, 1), -1, dtype=torch.int32),
        "budget": torch.full((rows,), 10_000, dtype=torch.int32),
    }
    return RowSampling(**{**given, **changed})


def state(rows: int) -> RowState:
    """Every row runs; all fields differ between rows."""
    return RowState(
        tokens=torch.arange(rows) % 7,
        positions=5 * torch.arange(rows, dtype=torch.int32) + 2,
        generated=3 * torch.arange(rows, dtype=torch.int32),
        running=torch.ones(rows, dtype=torch.bool),
        logprobs=torch.full((rows,), -7.0),
    )


def copy(data: Any) -> Any:
    return replace(data, **{k: v.clone() for k, v in vars(data).items() if torch.is_tensor(v)})


def check(scores: torch.Tensor, how: RowSampling, before: RowState | None = None) -> RowState:
    """One step of both; asserts that they agree in everything, and returns the state after it."""
    expected, got = copy(before or state(len(scores))), copy(before or state(len(scores)))
    theirs, ours = copy(how), copy(how)
    ops.sample(scores, theirs, expected)
    sample(scores, ours, got)
    for name in ("tokens", "positions", "generated", "running"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-6, atol=2e-5)
    if how.seen is not None:
        assert torch.equal(ours.seen, theirs.seen)
    return got


def f32(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"sampled": None, "seeds": None},
    "plain": {},
    "temperature": {"temperature": f32(0.3, 0.9, 1.0, 2.5)},
    "top_k": {"top_k": i32(1, 40, 400, 5000)},
    "top_p": {"top_p": f32(0.01, 0.6, 0.95, 1.0)},
    "min_p": {"min_p": f32(0.0, 0.05, 0.3, 1.0)},
    "top_k and top_p": {"top_k": i32(5, 50, 600, 20), "top_p": f32(0.9, 0.5, 0.8, 1.0)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    check(logits(4).to(dtype), settings(4, **SETTINGS[name]))


@pytest.mark.parametrize(("scale", "tied"), [(0.3, False), (4.0, True), (15.0, False)])
def test_all_settings_together_differ_from_row_to_row(scale: float, tied: bool) -> None:
    rows, generator = 7, torch.Generator().manual_seed(2)
    scores = logits(rows, scale=scale)
    if tied:  # as bf16 logits are
        scores = (scores * 2).round() / 2
    draw = torch.rand(6, rows, generator=generator)
    check(
        scores,
        settings(
            rows,
            sampled=torch.arange(rows) != 3,
            temperature=0.3 + 1.5 * draw[0],
            top_k=torch.where(draw[5] < 0.5, VOCAB, 1 + 300 * draw[1]).int(),
            top_p=(0.05 + 1.3 * draw[2]).clamp(max=1.0),
            min_p=0.3 * draw[3] ** 2 * (draw[4] < 0.5),
            repetition_penalty=0.7 + draw[4],
            seen=torch.rand(rows, VOCAB, generator=generator) < 0.3,
            eos=torch.randint(VOCAB, (rows, 3), generator=generator, dtype=torch.int32),
            min_tokens=torch.randint(40, (rows,), generator=generator, dtype=torch.int32),
        ),
    )


def test_neutral_settings_change_nothing() -> None:
    """A graph's buffers hold neutral values where a batch of the host has None: the same tokens."""
    rows = 4
    dense = settings(
        rows,
        temperature=torch.ones(rows),
        top_k=torch.full((rows,), VOCAB, dtype=torch.int32),
        top_p=torch.ones(rows),
        min_p=torch.zeros(rows),
        repetition_penalty=torch.ones(rows),
        seen=torch.zeros(rows, VOCAB, dtype=torch.bool),
        min_tokens=torch.zeros(rows, dtype=torch.int32),
    )
    for sampled in (torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)):
        without, with_all = copy(state(rows)), copy(state(rows))
        sample(logits(rows), settings(rows, sampled=sampled), without)
        sample(logits(rows), replace(dense, sampled=sampled), with_all)
        for field in fields(RowState):
            assert torch.equal(getattr(without, field.name), getattr(with_all, field.name))


@pytest.mark.parametrize("vocab", [1, 3, 16, 257, 1000])
def test_any_vocabulary(vocab: int) -> None:
    how = settings(3, vocab, top_k=i32(1, 2, vocab), top_p=f32(1.0, 0.7, 0.7))
    check(logits(3, vocab), how)
    check(logits(3, vocab), settings(3, vocab))


def test_a_large_vocabulary_has_larger_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BLOCKS", 8)  # blocks of 128 tokens
    check(logits(2), settings(2, top_k=i32(7, VOCAB), top_p=f32(1.0, 0.9)))


def test_logits_with_padding_behind_the_vocabulary() -> None:
    padded = logits(2, VOCAB + 9)
    padded[:, VOCAB:] = 100.0
    check(padded[:, :VOCAB], settings(2, top_p=f32(0.9, 1.0)))


def test_equal_scores_share_their_fate_and_the_first_wins() -> None:
    scores = torch.zeros(3, VOCAB)
    scores[:, 300:] = 2.0
    assert check(scores, settings(3, **SETTINGS["greedy"])).tokens.tolist() == [300] * 3
    check(scores, settings(3, top_k=i32(1, 700, VOCAB), top_p=f32(1.0, 1.0, 0.1)))
    scores[0, 1:] = -torch.inf  # one token is possible
    assert check(scores, settings(3, top_k=i32(5, 5, 5))).tokens[0] == 0


def test_eos_may_not_come_early_and_ends_a_row() -> None:
    rows = 5
    scores = logits(rows)
    best = scores.argmax(dim=1).int()
    eos = torch.stack((torch.full((rows,), -1, dtype=torch.int32), best), dim=1)
    how = settings(rows, **SETTINGS["greedy"], eos=eos, min_tokens=i32(1, 3, 7, 10, 12))
    after = check(scores, how)
    assert after.running.tolist() == [True, False, True, True, False]
    assert (after.tokens != best).tolist() == after.running.tolist()


def test_a_budget_ends_a_row() -> None:
    assert check(logits(3), settings(3, budget=i32(1, 4, 8))).running.tolist() == [False, False, True]


def test_a_row_that_does_not_run_keeps_all_it_has() -> None:
    before = replace(state(4), running=torch.tensor([True, False, True, False]))
    how = settings(4, repetition_penalty=torch.ones(4), seen=torch.zeros(4, VOCAB, dtype=torch.bool))
    after, seen = copy(before), how.seen
    sample(logits(4), how, after)
    for field in fields(RowState):
        assert torch.equal(getattr(after, field.name)[1::2], getattr(before, field.name)[1::2])
    assert seen.sum(dim=1).tolist() == [1, 0, 1, 0]
    assert bool(seen[[0, 2], after.tokens[[0, 2]]].all())
    check(logits(4), replace(how, seen=torch.zeros_like(seen)), before)  # nor does the reference mark its token


@pytest.mark.parametrize("filters", [{}, {"top_k": i32(9, 9, 9, 9, 9), "top_p": f32(0.5, 0.5, 0.5, 0.5, 0.5)}])
def test_a_row_that_is_not_finite_spoils_no_other(filters: dict[str, Any]) -> None:
    scores = logits(5)
    expected = check(scores, settings(5, **filters))
    scores[0, 77] = torch.nan
    scores[1, 800] = torch.inf
    scores[2] = -torch.inf
    scores[3] = torch.nan
    after = state(5)
    sample(scores, settings(5, **filters), after)
    assert after.logprobs[:4].isnan().all()
    assert ((after.tokens >= 0) & (after.tokens < VOCAB)).all()
    assert after.tokens[4] == expected.tokens[4]
    assert torch.equal(after.positions, state(5).positions + 1)


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    """Of 40 nearly equal tokens about 20; of the whole row's mass they have less than half. One draw a row could hide
    it: a row's only difference from the others is its seed."""
    rows = 24
    scores = logits(1, scale=0.3).repeat(rows, 1)
    seeds = torch.randint(2**32, (rows, 2), generator=torch.Generator().manual_seed(3))
    how = settings(rows, seeds=seeds, top_k=i32(*[40] * rows), top_p=f32(*[0.5] * rows))
    order = scores[0].argsort(descending=True)[:40].tolist()
    assert {order.index(token) for token in check(scores, how).tokens.tolist()} <= set(range(20))
