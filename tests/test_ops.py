"""Where an op has a second form for speed, it equals the plain one that defines it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from icon2_rt.ops import AttentionItems, RowState, grouped_decode_attention
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


def test_a_seat_that_does_not_run_attends_to_nothing_also_where_it_shares_an_item():
    """Two rows share the first split; the second has ended, and a third seat is nobody's."""

    def ints(*values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    items = AttentionItems(
        rows=ints([0, 1], [0, -1], [1, -1]), pages=ints([0, 1], [2, 3], [4, 5]), splits=ints(0, 1, 1),
        layers=ints([0, 1], [0, 1], [0, 1]), count=ints(3), starts=ints(0, 2, 4), lengths=ints(0, 0, 0),
        n_splits=ints(9, 9, 9), split=16, n_partials=6,
    )  # fmt: skip
    running = torch.tensor([True, False, False])
    items.update(RowState(torch.zeros(3).long(), ints(17, 20, 0), ints(1, 1, 0), running, torch.zeros(3)))
    assert items.lengths.tolist() == [16, 2, 0]
    assert items.n_splits.tolist() == [2, 0, 0]
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 8), torch.randn(6, 8, 2, 8), torch.randn(6, 8, 2, 8)
    out = grouped_decode_attention(q, k, v, items, 1.0, 0)
    seen = [pages[[0, 1, 2, 3]].reshape(32, 2, 8)[:18].transpose(0, 1) for pages in (k, v)]
    expected = F.scaled_dot_product_attention(q[0][:, None], *seen, scale=1.0, enable_gqa=True)
    torch.testing.assert_close(out[0].view(4, 8), expected[:, 0], atol=1e-5, rtol=1e-5)
    assert bool((out[1:] == 0).all())
