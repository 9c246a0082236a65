"""Inputs of the native ops' tests, odd sizes, rows that share and rows that do not run, steerings that differ; and how
their results are held against the references'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from icon2_rt import ops
from icon2_rt.ops import AttentionItems, RowSampling, RowState, RowSteering

NOTHING = RowSampling(
    sampled=None, seeds=None, temperature=None, top_k=None, top_p=None, min_p=None, repetition_penalty=None, seen=None,
    eos=torch.empty(0), min_tokens=None, budget=torch.empty(0),
)  # fmt: skip

# What may lie between two roundings to the storage type of nearly the same number, relative to the largest.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def strided(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows with a gap between them, that begin at an odd place."""
    return rand(rows, width + 5, dtype=dtype)[:, 3 : 3 + width]


def per_row(values: list[float], rows: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor((values * rows)[:rows], dtype=dtype)


def row_steering(rows: int, n_layers: int, hidden: int, terms: int, host_knows: bool = False) -> RowSteering:
    bank = torch.nn.functional.normalize(rand(5, n_layers, hidden), dim=-1)
    count = torch.randint(0, terms + 1, (3, n_layers), dtype=torch.int32)
    count[0], count[1] = terms, 0
    there = torch.arange(terms) < count[..., None]
    beta = torch.where(torch.rand(3, n_layers, terms) < 0.5, 0.0, -1.0)
    which = torch.arange(rows, dtype=torch.int32) % 4 - 1
    steering = RowSteering(
        bank=bank,
        count=count,
        index=torch.randint(0, 5, (3, n_layers, terms), dtype=torch.int32),
        alpha=torch.where(there, rand(3, n_layers, terms), 0.0),
        beta=torch.where(there, beta, 0.0),
        keep_norm=torch.tensor([False, True, True]),
        which=which,
    )
    if not host_knows:
        return steering
    acts = (which >= 0)[:, None] & (count[which.clamp(min=0).long()] > 0)
    known = tuple(acts[:, i].nonzero()[:, 0] if acts[:, i].any() else None for i in range(n_layers))
    return replace(steering, rows=known)


def row_state(positions: list[int], running: list[bool], generated: int = 3) -> RowState:
    rows = len(positions)
    return RowState(
        tokens=torch.arange(rows),
        positions=torch.tensor(positions, dtype=torch.int32),
        generated=torch.full((rows,), generated, dtype=torch.int32),
        running=torch.tensor(running),
        logprobs=torch.full((rows,), -9.0),
    )


def attention_items(state: RowState, tables: Tensor, page_size: int, split_pages: int, width: int) -> AttentionItems:
    """Rows in twos and threes share the first splits (their tables say so); then each has items of its own. One item
    holds for later blocks only, and one place too many is left empty."""
    split, rows = page_size * split_pages, len(state.positions)
    members: dict[tuple[int, ...], list[int]] = {}
    for row in range(rows):
        for s in range(int(state.positions[row]) // split + 1):
            ids = tuple(tables[row, s * split_pages : (s + 1) * split_pages].tolist())
            members.setdefault((s, *ids), []).append(row)
    groups = [(key, held[i : i + width]) for key, held in members.items() for i in range(0, len(held), width)]
    n = len(groups) + 2
    items_rows = torch.full((n, width), -1, dtype=torch.int32)
    pages, splits = torch.zeros(n, split_pages, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    layers = torch.tensor([[0, 8]], dtype=torch.int32).repeat(n, 1)
    for i, ((s, *ids), held) in enumerate(groups):
        items_rows[i, : len(held)] = torch.tensor(held, dtype=torch.int32)
        pages[i, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        splits[i] = s
    layers[n - 2] = torch.tensor([6, 8])
    items_rows[n - 2, 0], items_rows[n - 1, 0] = 0, 1
    depth = int(state.positions.max()) // split + 1
    return AttentionItems(
        rows=items_rows,
        pages=pages,
        splits=splits,
        layers=layers,
        count=torch.tensor([n - 1], dtype=torch.int32),
        starts=torch.arange(rows, dtype=torch.int32) * depth,
        lengths=torch.full((n,), 99, dtype=torch.int32),
        n_splits=torch.full((rows,), 99, dtype=torch.int32),
        split=split,
        n_partials=rows * depth,
    )


def step_of(running: list[bool]) -> tuple[RowState, Tensor]:
    """Six rows: two groups that share their first pages, and one row alone."""
    positions = [70, 71, 90, 33, 34, 5]
    tables = torch.randperm(6 * 12).view(6, 12).to(torch.int32)
    tables[1:3, :8] = tables[0, :8]
    tables[4, :4] = tables[3, :4]
    return row_state(positions, running), tables


def settings(rows: int, vocab: int, **fields: object) -> RowSampling:
    """A row in three is greedy where rows sample; seeds differ; token 2 ends a row, and 5 ends some."""
    eos = torch.tensor([[2, -1], [2, 5]], dtype=torch.int32).repeat(rows, 1)[:rows]
    how = replace(NOTHING, eos=eos, budget=torch.full((rows,), 50, dtype=torch.int32))
    if fields:
        seeds = torch.randint(0, 2**32, (rows, 2))
        how = replace(how, sampled=torch.arange(rows) % 3 != 2, seeds=seeds)
    return replace(how, **fields)  # type: ignore[arg-type]


def run_both(
    sample: Callable[..., None], logits: Tensor, how: RowSampling, steps: int = 1
) -> tuple[RowState, RowState, list[RowSampling]]:
    """``sample`` and the reference, each on states and ``seen`` of its own; one row in five does not run."""
    rows = len(logits)
    states = [row_state([9] * rows, [r % 5 != 4 for r in range(rows)]) for _ in range(2)]
    hows = [replace(how, seen=None if how.seen is None else how.seen.clone()) for _ in range(2)]
    for _ in range(steps):
        sample(logits, hows[0], states[0])
        ops.sample(logits, hows[1], states[1])
    return states[0], states[1], hows


def same_state(mine: RowState, theirs: RowState) -> None:
    for name in ("tokens", "positions", "generated", "running"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    torch.testing.assert_close(mine.logprobs, theirs.logprobs, atol=3e-5, rtol=1e-5)


def close(mine: Tensor, theirs: Tensor) -> None:
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    tolerance = TOLERANCE.get(mine.dtype, 0.0)
    scale = float(theirs.float().abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(mine, theirs, atol=tolerance * max(scale, 1e-3), rtol=tolerance)
