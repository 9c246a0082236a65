"""Decode attention over paged KV that reads what rows share once: one launch over work items, one that merges.

An item is a split (a fixed range of absolute positions) and the rows that read it. A unit of work is an item and one of
its KV heads. Its query rows, the rows' heads that share the KV head, are packed into the 16 rows of one tensor-core
tile: a pair at 4 query heads per KV head fills 8 of them, so the second branch costs neither bytes nor instructions.
Larger groups are adjacent items, whose second read hits L2. The tile is the same for every item and every batch, each
of its rows is computed by itself, and a split's place follows from absolute positions: so a row has the same bytes
alone and in company, shared and unshared.

The split kernel is a persistent grid: program i does units i, i + grid, … of as many as the device's own count says, so
that a graph can be replayed over a changing list. Neighbouring programs read neighbouring heads of the same pages. Per
unit, K and V of the positions that exist are read once, 16 bytes a thread, two tiles ahead: a split of 128 positions is
in flight as a whole before the first product. Its result is normalised and goes to a place of its own, in fp32, with
its log-sum-exp (base 2); the merge weighs a row's places in the order of their positions.

Bytes per block of Llama-3-8B (8 KV heads of 128, bf16, splits of 128 positions): a unit reads 64 KiB of K and V and
writes 4 KiB of partial results for a pair, which the merge reads: from L2 where they fit (half a megabyte for a pair of
2048 positions). Predicted at 4.3 TB/s: one such pair has 128 units, one for each of 132 multiprocessors; its 8.4 MB are
2.0 µs, less than the latency of three dependent reads (count, item, K and V), so about 4 µs, and 2 µs for the merge.
128 of them have 16 384 units, 42 for each of 396 resident programs: 1.07 GB of KV and 0.13 GB of partial results
written and read, 0.25 to 0.28 ms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from icon2_rt.kernels.budget import Budget
from icon2_rt.kernels.device import multiprocessors, shared_memory

# Query rows of a tile: the smallest that a tensor core takes, and never another (see above).
TILE_ROWS = 16

# 65 536 registers and the 228 KiB of a multiprocessor of sm_90 and sm_100 hold 3 programs of 128 threads of this size,
# sm_80's 164 KiB hold 2. The 100 KiB of sm_86, sm_89 and sm_120 would hold 1: there the pipeline is a tile shorter,
# for 2.
SPLIT_BUDGET = Budget(registers=160, shared=75_000, narrow_loads=18, registers_on={86: 168, 89: 168})
# A warp reads each of its log-sum-exps with one load that all of its threads make. sm_86 holds 16 programs whatever
# their size, so the compiler takes up to 128 registers there.
MERGE_BUDGET = Budget(registers=96, shared=128, narrow_loads=19, registers_on={86: 128})

# What a multiprocessor has of registers, and what it takes of its shared memory for every program beside the program's.
_REGISTERS, _FOR_A_PROGRAM = 65_536, 1024
# Registers a thread of the programs of 256 threads, which heads of more than 128 have.
_WIDE = 128


@dataclass(frozen=True)
class Tile:
    """How the split kernel walks through a split: ``positions`` at a time, ``stages`` - 1 tiles of them in flight.
    ``shared`` is what a program takes of shared memory, in bytes."""

    positions: int
    stages: int
    warps: int
    shared: int

    def resident(self, memory: int) -> int:
        """Programs that a multiprocessor with ``memory`` bytes of shared memory holds at once."""
        registers = _WIDE if self.warps == 8 else max(SPLIT_BUDGET.registers, *SPLIT_BUDGET.registers_on.values())
        return max(1, min(memory // (self.shared + _FOR_A_PROGRAM), _REGISTERS // (32 * self.warps * registers)))


def tile_for(d: int, dtype: torch.dtype, split: int, memory: int) -> Tile:
    """Tiles of K of 16 KiB, or 8 KiB in fp32, whose products without tensor cores need more registers: as many
    positions as that is, but no more than the split has. Two tiles in flight where a multiprocessor, with ``memory``
    bytes of shared memory, then still holds two programs; else one: a program that waits needs another beside it."""
    padded = max(16, triton.next_power_of_2(d))
    elements = 8192 if dtype.itemsize == 2 else 2048
    positions = max(16, min(128, elements // padded, triton.next_power_of_2(split)))

    def with_stages(stages: int) -> Tile:
        # K and V of each tile in flight; the queries; the weights of a tile's positions; a few words.
        numbers = 2 * (stages - 1) * positions * padded + TILE_ROWS * (padded + positions)
        return Tile(positions, stages, 8 if padded > 128 else 4, numbers * dtype.itemsize + 64)

    long = with_stages(3)
    return long if long.resident(memory) > 1 else with_stages(2)


class AttentionItems(Protocol):
    """What is read of :class:`icon2_rt.ops.AttentionItems`."""

    rows: Tensor
    pages: Tensor
    splits: Tensor
    layers: Tensor
    count: Tensor
    starts: Tensor
    lengths: Tensor
    n_splits: Tensor
    split: int
    n_partials: int


# layer is not specialised on: one binary for all blocks.
@triton.jit(do_not_specialize=["layer"])
def split_kernel(
    q,
    k_pages,
    v_pages,
    rows,
    pages,
    splits,
    layers,
    count,
    starts,
    lengths,
    parts,
    lse,
    scale_log2,
    layer,
    q_stride,
    rows_stride,
    pages_stride,
    ITEM_ROWS: tl.constexpr,
    ITEM_PAGES: tl.constexpr,
    ITEM_PAGES_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES_TOUCHED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    m = tl.arange(0, M)
    t = tl.arange(0, TILE)
    d = tl.arange(0, D_PADDED)
    nth = tl.arange(0, ITEM_PAGES_PADDED)
    inside = (d < D)[None, :]
    n_units = tl.load(count) * KV_HEADS
    for unit in range(tl.program_id(0), n_units, tl.num_programs(0)):
        item = unit // KV_HEADS
        kv_head = unit % KV_HEADS
        # All that says what the item is, in one go: nothing of it waits for another.
        first = tl.load(layers + 2 * item)
        last = tl.load(layers + 2 * item + 1)
        length = tl.load(lengths + item)
        split = tl.load(splits + item)
        ids = tl.load(pages + item * pages_stride + nth, mask=nth < ITEM_PAGES, other=0)
        row = tl.load(rows + item * rows_stride + m // GROUP, mask=m < ITEM_ROWS * GROUP, other=-1)
        if (first <= layer) & (layer < last) & (length > 0):
            used = row >= 0
            head = kv_head * GROUP + m % GROUP
            start = tl.load(starts + row, mask=used, other=0)
            q_at = row.to(tl.int64)[:, None] * q_stride + head[:, None] * D + d[None, :]
            q_tile = tl.load(q + q_at, mask=used[:, None] & inside, other=0.0)
            top = tl.full([M], float("-inf"), tl.float32)
            mass = tl.zeros([M], tl.float32)
            out = tl.zeros([M, D_PADDED], tl.float32)
            for begin in range(0, length, TILE):
                at = begin + t
                exists = at < length
                page = tl.zeros([TILE], tl.int32)
                for i in tl.static_range(PAGES_TOUCHED):
                    here = begin // PAGE + i
                    page = tl.where(at // PAGE == here, tl.sum(tl.where(nth == here, ids, 0), 0), page)
                slot = page.to(tl.int64) * PAGE + at % PAGE
                kv_at = (slot * KV_HEADS + kv_head)[:, None] * D + d[None, :]
                # Positions that do not exist are not read, and count as 0 whatever their bytes are.
                k = tl.load(k_pages + kv_at, mask=exists[:, None] & inside, other=0.0)
                v = tl.load(v_pages + kv_at, mask=exists[:, None] & inside, other=0.0)
                scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale_log2
                scores = tl.where(exists[None, :], scores, float("-inf"))
                # Every tile has a position that exists, so the maximum is finite from the first on.
                new_top = tl.maximum(top, tl.max(scores, 1))
                shrink = tl.exp2(top - new_top)
                p = tl.exp2(scores - new_top[:, None])
                mass = mass * shrink + tl.sum(p, 1)
                out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
                top = new_top
            place = (start + split).to(tl.int64) * HEADS + head
            tl.store(lse + place, top + tl.log2(mass), mask=used)
            tl.store(parts + place[:, None] * D + d[None, :], out / mass[:, None], mask=used[:, None] & inside)


@triton.jit
def merge_kernel(
    parts,
    lse,
    starts,
    n_splits,
    out,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, D_PADDED)
    inside = d < D
    n = tl.load(n_splits + row)
    start = tl.load(starts + row).to(tl.int64)
    top = float("-inf")
    mass = 0.0
    total = tl.zeros([D_PADDED], tl.float32)
    for begin in range(0, n, BLOCK):
        split = begin + tl.arange(0, BLOCK)
        there = split < n
        place = (start + split) * HEADS + head
        weight = tl.load(lse + place, mask=there, other=float("-inf"))
        part = tl.load(parts + place[:, None] * D + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(weight, 0))
        # Guards on both sides: an empty part weighs nothing, and does not spoil what is there or comes.
        weight = tl.where(weight == float("-inf"), 0.0, tl.exp2(weight - new_top))
        shrink = tl.where(top == float("-inf"), 0.0, tl.exp2(top - new_top))
        mass = mass * shrink + tl.sum(weight, 0)
        total = total * shrink + tl.sum(tl.where(weight[:, None] == 0.0, 0.0, part * weight[:, None]), 0)
        top = new_top
    total = tl.where(mass == 0.0, 0.0, total / tl.where(mass == 0.0, 1.0, mass))
    tl.store(out + (row * HEADS + head) * D + d, total.to(out.dtype.element_ty), mask=inside)


def grouped_decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, items: AttentionItems, scale: float, layer: int
) -> Tensor:
    """See :func:`icon2_rt.ops.grouped_decode_attention`. Rows of q, of ``items.rows`` and of ``items.pages``
    may be apart (parts of wider buffers); all else is contiguous.

    Raises:
        ValueError: an item has more query rows than a tile.
    """
    batch, heads, d = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    (n, item_rows), item_pages = items.rows.shape, items.pages.shape[1]
    group = heads // kv_heads
    if item_rows * group > TILE_ROWS:
        raise ValueError(
            f"an item holds {item_rows} rows of {group} query heads for each KV head, {item_rows * group} in all: the "
            f"kernel's tile has {TILE_ROWS}. Give items of at most {max(1, TILE_ROWS // group)} rows"
            + (", and use backend='reference' for this model." if group > TILE_ROWS else ".")
        )
    memory = shared_memory(q.device)
    tile = tile_for(d, q.dtype, items.split, memory)
    d_padded = max(16, triton.next_power_of_2(d))
    parts, lse = items.partials, items.partial_lse
    if parts is None or lse is None:
        parts = torch.empty(items.n_partials, heads, d, dtype=torch.float32, device=q.device)
        lse = torch.empty(items.n_partials, heads, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads * d, dtype=q.dtype, device=q.device)
    split_kernel[(min(n * kv_heads, tile.resident(memory) * multiprocessors(q.device)),)](
        q,
        k_pages,
        v_pages,
        items.rows,
        items.pages,
        items.splits,
        items.layers,
        items.count,
        items.starts,
        items.lengths,
        parts,
        lse,
        scale * math.log2(math.e),
        layer,
        q.stride(0),
        items.rows.stride(0),
        items.pages.stride(0),
        ITEM_ROWS=item_rows,
        ITEM_PAGES=item_pages,
        ITEM_PAGES_PADDED=triton.next_power_of_2(item_pages),
        PAGE=page_size,
        PAGES_TOUCHED=_pages_touched(tile.positions, page_size),
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=d,
        D_PADDED=d_padded,
        M=TILE_ROWS,
        TILE=tile.positions,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    # One warp a program: it holds 8 KiB of partial results, 16 bytes a thread and load, and waits for no other warp.
    merge_kernel[(batch, heads)](
        parts,
        lse,
        items.starts,
        items.n_splits,
        out,
        HEADS=heads,
        D=d,
        D_PADDED=d_padded,
        BLOCK=max(4, min(32, 2048 // d_padded)),
        num_warps=1,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return out


def _pages_touched(tile: int, page_size: int) -> int:
    """The most pages that a tile lies in, which begins at a multiple of its own size."""
    if page_size % tile == 0:
        return 1
    return tile // page_size if tile % page_size == 0 else tile // page_size + 2
