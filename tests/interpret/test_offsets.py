"""Offsets beyond 2³¹ elements: every kernel on tensors that large, of which the rows that are looked at exist.

A case puts the same numbers at a given place (a row, a page, a vector of the bank) and returns what the kernel makes of
them there. Far out it must be what it is near the start; and it would not be, were an offset one of 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from icon2_rt.kernels import sample as sampling
from icon2_rt.kernels.add_steer_rmsnorm import add_steer_rmsnorm
from icon2_rt.kernels.begin_step import begin_step
from icon2_rt.kernels.grouped_decode_attention import grouped_decode_attention
from icon2_rt.kernels.rope_append import rope_append
from icon2_rt.kernels.sample import sample
from icon2_rt.kernels.silu_mul import silu_mul
from icon2_rt.ops import AttentionItems, RowSampling, RowState, RowSteering
from tests.sparse import LIMIT, in_32_bits, only, sparse

HALF = torch.bfloat16
NEAR = 2
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(place: int, value: Tensor) -> Tensor:
    """A tensor of ``place`` + 1 rows, the last of which is ``value``."""
    tensor = sparse(place + 1, *value.shape, dtype=value.dtype)
    tensor[place] = value
    return tensor


def state_at(row: int, position: int = 70) -> RowState:
    return RowState(
        tokens=at(row, torch.tensor(3)),
        positions=at(row, torch.tensor(position, dtype=torch.int32)),
        generated=at(row, torch.tensor(5, dtype=torch.int32)),
        running=at(row, torch.tensor(True)),
        logprobs=at(row, torch.tensor(-1.0)),
    )


def silu_rows(row: int) -> list[Tensor]:
    with only({"silu_mul_kernel": [(row, 0)]}):
        return [silu_mul(at(row, rand(128).to(HALF)))[row]]


def steering(vector: int = 0, mine: int = 0, row: int = 0, terms: int = 2) -> RowSteering:
    """Two terms of the vectors ``vector`` - 1 and ``vector``, in the steering ``mine``, of ``row``."""
    bank = sparse(vector + 1, 2, 128)
    bank[vector - 1 :] = rand(2 if vector else 1, 2, 128)
    index = torch.tensor([[vector, max(vector - 1, 0)]] * 2, dtype=torch.int32)
    return RowSteering(
        bank=bank,
        count=at(mine, torch.full((2,), terms, dtype=torch.int32)),
        index=at(mine, index),
        alpha=at(mine, rand(2, terms, seed=1)),
        beta=at(mine, rand(2, terms, seed=2)),
        keep_norm=at(mine, torch.tensor(True)),
        which=at(row, torch.tensor(mine, dtype=torch.int32)),
    )


def normed(row: int, how: RowSteering) -> list[Tensor]:
    x, residual, measured = (
        at(row, rand(128, seed=3).to(HALF)), at(row, rand(128, seed=4).to(HALF)), sparse(row + 1, 3),
    )  # fmt: skip
    with only({"add_steer_rmsnorm_kernel": [(row,)]}):
        out = add_steer_rmsnorm(x, residual, rand(128).to(HALF), 1e-5, how, 1, measured)
    return [out[0][row], out[1][row], measured[row]]


def norm_rows(row: int) -> list[Tensor]:
    return normed(row, steering(1, row=row))


def bank_vectors(vector: int) -> list[Tensor]:
    return normed(0, steering(vector))


def steering_tables(mine: int) -> list[Tensor]:
    return normed(0, steering(1, mine=mine))


def rotated(row: int, page: int) -> list[Tensor]:
    heads, kv_heads, d = 4, 2, 32
    k, v = (sparse(page + 1, 16, kv_heads, d, dtype=HALF) for _ in "kv")
    slots = at(row, torch.tensor(page * 16 + 5))
    turn = [at(row, rand(1, d, seed=seed).to(HALF)) for seed in (1, 2)]
    with only({"rope_append_kernel": [(row, 0)]}):
        q = rope_append(
            at(row, rand((heads + 2 * kv_heads) * d).to(HALF)), *turn, *(rand(d, seed=n).to(HALF) for n in (3, 4)),
            1e-6, k, v, slots,
        )  # fmt: skip
    return [q[row], k[page], v[page]]


def rotary_rows(row: int) -> list[Tensor]:
    return rotated(row, 1)


def written_pages(page: int) -> list[Tensor]:
    return rotated(0, page)


def attended(row: int, page: int, start: int) -> list[Tensor]:
    """A row with a full split and a part of one, over the pages ``page`` - 1 and ``page``."""
    heads, kv_heads, d = 4, 2, 32
    k, v = (sparse(page + 1, 16, kv_heads, d, dtype=HALF) for _ in "kv")
    k[page - 1 :], v[page - 1 :] = rand(2, 2, 16, kv_heads, d).to(HALF)

    def ids(*values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    items = AttentionItems(
        rows=ids([row, -1], [row, -1]), pages=ids([page - 1], [page]), splits=ids(0, 1), layers=ids([0, 2], [0, 2]),
        count=ids(2), starts=at(row, torch.tensor(start, dtype=torch.int32)), lengths=ids(16, 9),
        n_splits=at(row, torch.tensor(2, dtype=torch.int32)), split=16, n_partials=start + 2,
    )  # fmt: skip
    q = at(row, rand(heads, d, seed=1).to(HALF))
    with only({"split_kernel": [(n,) for n in range(4)], "merge_kernel": [(row, head) for head in range(heads)]}):
        return [grouped_decode_attention(q, k, v, items, d**-0.5, 1)[row]]


def query_rows(row: int) -> list[Tensor]:
    return attended(row, 1, 0)


def read_pages(page: int) -> list[Tensor]:
    return attended(0, page, 0)


def partial_results(start: int) -> list[Tensor]:
    return attended(0, 1, start)


def begun_rows(row: int) -> list[Tensor]:
    items = AttentionItems(
        rows=torch.zeros(1, 1, dtype=torch.int32), pages=torch.zeros(1, 2, dtype=torch.int32),
        splits=torch.zeros(1, dtype=torch.int32), layers=torch.zeros(1, 2, dtype=torch.int32),
        count=torch.zeros(1, dtype=torch.int32), starts=sparse(1, dtype=torch.int32),
        lengths=torch.zeros(1, dtype=torch.int32), n_splits=sparse(row + 1, dtype=torch.int32), split=32, n_partials=1,
    )  # fmt: skip
    tables = at(row, torch.arange(100, 108, dtype=torch.int32))
    with only({"begin_step_kernel": [(row,)]}):
        slots, cos, sin = begin_step(state_at(row), tables, 16, rand(8).abs(), 1.0, items, HALF)
    return [slots[row], cos[row], sin[row], items.n_splits[row]]


def sampled_rows(row: int) -> list[Tensor]:
    vocab = 975
    seen = torch.arange(vocab) % 3 == 0
    how = RowSampling(
        sampled=at(row, torch.tensor(True)),
        seeds=at(row, torch.tensor([12345, 678])),
        temperature=at(row, torch.tensor(0.9)),
        top_k=at(row, torch.tensor(40, dtype=torch.int32)),
        top_p=at(row, torch.tensor(0.9)),
        min_p=at(row, torch.tensor(0.01)),
        repetition_penalty=at(row, torch.tensor(1.2)),
        seen=at(row, seen),
        eos=at(row, torch.tensor([2, -1], dtype=torch.int32)),
        min_tokens=at(row, torch.tensor(9, dtype=torch.int32)),
        budget=at(row, torch.tensor(50, dtype=torch.int32)),
    )
    state, chunks = state_at(row), -(-vocab // sampling.CHUNK)
    with only({"scan_kernel": [(chunk, row) for chunk in range(chunks)], "choose_kernel": [(row,)]}):
        sample(at(row, 3 * rand(vocab)), how, state)
    assert how.seen is not None
    return [getattr(state, name)[row] for name in vars(state)] + [how.seen[row]]


# The elements of a row, page or vector, so that its place is beyond the limit.
CASES: dict[Callable[[int], list[Tensor]], int] = {
    silu_rows: 64,
    norm_rows: 128,
    bank_vectors: 2 * 128,
    steering_tables: 2 * 2,
    rotary_rows: 4 * 32,
    written_pages: 16 * 2 * 32,
    query_rows: 4 * 32,
    read_pages: 16 * 2 * 32,
    partial_results: 4 * 32,
    begun_rows: 8,
    sampled_rows: 975,
}


def equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("case", "elements"), CASES.items(), ids=[case.__name__ for case in CASES])
def test_far_out_is_as_near_the_start(case: Callable[[int], list[Tensor]], elements: int) -> None:
    expected = case(NEAR)
    assert any(bool(x.any()) for x in expected)
    assert equal(case(LIMIT // elements + 3), expected)


# What one kernel writes and the other reads, both would misplace alike.
@pytest.mark.parametrize(
    ("case", "but"),
    [(case, "") for case in CASES if case is not partial_results]
    + [(partial_results, "split_kernel"), (partial_results, "merge_kernel")],
)
def test_an_offset_of_32_bits_would_be_seen(case: Callable[[int], list[Tensor]], but: str) -> None:
    expected, elements = case(NEAR), CASES[case]
    with in_32_bits(but):
        assert equal(case(NEAR), expected)
        assert not equal(case(LIMIT // elements + 3), expected)
