"""Where an op has a second form for speed, it equals the plain one that defines it."""

from __future__ import annotations

import pytest
import torch

from icon2_rt.ops.attention import attend_with_lse, attend_with_lse_on_cpu
from icon2_rt.ops.linear import linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "heads", "queries", "span", "d"), [(1, 1, 1, 1, 16), (3, 2, 4, 33, 32), (5, 4, 16, 256, 64)]
)
def test_fused_attention_equals_its_definition(n, heads, queries, span, d, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, heads, m, d).to(dtype) for m in (queries, span, span))
    visible = torch.randint(1, span + 1, (n,))
    mask = torch.where(torch.arange(span) < visible[:, None], 0.0, -torch.inf)[:, None, None].to(dtype)
    # K as the engine gives it: a transposed view of pages.
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    expected, expected_lse = attend_with_lse(q, k, v, mask, d**-0.5)
    out, lse = attend_with_lse_on_cpu(q, k, v, mask, d**-0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)
    # What is hidden has no influence: garbage behind the mask changes nothing.
    hidden = torch.arange(span) >= visible[:, None, None, None]
    again, _ = attend_with_lse(
        q, k.masked_fill(hidden.transpose(-1, -2), 7.0), v.masked_fill(hidden.transpose(-1, -2), 7.0), mask, d**-0.5
    )
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("rows", [1, 2, 7, 32, 33])
def test_linear_is_one_function_for_few_rows_and_many(rows):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 512), torch.randn(1200, 512), torch.randn(1200)
    expected = (x.double() @ weight.double().T + bias.double()).float()
    torch.testing.assert_close(linear(x, weight, bias), expected, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(linear(x, weight), expected - bias, atol=1e-3, rtol=1e-5)
