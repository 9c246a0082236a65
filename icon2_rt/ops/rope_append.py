"""Heads out of the fused projection, optional q/k norm, rotary embedding, and K and V into their page slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        cos, sin: ``[rows, 1, d]`` of each row's position in qkv's dtype, both halves alike but for the sign of sin,
            which is negative in the first: x rotated is x · cos + roll(x, d/2) · sin.
        q_norm, k_norm: ``[d]`` RMSNorm weights (Qwen3) or None. eps: their epsilon.
        k_pages, v_pages: ``[pages, page_size, KV, d]`` of this block; written in place.
        slots: ``[rows]`` int64, page · page_size + offset; no two rows have the same. A row of slot -1
            writes nothing.

    Returns:
        q ``[rows, H, d]``, rotated.
    """
    _, _, kv_heads, d = k_pages.shape
    heads = qkv.view(qkv.shape[0], -1, d)
    q_heads = heads.shape[1] - 2 * kv_heads
    qk, v = heads[:, :-kv_heads], heads[:, -kv_heads:]
    if q_norm is not None and k_norm is not None:
        qk = torch.cat([_rms_norm(qk[:, :q_heads], q_norm, eps), _rms_norm(qk[:, q_heads:], k_norm, eps)], dim=1)
    qk = torch.addcmul(qk * cos, qk.roll(d // 2, dims=-1), sin)
    k, writes = qk[:, q_heads:], slots >= 0
    if not writes.all():
        k, v, slots = k[writes], v[writes], slots[writes]
    k_pages.view(-1, kv_heads, d).index_copy_(0, slots, k)
    v_pages.view(-1, kv_heads, d).index_copy_(0, slots, v)
    return qk[:, :q_heads]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype)
