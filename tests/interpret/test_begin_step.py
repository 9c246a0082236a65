from __future__ import annotations

import dataclasses

import pytest
import torch

from icon2_rt import ops
from icon2_rt.kernels.begin_step import begin_step
from icon2_rt.ops import AttentionItems, RowState, rotary
from tests.losses import DTYPES, no_worse

PAGE_SIZE, SPLIT_PAGES = 4, 3
SPLIT = PAGE_SIZE * SPLIT_PAGES


def rows(n: int, g: torch.Generator) -> RowState:
    return RowState(
        tokens=torch.zeros(n, dtype=torch.int64),
        positions=torch.randint(0, 5 * SPLIT, (n,), generator=g).int(),
        generated=torch.zeros(n, dtype=torch.int32),
        running=torch.rand(n, generator=g) < 0.7,
        logprobs=torch.zeros(n),
    )


def items(n: int, width: int, batch: int, g: torch.Generator, count: int) -> AttentionItems:
    """Items of any rows at all, also unused ones: what is written for each follows from its own numbers."""
    return AttentionItems(
        rows=torch.randint(-1, batch, (n, width), generator=g).int(),
        pages=torch.zeros(n, SPLIT_PAGES, dtype=torch.int32),
        splits=torch.randint(0, 6, (n,), generator=g).int(),
        layers=torch.zeros(n, 2, dtype=torch.int32),
        count=torch.tensor([count]).int(),
        starts=torch.zeros(batch, dtype=torch.int32),
        lengths=torch.full((n,), -7).int(),
        n_splits=torch.full((batch,), -7).int(),
        split=SPLIT,
        n_partials=1,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "n", "width", "count", "half"),
    [(1, 1, 1, 1, 8), (5, 40, 2, 33, 16), (7, 300, 5, 300, 40), (3, 128, 16, 0, 64), (4, 129, 8, 129, 24)],
)
def test_equals_the_reference(batch: int, n: int, width: int, count: int, half: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(batch)
    state = rows(batch, g)
    tables = torch.randint(0, 1000, (batch, 5 * SPLIT_PAGES), generator=g).int()
    inv_freq = 1e4 ** (-torch.arange(half) / half)
    ours = items(n, width, batch, g, count)
    theirs = dataclasses.replace(ours, lengths=ours.lengths.clone(), n_splits=ours.n_splits.clone())
    before = {f.name: getattr(state, f.name).clone() for f in dataclasses.fields(state)}
    slots, cos, sin = begin_step(state, tables, PAGE_SIZE, inv_freq, 1.25, ours, dtype)
    expected = ops.begin_step(state, tables, PAGE_SIZE, inv_freq, 1.25, theirs, dtype)
    for field in ("lengths", "n_splits"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    assert slots.dtype == torch.int64
    assert torch.equal(slots, expected[0])
    for ours_, theirs_, exact in zip(
        (cos, sin), expected[1:], rotary(state.positions, inv_freq, 1.25, torch.float32), strict=True
    ):
        no_worse(ours_, theirs_, exact)
        if dtype == torch.float32:
            torch.testing.assert_close(ours_, theirs_, rtol=0.0, atol=1e-6)
    for name, value in before.items():
        assert torch.equal(getattr(state, name), value), name


def test_the_first_columns_and_rows_of_wider_buffers() -> None:
    g = torch.Generator().manual_seed(0)
    state, wide = rows(3, g), items(20, 8, 3, g, 11)
    wide.rows[:, 3:] = 999  # not a seat
    narrow = {"rows": wide.rows[:9, :3], "splits": wide.splits[:9]}
    ours, theirs = (dataclasses.replace(wide, **narrow, lengths=torch.full((9,), -7).int()) for _ in range(2))
    tables = torch.randint(0, 1000, (6, 100), generator=g).int()[:3, : 5 * SPLIT_PAGES]
    slots, _, _ = begin_step(state, tables, PAGE_SIZE, torch.ones(4), 1.0, ours, torch.float32)
    expected, _, _ = ops.begin_step(state, tables, PAGE_SIZE, torch.ones(4), 1.0, theirs, torch.float32)
    assert torch.equal(slots, expected)
    assert torch.equal(ours.lengths, theirs.lengths)


def test_items_beyond_the_count_may_speak_of_seats_that_are_not_there() -> None:
    g = torch.Generator().manual_seed(0)
    state, ours = rows(3, g), items(20, 2, 3, g, 11)
    ours.rows[11:] = 2**30
    begin_step(state, torch.zeros(3, 5 * SPLIT_PAGES).int(), PAGE_SIZE, torch.ones(4), 1.0, ours, torch.float32)
    assert (ours.lengths[11:] == 0).all()
    assert (ours.lengths[:11] > 0).any()


def test_pages_beyond_two_to_the_31_positions() -> None:
    g = torch.Generator().manual_seed(0)
    state = dataclasses.replace(rows(1, g), positions=torch.tensor([5]).int(), running=torch.tensor([True]))
    tables = torch.full((1, 4), 2**31 - 1, dtype=torch.int32)
    slots, _, _ = begin_step(state, tables, PAGE_SIZE, torch.ones(4), 1.0, items(1, 1, 1, g, 1), torch.float32)
    assert slots.tolist() == [(2**31 - 1) * PAGE_SIZE + 1]
