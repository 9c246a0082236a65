"""Decode attention over paged KV: work items that several rows share.

An *item* is a KV range of one split together with the rows that read it. Splits begin at multiples of the split
size in absolute position, and rows that have the same pages in a split are one item, so a prompt's KV is read once
for all branches of its group. A row's items are merged at the end in the order of their positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from icon2_rt.ops.state import RowState


@dataclass(frozen=True)
class AttentionItems:
    """n work items, each at most R rows wide and one split (P pages of page_size tokens) long, for ``batch`` rows.

    The first six say which items there are, and change when rows join, leave or come near the next split; the last two
    follow from the rows' positions and are written by every step (:meth:`update`).

    Attributes:
        rows: ``[n, R]`` int32, the rows of each item, -1 in unused places. R times the query heads of a KV head is at
            most 16 where a kernel reads them: one tensor-core tile. A larger group is several adjacent items.
        pages: ``[n, P]`` int32, the pages of the split (any valid page where a split is not filled).
        splits: ``[n]`` int32, which split of its rows: it begins at position split · split size. Rows that share an
            item have all of its split behind them.
        layers: ``[n, 2]`` int32, the blocks [first, last) for which the item holds.
        count: ``[1]`` int32, how many of the n there are; what comes after is to be passed over.
        starts: ``[batch]`` int32: a row's split s has its partial result at place ``starts[row] + s``.
        lengths: ``[n]`` int32, how many positions of the split exist now; 0 = nobody needs the item now.
        n_splits: ``[batch]`` int32, how many partial results a row has now; 0 for a seat that is not running.
        split: positions of a split. n_partials: how many places there are for partial results.
        dense: the host knows that all n items and all rows count in this step.
        partials, partial_lse: ``[n_partials, H, d]`` and ``[n_partials, H]`` fp32, memory for the partial results and
            their log-sum-exps, for ops that leave them there; None: such an op allocates them in every call.
    """

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
    dense: bool = False
    partials: Tensor | None = None
    partial_lse: Tensor | None = None

    def update(self, state: RowState) -> None:
        """Write ``lengths`` and ``n_splits`` for the positions in ``state``."""
        rows = self.rows
        if not self.dense:  # what comes after count may speak of seats that are not run now
            rows = torch.where((torch.arange(len(rows), device=rows.device) < self.count)[:, None], rows, -1)
        seats = rows.clamp(min=0)
        lengths = (state.positions[seats[:, 0]] + 1 - self.splits * self.split).clamp(0, self.split)
        n_splits = state.positions // self.split + 1
        if not self.dense:
            lengths = torch.where((state.running[seats] & (rows >= 0)).any(dim=1), lengths, 0)
            n_splits = torch.where(state.running, n_splits, 0)
        self.lengths.copy_(lengths)
        self.n_splits.copy_(n_splits)
        for by_head in self._by_head.values():
            by_head.masks.clear()

    @cached_property
    def _held(self) -> dict[int, tuple[int, ...]]:
        return {}

    @cached_property
    def _by_head(self) -> dict[tuple[tuple[int, ...], int, int], ItemsByHead]:
        return {}

    def by_head(self, layer: int, heads: int, kv_heads: int) -> ItemsByHead:
        """The items that hold at ``layer``, spelled out for the reference: worked out once, for as long as the first
        six tensors are what they are."""
        if layer not in self._held:
            held = (self.layers[:, 0] <= layer) & (layer < self.layers[:, 1])
            held &= torch.arange(len(held), device=held.device) < self.count
            self._held[layer] = tuple(held.nonzero()[:, 0].tolist())
        key = (self._held[layer], heads, kv_heads)
        if key not in self._by_head:
            self._by_head[key] = _spell_out(
                self, torch.tensor(key[0], dtype=torch.int64, device=self.rows.device), heads, kv_heads
            )
        return self._by_head[key]


@dataclass(frozen=True)
class ItemsByHead:
    """The items of some blocks with an index for every head, so that each gather is one of head vectors.

    Attributes:
        items: ``[n]`` int64, which of all items these are. pages: ``[n · P]`` int32.
        query: ``[n · KV · R · g]`` int64, where in ``q [batch · H, d]`` each query of the items is (g = H / KV heads
            share a KV head; an unused place repeats row 0). None where item i is all of row i and of nothing else.
        merge: ``[M · batch · H]`` int64, where in the items' results, laid out ``[n, R · g, KV]``, the parts of each
            row's heads are, by position. merge_mask: ``[M, batch · H]`` fp32, -inf where a row has no such part.
        masks: what this step's lengths make of it; see :meth:`mask`.
    """

    items: Tensor
    pages: Tensor
    query: Tensor | None
    merge: Tensor
    merge_mask: Tensor
    masks: dict[torch.dtype, Tensor]

    def mask(self, lengths: Tensor, span: int, dtype: torch.dtype) -> Tensor:
        """``[n, 1, 1, span]``: 0 where a position exists in this step, -inf where it does not. An item without any
        shows its first, so that its softmax is finite."""
        if dtype not in self.masks:
            hidden = torch.arange(span, device=lengths.device) >= lengths[self.items].clamp(min=1)[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill_(hidden, -torch.inf)
            self.masks[dtype] = mask[:, None, None, :]
        return self.masks[dtype]


def _spell_out(items: AttentionItems, index: Tensor, heads: int, kv_heads: int) -> ItemsByHead:
    rows, splits = items.rows[index].long(), items.splits[index].long()
    (n, width), batch, group = rows.shape, len(items.starts), heads // kv_heads
    head = torch.arange(heads, device=rows.device)
    query = rows.clamp(min=0)[:, None, :, None] * heads + head.view(kv_heads, 1, group)  # [n, KV, R, g]
    depth = int(splits.max()) + 1 if n else 0
    used = rows >= 0
    at = (splits[:, None].expand_as(rows)[used], rows[used])
    place = torch.zeros(depth, batch, dtype=torch.int64, device=rows.device)
    place[at] = torch.arange(n * width, device=rows.device).view(n, width)[used]
    there = torch.full((depth, batch), -torch.inf, device=rows.device)
    there[at] = 0.0
    merge = (place[..., None] * group + head % group) * kv_heads + head // group
    alone = depth == 1 and width == 1 and n == batch and bool((rows[:, 0] == torch.arange(n, device=rows.device)).all())
    return ItemsByHead(
        items=index,
        pages=items.pages[index].flatten(),
        query=None if alone else query.flatten(),
        merge=merge.flatten(),
        merge_mask=there[..., None].expand(-1, -1, heads).reshape(depth, batch * heads),
        masks={},
    )


def grouped_decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, items: AttentionItems, scale: float, layer: int
) -> Tensor:
    """One query position per row against the KV that its items name.

    Args:
        q: ``[batch, H, d]``. k_pages, v_pages: ``[pages, page_size, KV, d]`` of block ``layer``. scale: 1/√d.

    Returns:
        ``[batch, H · d]`` in q's dtype; softmax and the merge are fp32. 0 for a seat that is not running.
    """
    batch, heads, d = q.shape
    kv_heads = k_pages.shape[2]
    here = items.by_head(layer, heads, kv_heads)
    n, group = len(here.items), heads // kv_heads
    if n == 0:  # every seat is empty
        return q.new_zeros(batch, heads * d)
    attend = attend_with_lse_on_cpu if q.device.type == "cpu" else attend_with_lse
    k, v = _gather(k_pages, here.pages, n), _gather(v_pages, here.pages, n)  # [n, KV, S, d]
    mask = here.mask(items.lengths, k.shape[2], q.dtype)
    if here.query is None and items.dense:
        out, _ = attend(q.view(n, kv_heads, group, d), k, v, mask, scale)
        return out.reshape(batch, heads * d)
    query = torch.arange(batch * heads, device=q.device) if here.query is None else here.query
    q = q.reshape(-1, d).index_select(0, query).view(n, kv_heads, -1, d)
    out, lse = attend(q, k, v, mask, scale)
    if not items.dense:
        lse = lse.masked_fill((items.lengths[here.items] == 0)[:, None, None], -torch.inf)
    parts = out.transpose(1, 2).reshape(-1, d).index_select(0, here.merge).view(*here.merge_mask.shape, d)
    lse = lse.transpose(1, 2).reshape(-1).index_select(0, here.merge).view(here.merge_mask.shape)
    weight = (lse + here.merge_mask).softmax(dim=0)  # [M, batch · H]
    if not items.dense:
        weight = weight.masked_fill((items.n_splits == 0).repeat_interleave(heads), 0.0)  # idle seats: NaN, too
    return (weight[..., None] * parts).sum(dim=0).to(q.dtype).view(batch, heads * d)


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention that also returns the log-sum-exp of the scores (natural log), by which parts are merged.

    Args:
        q: ``[n, heads, queries, d]``. k, v: ``[n, heads, S, d]``. mask: ``[n, 1, 1, S]``, added to the scores.

    Returns:
        ``[n, heads, queries, d]`` in q's dtype; ``[n, heads, queries]`` fp32.
    """
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale + mask.float()
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def attend_with_lse_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`attend_with_lse` as one fused operation: what F.scaled_dot_product_attention runs on a CPU, called by its
    own name because the public one keeps the log-sum-exp to itself. 18 µs against 62 µs (2 items of 128 positions, one
    thread)."""
    out: Tensor
    lse: Tensor
    out, lse = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return out, lse


def _gather(pages: Tensor, index: Tensor, n: int) -> Tensor:
    """``[pages, page_size, KV, d]`` and ``[n · P]`` → ``[n, KV, P · page_size, d]``."""
    _, _, kv_heads, d = pages.shape
    return pages.index_select(0, index).view(n, -1, kv_heads, d).transpose(1, 2)
