from __future__ import annotations

import pytest
import torch
from torch import Tensor

from icon2_rt import ops
from icon2_rt.kernels.rope_append import rope_append
from icon2_rt.ops import rotary
from tests.losses import DTYPES, no_worse


def arguments(rows: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype, norm: bool) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * d, generator=g).to(dtype)
    positions = torch.randint(0, 4000, (rows,), generator=g)
    inv_freq = 10000.0 ** (-torch.arange(d // 2) / (d // 2))
    cos, sin = rotary(positions, inv_freq, 1.25, dtype)
    norms = [(torch.rand(d, generator=g) + 0.5).to(dtype) if norm else None for _ in range(2)]
    return qkv, cos, sin, *norms


def check(args: tuple, slots: Tensor, kv_heads: int, d: int, exact: bool) -> None:
    """Kernel and reference on equal pages; everything that no row writes keeps its value."""
    dtype = args[0].dtype
    ours, theirs = ([torch.full((4, 5, kv_heads, d), 7.0, dtype=dtype) for _ in range(2)] for _ in range(2))
    q = rope_append(*args, 1e-6, *ours, slots)
    assert q.is_contiguous()
    assert q.dtype == dtype
    wide = [t.float() for t in theirs]
    expected = ops.rope_append(*args, 1e-6, *theirs, slots)
    upcast = [None if t is None else t.float() for t in args]
    for got, right, in_full in (
        (q, expected, ops.rope_append(*upcast, 1e-6, *wide, slots)),
        (ours[0], theirs[0], wide[0]),
    ):
        if exact and dtype != torch.float32:
            assert torch.equal(got, right)
        no_worse(got, right, in_full)
        if dtype == torch.float32:
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[1], theirs[1])
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[slots[slots >= 0]] = False
    for pages in ours:
        assert (pages.view(20, -1)[untouched] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d"),
    [(1, 1, 16), (4, 2, 32), (6, 1, 8), (7, 1, 80), (12, 2, 128), (14, 2, 64), (28, 4, 96), (8, 8, 112), (8, 1, 256)],
)
def test_equals_the_reference(heads: int, kv_heads: int, d: int, norm: bool, dtype: torch.dtype) -> None:
    # Without a norm every operation is one of torch's, rounded where torch rounds: fp16 and bf16 are equal to the bit.
    args = arguments(3, heads, kv_heads, d, dtype, norm)
    check(args, torch.tensor([13, -1, 4]), kv_heads, d, exact=not norm)


def test_no_row_writes_where_all_slots_are_minus_one() -> None:
    check(arguments(3, 4, 2, 32, torch.float32, False), torch.full((3,), -1), 2, 32, exact=False)


def test_rows_of_a_wider_buffer_and_no_rows() -> None:
    qkv, *rest = arguments(3, 4, 2, 32, torch.float16, True)
    buffer = torch.cat((qkv, torch.full_like(qkv, torch.nan)), dim=1)
    slots = torch.tensor([0, 19, 3])
    pages = [torch.zeros(4, 5, 2, 32, dtype=torch.float16) for _ in range(4)]
    wide = rope_append(buffer[:, : qkv.shape[1]], *rest, 1e-6, *pages[:2], slots)
    assert torch.equal(wide, rope_append(qkv, *rest, 1e-6, *pages[2:], slots))
    assert torch.equal(pages[0], pages[2])
    none = (t[:0] if t.shape[0] == 3 else t for t in (qkv, *rest))
    assert rope_append(*none, 1e-6, *pages[:2], slots[:0]).shape == (0, 4, 32)
