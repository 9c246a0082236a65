from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from icon2_rt import ops
from icon2_rt.kernels.add_steer_rmsnorm import add_steer_rmsnorm
from icon2_rt.ops import RowSteering
from tests.losses import DTYPES, exactly, no_worse

LAYERS = 3


def check(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The kernel's result, which loses what the reference loses."""
    out, expected = add_steer_rmsnorm(*arguments), ops.add_steer_rmsnorm(*arguments)
    for a, b, exact in zip(out, expected, exactly(ops.add_steer_rmsnorm, *arguments), strict=True):
        no_worse(a, b, exact)
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return out


def steerings(hidden: int, which: Sequence[int], max_terms: int = 3, beta: bool = True) -> RowSteering:
    """Four distinct steerings: 0 has terms everywhere, 1 keeps the norm, 2 acts at block 1 alone, 3 never acts."""
    g = torch.Generator().manual_seed(1)
    bank = torch.randn(5, LAYERS, hidden, generator=g)
    count = torch.tensor([[max_terms, 1, max_terms], [1, max_terms, max_terms], [0, 1, 0], [0, 0, 0]])
    active = torch.arange(max_terms) < count[..., None]
    # Places beyond the count hold what must not matter.
    alpha, slope = (torch.randn(4, LAYERS, max_terms, generator=g).mul(2).where(active, 7.0) for _ in range(2))
    if beta:
        slope[0, :, 0] = 0.0
    else:
        slope.zero_()
    return RowSteering(
        bank=bank / bank.norm(dim=-1, keepdim=True),
        count=count.int(),
        index=torch.randint(0, 5, (4, LAYERS, max_terms), generator=g).int(),
        alpha=alpha.where(active, 0.0),
        beta=slope.where(active, 0.0),
        keep_norm=torch.tensor([False, True, False, True]),
        which=torch.tensor(which).int(),
    )


def batch(rows: int, hidden: int, dtype: torch.dtype, residual_dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(rows, hidden, generator=g) for _ in range(2))
    weight = torch.rand(hidden, generator=g) + 0.5
    return x.to(dtype), residual.to(residual_dtype or dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 48, 128, 896, 3584])
@pytest.mark.parametrize("adds", [True, False])
def test_without_steering(hidden: int, dtype: torch.dtype, adds: bool) -> None:
    x, residual, weight = batch(3, hidden, dtype)
    out = check(x if adds else None, residual, weight, 1e-6)
    expected = ops.add_steer_rmsnorm(x if adds else None, residual, weight, 1e-6)
    assert torch.equal(out[0], expected[0]), "one addition and one rounding leave no room"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [48, 130, 896])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_law(hidden: int, dtype: torch.dtype, layer: int) -> None:
    x, residual, weight = batch(7, hidden, dtype)
    steering = steerings(hidden, [0, 1, -1, 2, 3, 1, 0])
    out = check(x, residual, weight, 1e-5, steering, layer)
    assert [t.dtype for t in out] == [dtype, dtype]
    moved = (out[0] != ops.add_steer_rmsnorm(x, residual, weight, 1e-5)[0]).any(dim=1)
    assert moved.tolist() == [True, True, False, layer == 1, False, True, True]


@pytest.mark.parametrize(("max_terms", "beta"), [(1, True), (4, False)])
def test_other_numbers_of_terms(max_terms: int, beta: bool) -> None:
    x, residual, weight = batch(3, 96, torch.float32)
    check(x, residual, weight, 1e-5, steerings(96, [1, 0, -1], max_terms, beta), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_term_have_the_bytes_of_no_steering(dtype: torch.dtype) -> None:
    x, residual, weight = batch(5, 160, dtype)
    plain = add_steer_rmsnorm(x, residual, weight, 1e-5)
    # Rows 1 to 3: none, one that never acts, one that acts at another block.
    steering = steerings(160, [0, -1, 3, 2, 1])
    for measured in (None, torch.empty(5, 4)):
        steered = add_steer_rmsnorm(x, residual, weight, 1e-5, steering, 0, measured)
        for a, b in zip(steered, plain, strict=True):
            assert torch.equal(a[1:4], b[1:4])
            assert not torch.equal(a, b)


def test_what_is_beyond_the_count_is_not_read() -> None:
    x, residual, weight = batch(4, 64, torch.float32)
    steering = steerings(64, [0, 1, 2, 3])
    bank = torch.cat((steering.bank, torch.full((1, LAYERS, 64), torch.nan)))
    beyond = torch.arange(3) >= steering.count[..., None]
    poisoned = dataclasses.replace(steering, bank=bank, index=steering.index.masked_fill(beyond, 5))
    for layer in range(LAYERS):
        for measured in (None, torch.empty(4, 4)):
            out = add_steer_rmsnorm(x, residual, weight, 1e-5, poisoned, layer, measured)
            for a, b in zip(out, add_steer_rmsnorm(x, residual, weight, 1e-5, steering, layer), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_measured(layer: int, dtype: torch.dtype) -> None:
    x, residual, weight = batch(6, 200, dtype)
    steering = steerings(200, [0, -1, 3, 2, 1, 1])
    measured, expected = torch.full((6, 4), torch.nan), torch.full((6, 4), torch.nan)
    out = add_steer_rmsnorm(x, residual, weight, 1e-5, steering, layer, measured)
    ops.add_steer_rmsnorm(x, residual, weight, 1e-5, steering, layer, expected)
    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(out, add_steer_rmsnorm(x, residual, weight, 1e-5, steering, layer), strict=True):
        assert torch.equal(a, b), "measuring changes nothing"


def test_keep_norm_leaves_a_zero_alone() -> None:
    steering = steerings(64, [1, 1])
    residual = torch.zeros(2, 64)
    residual[1, 3] = 2.0
    out, _ = add_steer_rmsnorm(None, residual, torch.ones(64), 1e-5, steering, 1)
    expected, _ = ops.add_steer_rmsnorm(None, residual, torch.ones(64), 1e-5, steering, 1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out[1].norm(), torch.tensor(2.0))
    assert out[0].norm() > 0


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_residual_of_higher_precision(dtype: torch.dtype) -> None:
    x, residual, weight = batch(3, 48, dtype, residual_dtype=torch.float32)
    out = check(x, residual, weight, 1e-5, steerings(48, [0, -1, 1]), 0)
    assert [t.dtype for t in out] == [torch.float32, dtype]


def test_rows_of_wider_buffers_and_no_rows() -> None:
    x, residual, weight = batch(4, 100, torch.float32)
    out = add_steer_rmsnorm(x[1:, :64], residual[:3, 36:], weight[:64], 1e-5)
    expected = ops.add_steer_rmsnorm(x[1:, :64], residual[:3, 36:], weight[:64], 1e-5)
    assert torch.equal(out[0], expected[0])
    torch.testing.assert_close(out[1], expected[1])
    assert add_steer_rmsnorm(x[:0], residual[:0], weight, 1e-5)[1].shape == (0, 100)
