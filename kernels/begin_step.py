"""What follows from the rows' positions before any block runs, in one launch: where K and V go, the rotary factors, how
much of every attention item exists.

The first programs take a row each, the others 128 items each. A step of 256 rows and 4096 items reads and writes about
0.5 MB, most of it the items' rows: the launch itself is what it costs, and it is one where plain operations are twenty.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from icon2_rt.kernels.budget import Budget

# The stack is where libdevice's cosine reduces an angle beyond 105615.
BUDGET = Budget(registers=40, shared=0, narrow_loads=26, stack=32)

ITEMS = 128


@triton.jit
def begin_step_kernel(
    positions,
    running,
    rows,
    tables,
    table_stride,
    page_size,
    inv_freq,
    rope_scaling,
    half,
    slots,
    cos,
    sin,
    item_rows,
    width,
    item_stride,
    item_splits,
    item_count,
    n_items,
    split,
    lengths,
    n_splits,
    ITEMS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < rows:
        row = pid.to(tl.int64)
        position = tl.load(positions + row)
        runs = tl.load(running + row)
        # The table of a seat that nobody has may be shorter than its last position.
        page = tl.load(tables + row * table_stride + position // page_size, mask=runs, other=0).to(tl.int64)
        tl.store(slots + row, tl.where(runs, page * page_size + position % page_size, -1))
        tl.store(n_splits + row, tl.where(runs, position // split + 1, 0))
        cols = tl.arange(0, HALF)
        inside = cols < half
        angle = position.to(tl.float32) * tl.load(inv_freq + cols, mask=inside, other=0.0)
        c = (tl.cos(angle) * rope_scaling).to(cos.dtype.element_ty)
        s = (tl.sin(angle) * rope_scaling).to(sin.dtype.element_ty)
        at = row * 2 * half + cols
        tl.store(cos + at, c, mask=inside)
        tl.store(cos + at + half, c, mask=inside)
        tl.store(sin + at, -s, mask=inside)
        tl.store(sin + at + half, s, mask=inside)
    else:
        item = (pid - rows) * ITEMS + tl.arange(0, ITEMS)
        exists = item < n_items
        counts = exists & (item < tl.load(item_count))
        wanted = item < 0
        for place in tl.static_range(WIDTH):
            member = tl.load(item_rows + item * item_stride + place, mask=counts & (place < width), other=-1)
            wanted |= tl.load(running + member, mask=member >= 0, other=0) != 0
        # Rows that share an item have all of its split behind them, so that the first speaks for all.
        first = tl.maximum(tl.load(item_rows + item * item_stride, mask=counts, other=0), 0)
        reached = tl.load(positions + first, mask=wanted, other=0) + 1
        begin = tl.load(item_splits + item, mask=counts, other=0) * split
        length = tl.minimum(tl.maximum(reached - begin, 0), split)
        tl.store(lengths + item, tl.where(wanted, length, 0), mask=exists)


def begin_step(
    state: Any,
    tables: Tensor,
    page_size: int,
    inv_freq: Tensor,
    rope_scaling: float,
    items: Any,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`icon2_rt.ops.begin_step`; ``state`` and ``items`` are its ``RowState`` and ``AttentionItems``."""
    rows = tables.shape[0]
    n_items, width = items.rows.shape
    half = inv_freq.shape[0]
    slots = torch.empty(rows, dtype=torch.int64, device=tables.device)
    cos = torch.empty(rows, 1, 2 * half, dtype=dtype, device=tables.device)
    sin = torch.empty_like(cos)
    begin_step_kernel[(rows + triton.cdiv(n_items, ITEMS),)](
        state.positions,
        state.running,
        rows,
        tables,
        tables.stride(0),
        page_size,
        inv_freq,
        rope_scaling,
        half,
        slots,
        cos,
        sin,
        items.rows,
        width,
        items.rows.stride(0),
        items.splits,
        items.count,
        n_items,
        items.split,
        items.lengths,
        items.n_splits,
        ITEMS=ITEMS,
        WIDTH=triton.next_power_of_2(width),
        HALF=triton.next_power_of_2(half),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return slots, cos, sin
