"""What the interpret lane holds kernels to notices a rounding too many and one too few."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from icon2_rt import ops
from tests.losses import exactly, no_worse

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_silu_that_is_not_rounded_before_the_product(dtype: torch.dtype) -> None:
    gate_up = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, exact = ops.silu_mul(gate_up), exactly(ops.silu_mul, gate_up)
    no_worse(expected, expected, exact)
    gate, up = gate_up.float().chunk(2, dim=1)
    with pytest.raises(AssertionError, match="elements differ"):
        no_worse((F.silu(gate) * up).to(dtype), expected, exact)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_sum_of_three_that_is_rounded_twice(dtype: torch.dtype) -> None:
    a, b, c = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = a.float() + b.float() + c.float()
    with pytest.raises(AssertionError):
        no_worse(a + b + c, exact.to(dtype), exact)


def test_what_is_cut_off_instead_of_rounded() -> None:
    exact = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    cut = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError):
        no_worse(cut, exact.bfloat16(), exact, differ=1.0)


def test_a_nan_and_products_of_ten_bits() -> None:
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    no_worse(a @ b, a @ b, a.double() @ b.double())
    short = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b)]
    with pytest.raises(AssertionError):
        no_worse(short[0] @ short[1], a @ b, a.double() @ b.double())
    with pytest.raises(AssertionError):
        no_worse(torch.full((2,), torch.nan), torch.zeros(2), torch.zeros(2))
