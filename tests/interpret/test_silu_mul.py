from __future__ import annotations

import pytest
import torch

from icon2_rt import ops
from icon2_rt.kernels.silu_mul import silu_mul
from tests.losses import DTYPES, exactly, no_worse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 48), (2, 1000), (2, 1025), (1, 4864), (0, 16)])
def test_equals_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    out = silu_mul(gate_up)
    assert out.dtype == dtype
    no_worse(out, ops.silu_mul(gate_up), exactly(ops.silu_mul, gate_up))
    if dtype == torch.float32:
        torch.testing.assert_close(out, ops.silu_mul(gate_up), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_silu_is_rounded_before_the_product(dtype: torch.dtype) -> None:
    gate, up = torch.full((1, 512), 1.0), torch.arange(512.0)[None] + 1500
    gate_up = torch.cat((gate, up), dim=1).to(dtype)
    assert torch.equal(silu_mul(gate_up), ops.silu_mul(gate_up))
    once = (torch.nn.functional.silu(gate) * gate_up[:, 512:].float()).to(dtype)
    assert not torch.equal(silu_mul(gate_up), once)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_extremes() -> None:
    gate_up = torch.tensor([[-torch.inf, -200.0, 0.0, 200.0, torch.nan, 2.0, 2.0, 2.0, 2.0, 2.0]])
    torch.testing.assert_close(silu_mul(gate_up), ops.silu_mul(gate_up), equal_nan=True)


def test_a_row_of_a_wider_buffer() -> None:
    buffer = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        silu_mul(buffer[:, :64]), ops.silu_mul(buffer[:, :64].contiguous()), rtol=1e-6, atol=1e-7
    )
