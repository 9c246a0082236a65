"""Attention over paged KV: decode (work items that several rows share) and prefill (packed prompts).

A decode *item* is a KV range of one split together with the rows that read it. Splits begin at multiples of the split
size in absolute position, and rows that have the same pages in a split are one item, so a prompt's KV is read once
for all branches of its group. A row's items are merged at the end in the order of their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionItems:
    """n work items of one decode step, each at most R rows wide and one split (P pages of page_size tokens) long.

    Attributes:
        rows: ``[n, R]`` int64, the rows of each item (unused places repeat any row; nothing refers to their result).
        pages: ``[n, P]`` int64, the pages of the split (unused places repeat any page; ``mask`` hides them).
        mask: ``[n, P · page_size]`` fp32, 0 where the position exists and -inf where it does not; ≥ 1 exists per item.
        merge: ``[batch, M]`` int64, for every row its items' places in the flattened ``n · R``, by position.
        merge_mask: ``[batch, M]`` fp32, -inf for a row with fewer than M items.
    """

    rows: Tensor
    pages: Tensor
    mask: Tensor
    merge: Tensor
    merge_mask: Tensor


def grouped_decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, items: AttentionItems, scale: float
) -> Tensor:
    """One query position per row against the KV that its items name.

    Args:
        q: ``[batch, H, d]``. k_pages, v_pages: ``[pages, KV, page_size, d]`` of this block. scale: 1/√d.

    Returns:
        ``[batch, H · d]`` in q's dtype; scores, softmax and the merge are fp32.
    """
    batch, heads, d = q.shape
    n, r = items.rows.shape
    kv_heads = k_pages.shape[1]
    group = heads // kv_heads
    k, v = _gather(k_pages, items.pages), _gather(v_pages, items.pages)  # [n, KV, S, d]
    q = q[items.rows].view(n, r, kv_heads, group, d).transpose(1, 2).reshape(n, kv_heads, r * group, d)
    scores = (q * scale @ k.transpose(-1, -2)).float() + items.mask[:, None, None, :]
    lse = scores.logsumexp(dim=-1)  # [n, KV, r * group], natural log
    out = (scores - lse[..., None]).exp_().to(v.dtype) @ v
    out = out.view(n, kv_heads, r, group, d).transpose(1, 2).reshape(n * r, heads, d)
    if items.merge.shape[1] == 1:
        return out[items.merge[:, 0]].view(batch, heads * d)
    lse = lse.view(n, kv_heads, r, group).transpose(1, 2).reshape(n * r, heads)
    weight = (lse[items.merge] + items.merge_mask[:, :, None]).softmax(dim=1)  # [batch, M, H]
    merged = (weight[..., None] * out[items.merge].float()).sum(dim=1)
    return merged.to(q.dtype).view(batch, heads * d)


def _gather(pages: Tensor, index: Tensor) -> Tensor:
    """``[pages, KV, page_size, d]`` → ``[n, KV, P · page_size, d]``."""
    n, p = index.shape
    _, kv_heads, page_size, d = pages.shape
    found = pages.index_select(0, index.flatten())
    if p == 1:
        return found
    return found.view(n, p, kv_heads, page_size, d).transpose(1, 2).reshape(n, kv_heads, p * page_size, d)


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
        q: ``[tokens, H, d]``, the segments one after the other. k_pages, v_pages: ``[pages, KV, page_size, d]``, this
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
            queries, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=heads != k_pages.shape[1]
        )
        out[s.begin : s.end] = seen[0].transpose(0, 1)
    return out.view(tokens, heads * d)
