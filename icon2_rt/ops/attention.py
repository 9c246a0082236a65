"""Attention over paged KV: decode (work items that several rows share) and prefill (packed prompts).

A decode *item* is a KV range of one split together with the rows that read it. Splits begin at multiples of the split
size in absolute position, and rows that have the same pages in a split are one item, so a prompt's KV is read once
for all branches of its group. A row's items are merged at the end in the order of their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionItems:
    """n work items of one decode step, each at most R rows wide and one split (P pages of page_size tokens) long.

    Attributes:
        rows: ``[n, R]`` int64, the rows of each item (unused places repeat any row; nothing refers to their result).
        pages: ``[n, P]`` int64, the pages of the split (unused places repeat any page; ``mask`` hides them).
        mask: ``[n, 1, 1, P · page_size]`` in q's dtype, 0 where the position exists and -inf where it does not; at
            least one exists in every item.
        merge: ``[batch, M]`` int64, for every row its items' places in the flattened ``n · R``, by position. None where
            item i is all of row i and of nothing else.
        merge_mask: ``[batch, M, 1]`` fp32, -inf for a row with fewer than M items.
    """

    rows: Tensor
    pages: Tensor
    mask: Tensor
    merge: Tensor | None
    merge_mask: Tensor

    @cached_property
    def _by_head(self) -> dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
        return {}

    def by_head(self, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """``rows``, ``merge`` and ``merge_mask`` spelled out for every head: each is then one gather of head vectors.

        Returns:
            ``[n · KV · R · g]`` int64, where in ``q [batch · H, d]`` each query of the items is (g = H / KV heads share
            a KV head); ``[M · batch · H]`` int64, where in the items' results, laid out ``[n, R · g, KV]``, the parts
            of each row's heads are; ``[M, batch · H]`` fp32. Worked out once for all blocks and steps.
        """
        assert self.merge is not None
        if (heads, kv_heads) not in self._by_head:
            group = heads // kv_heads
            head = torch.arange(heads, device=self.rows.device)
            by_kv = head.view(kv_heads, 1, group)
            query = self.rows[:, None, :, None] * heads + by_kv  # [n, KV, R, g]
            place = self.merge.t()[..., None] * group + head % group  # [M, batch, H]: item · R · g + place in it
            mask = self.merge_mask.transpose(0, 1).expand(-1, -1, heads)
            self._by_head[heads, kv_heads] = (
                query.flatten(),
                (place * kv_heads + head // group).flatten(),
                mask.reshape(len(mask), -1),
            )
        return self._by_head[heads, kv_heads]


def grouped_decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, items: AttentionItems, scale: float
) -> Tensor:
    """One query position per row against the KV that its items name.

    Args:
        q: ``[batch, H, d]``. k_pages, v_pages: ``[pages, page_size, KV, d]`` of this block. scale: 1/√d.

    Returns:
        ``[batch, H · d]`` in q's dtype; softmax and the merge are fp32.
    """
    batch, heads, d = q.shape
    n, r = items.rows.shape
    kv_heads = k_pages.shape[2]
    group = heads // kv_heads
    attend = attend_with_lse_on_cpu if q.device.type == "cpu" else attend_with_lse
    k, v = _gather(k_pages, items.pages), _gather(v_pages, items.pages)  # [n, KV, S, d]
    if items.merge is None:
        out, _ = attend(q.view(n, kv_heads, group, d), k, v, items.mask, scale)
        return out.reshape(batch, heads * d)
    query, merge, merge_mask = items.by_head(heads, kv_heads)
    q = q.reshape(-1, d).index_select(0, query).view(n, kv_heads, r * group, d)
    out, lse = attend(q, k, v, items.mask, scale)
    parts = out.transpose(1, 2).reshape(-1, d).index_select(0, merge).view(*merge_mask.shape, d)
    lse = lse.transpose(1, 2).reshape(-1).index_select(0, merge).view(merge_mask.shape)
    weight = (lse + merge_mask).softmax(dim=0)  # [M, batch · H]
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


def _gather(pages: Tensor, index: Tensor) -> Tensor:
    """``[pages, page_size, KV, d]`` and ``[n, P]`` → ``[n, KV, P · page_size, d]``."""
    _, page_size, kv_heads, d = pages.shape
    n, p = index.shape
    return pages.index_select(0, index.view(-1)).view(n, p * page_size, kv_heads, d).transpose(1, 2)


@dataclass(frozen=True)
class Segment:
    """A run of one prompt's tokens in a packed prefill.

    Its queries are rows ``[begin, end)`` of the pack and stand at absolute positions ``[start, start + end - begin)``;
    ``pages`` (``[n]`` int64) hold the KV of positions ``[0, start + end - begin)``, this run's own included.
    """

    begin: int
    end: int
    start: int
    pages: Tensor


def prefill_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, segments: Sequence[Segment], scale: float) -> Tensor:
    """Causal attention of packed prompts, each over its own pages.

    Args:
        q: ``[tokens, H, d]``, the segments one after the other. k_pages, v_pages: ``[pages, page_size, KV, d]``, this
            call's K and V already written. scale: 1/√d.

    Returns:
        ``[tokens, H · d]`` in q's dtype.
    """
    tokens, heads, d = q.shape
    out = q.new_empty(tokens, heads, d)
    for s in segments:
        n = s.end - s.begin
        length = s.start + n
        k = _gather(k_pages, s.pages[None])[:, :, :length]
        v = _gather(v_pages, s.pages[None])[:, :, :length]
        # torch's is_causal is aligned top-left: right only where there is no earlier KV.
        mask = None if s.start == 0 else torch.ones(n, length, dtype=torch.bool, device=q.device).tril(s.start)
        queries = q[s.begin : s.end].transpose(0, 1)[None]
        seen = F.scaled_dot_product_attention(
            queries, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=heads != k_pages.shape[2]
        )
        out[s.begin : s.end] = seen[0].transpose(0, 1)
    return out.view(tokens, heads * d)
