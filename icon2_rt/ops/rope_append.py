"""Heads out of the fused projection, optional q/k norm, rotary embedding, and K and V into their page slots."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotate q and k by their positions, write k and v to ``slots``, return q.

    Args:
        qkv: ``[rows, (H + 2·KV)·d]``, the heads of q, then k, then v.
        cos, sin: ``[rows, d]`` of each row's position, both halves alike, in qkv's dtype.
        q_norm, k_norm: ``[d]`` RMSNorm weights (Qwen3) or None. eps: their epsilon.
        k_pages, v_pages: ``[pages, KV, page_size, d]`` of this block; written in place.
        slots: ``[rows]`` int64, page · page_size + offset; a row's slot is its own, -1 writes nothing.

    Returns:
        q ``[rows, H, d]``, rotated.
    """
    rows = qkv.shape[0]
    _, kv_heads, page_size, d = k_pages.shape
    heads = qkv.view(rows, -1, d)
    q_heads = heads.shape[1] - 2 * kv_heads
    qk, v = heads[:, : q_heads + kv_heads], heads[:, q_heads + kv_heads :]
    if q_norm is not None and k_norm is not None:
        qk = torch.cat([_rms_norm(qk[:, :q_heads], q_norm, eps), _rms_norm(qk[:, q_heads:], k_norm, eps)], dim=1)
    half = d // 2
    rotated = torch.cat((-qk[..., half:], qk[..., :half]), dim=-1)
    qk = qk * cos[:, None] + rotated * sin[:, None]
    k = qk[:, q_heads:]
    page, offset = slots // page_size, slots % page_size
    if rows and int(slots.min()) < 0:
        kept = slots >= 0
        page, offset, k, v = page[kept], offset[kept], k[kept], v[kept]
    k_pages[page, :, offset] = k
    v_pages[page, :, offset] = v
    return qk[:, :q_heads]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
