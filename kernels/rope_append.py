"""Heads out of the fused projection, optional q/k norm, rotary embedding, and K and V into their page slots.

A program takes a row and 16 of its heads, whichever of q, k and v they are. It loads the two halves of each head
apart, because element j turns with element j + d/2: so nothing is read twice and nothing is exchanged between threads.

Bytes per row, with e bytes an element: (H + 2·KV)·d·e read and as much written, and 2·d·e of cos and sin for each
program, all but the first from a cache: 12 KiB and 12 KiB in Llama-3-8B. At 256 rows that is 6 MiB, 2 µs of an H100's
3.35 TB/s (predicted, not measured); below, what a launch costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from icon2_rt.kernels.budget import Budget

BUDGET = Budget(registers=72, shared=0, narrow_loads=1)

HEADS = 16


@triton.jit
def _normed(low, high, weight, eps, cols, inside, DIM: tl.constexpr):
    """RMSNorm of heads that lie in two halves; rounded before the weight and after it, as torch's operations round."""
    scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / DIM + eps)[:, None]
    dtype = weight.dtype.element_ty
    w_low = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    w_high = tl.load(weight + DIM // 2 + cols, mask=inside, other=0.0).to(tl.float32)
    low = (w_low * (low * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    high = (w_high * (high * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return low, high


@triton.jit
def rope_append_kernel(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    k_pages,
    v_pages,
    slots,
    out,
    qkv_stride,
    q_heads,
    kv_heads,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    # As wide as the heads' tile, so that what all heads share is loaded into the threads that use it.
    cols = tl.broadcast_to(tl.arange(0, TILE)[None, :], [HEADS, TILE])
    half: tl.constexpr = DIM // 2
    inside = cols < half
    is_q = head < q_heads
    is_v = head >= q_heads + kv_heads
    here = inside & (head < q_heads + 2 * kv_heads)

    at = qkv + row * qkv_stride + head * DIM + cols
    low_in = tl.load(at, mask=here, other=0.0)
    high_in = tl.load(at + half, mask=here, other=0.0)
    turn = row * DIM + cols
    cos_low = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + turn + half, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + turn + half, mask=inside, other=0.0).to(tl.float32)

    low, high = low_in.to(tl.float32), high_in.to(tl.float32)
    if q_norm is not None:
        q_low, q_high = _normed(low, high, q_norm, eps, cols, inside, DIM)
        k_low, k_high = _normed(low, high, k_norm, eps, cols, inside, DIM)
        low, high = tl.where(is_q, q_low, k_low), tl.where(is_q, q_high, k_high)
    # The first product is rounded, the second and the sum are one operation (torch.addcmul).
    dtype = qkv.dtype.element_ty
    turned_low = ((low * cos_low).to(dtype).to(tl.float32) + high * sin_low).to(dtype)
    turned_high = ((high * cos_high).to(dtype).to(tl.float32) + low * sin_high).to(dtype)

    q_at = out + (row * q_heads + head) * DIM + cols
    tl.store(q_at, turned_low, mask=here & is_q)
    tl.store(q_at + half, turned_high, mask=here & is_q)
    is_k = (head >= q_heads) & (head < q_heads + kv_heads) & (slot >= 0)
    k_at = k_pages + (slot * kv_heads + head - q_heads) * DIM + cols
    tl.store(k_at, turned_low, mask=here & is_k)
    tl.store(k_at + half, turned_high, mask=here & is_k)
    v_at = v_pages + (slot * kv_heads + head - q_heads - kv_heads) * DIM + cols
    tl.store(v_at, low_in, mask=here & is_v & (slot >= 0))
    tl.store(v_at + half, high_in, mask=here & is_v & (slot >= 0))


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
    """See :func:`icon2_rt.ops.rope_append`; the result is contiguous."""
    _, _, kv_heads, d = k_pages.shape
    assert k_pages.is_contiguous() and v_pages.is_contiguous(), "a slot's address is slot · KV · d"
    rows, heads = qkv.shape[0], qkv.shape[1] // d
    q_heads = heads - 2 * kv_heads
    out = torch.empty(rows, q_heads, d, dtype=qkv.dtype, device=qkv.device)
    tile = triton.next_power_of_2(d // 2)
    # One 16-byte load of each half a thread, so that a row's few programs have all of it in flight.
    loads = HEADS * tile * qkv.element_size() // 16
    rope_append_kernel[(rows, triton.cdiv(heads, HEADS))](
        qkv,
        cos,
        sin,
        q_norm,
        k_norm,
        eps,
        k_pages,
        v_pages,
        slots,
        out,
        qkv.stride(0),
        q_heads,
        kv_heads,
        DIM=d,
        HEADS=HEADS,
        TILE=tile,
        num_warps=min(max(loads // 32, 1), 8),
        num_stages=1,
        enable_fp_fusion=False,
    )
    return out
