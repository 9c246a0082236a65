"""Residual add, the steering law and RMSNorm in one pass over a row.

The row stays in registers from the first load to the last store, one program a row, so a row's result depends on the
row alone. Steps: h = residual + x in fp32; for a row with terms at this block, gather their unit vectors from the bank
by index and add Σ (α + β⟨h, u⟩)·u; round once and write the new residual; normalise the rounded value and write that.

Bytes per row, with e bytes an element: 2·hidden·e read and as much written, plus 4·hidden for every active term: at
hidden 4096 in bf16 32 KiB, and 16 KiB a term. In a batch many rows name the same vector, and all but the first find it
in L2. What a lone row feels is latency: the number of its steering arrives with the row itself; a row with
terms then waits for two more round trips (how many and where, then the vector), and each further vector is asked for
before the one before it is used. The tables are a few KB that every block reads again after 100 MB of weights have
passed, so they are kept in L2 (evict_last); the vectors may be as large as L2 itself and are not.

Predicted on an H100 (3.35 TB/s, L2 in 0.3 µs, memory in 0.7 µs), not measured: 0.3 + 0.7 µs more for a steered block
while the batch is one wave (2 programs of 8 warps a multiprocessor), so 32 µs in a step of Llama-3-8B, whose weights
alone take 4.5 ms: 0.7 %.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from icon2_rt.kernels.budget import Budget

# Without steering 48 registers are enough. With it 2 programs of 8 warps fit a multiprocessor, a batch of 256 rows.
BUDGET = Budget(registers=120, shared=64, narrow_loads=7, registers_on={120: 128})


@triton.jit(do_not_specialize=["layer"])
def add_steer_rmsnorm_kernel(
    x,
    residual,
    weight,
    eps,
    out,
    normed,
    hidden,
    x_stride,
    residual_stride,
    bank,
    count,
    index,
    alpha,
    beta,
    keep_norm,
    which,
    layer,
    n_layers,
    max_terms,
    measured,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < hidden
    if which is not None:
        mine = tl.load(which + row, eviction_policy="evict_last").to(tl.int64)
    h = tl.load(residual + row * residual_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if x is not None:
        h += tl.load(x + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + cols, mask=inside, other=0.0)

    if which is not None:
        if measured is not None:
            seen = measured + row * (max_terms + 1)
            tl.store(seen, tl.sqrt_rn(tl.sum(h * h)))
        n = 0
        if mine >= 0:
            block = mine * n_layers + layer
            first = block * max_terms
            # Any place is a valid one, so the first term's is asked for together with the count.
            n = tl.load(count + block, eviction_policy="evict_last")
            place = tl.load(index + first, eviction_policy="evict_last")
            keeps = tl.load(keep_norm + mine, eviction_policy="evict_last")
            if n > 0:
                # The bank passes 2**31 elements.
                u = tl.load(bank + (place.to(tl.int64) * n_layers + layer) * hidden + cols, mask=inside, other=0.0)
                push = tl.zeros([BLOCK], tl.float32)
                for k in range(n):
                    more = k + 1 < n
                    place = tl.load(index + first + k + 1, mask=more, other=0, eviction_policy="evict_last")
                    at = bank + (place.to(tl.int64) * n_layers + layer) * hidden
                    following = tl.load(at + cols, mask=inside & more, other=0.0)
                    coefficient = tl.load(alpha + first + k, eviction_policy="evict_last")
                    slope = tl.load(beta + first + k, eviction_policy="evict_last")
                    if (measured is not None) | (slope != 0.0):
                        dot = tl.sum(h * u)
                        coefficient += slope * dot
                        if measured is not None:
                            tl.store(seen + 1 + k, dot)
                    push += coefficient * u
                    u = following
                steered = h + push
                if keeps:
                    before = tl.sqrt_rn(tl.sum(h * h))
                    after = tl.sqrt_rn(tl.sum(steered * steered))
                    if (before > 0.0) & (after > 0.0):
                        steered *= tl.div_rn(before, after)
                h = steered
        if measured is not None:
            terms = tl.arange(0, TERMS)
            tl.store(seen + 1 + terms, 0.0, mask=(terms >= n) & (terms < max_terms))

    rounded = h.to(out.dtype.element_ty)
    tl.store(out + row * hidden + cols, rounded, mask=inside)
    r = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(r * r) / hidden + eps)
    # Rounded before the weight, as two operations of torch round.
    unit = (r * scale).to(w.dtype).to(tl.float32)
    tl.store(normed + row * hidden + cols, (w.to(tl.float32) * unit).to(w.dtype), mask=inside)


def add_steer_rmsnorm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    steering: Any = None,
    layer: int = -1,
    measured: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`icon2_rt.ops.add_steer_rmsnorm`; ``steering`` is its ``RowSteering``.

    What the host knows of the steerings (``rows``, ``rescale``, ``additive``) is not used: every row looks for itself.
    """
    rows, hidden = residual.shape
    out = torch.empty(rows, hidden, dtype=residual.dtype, device=residual.device)
    normed = torch.empty(rows, hidden, dtype=weight.dtype, device=residual.device)
    s = steering
    n_layers, max_terms = (0, 0) if s is None else s.index.shape[1:]
    # At least 8 elements a thread, so that bf16 is read 16 bytes at a time; 16 from hidden 512 on.
    block = max(256, triton.next_power_of_2(hidden))
    add_steer_rmsnorm_kernel[(rows,)](
        x,
        residual,
        weight,
        eps,
        out,
        normed,
        hidden,
        0 if x is None else x.stride(0),
        residual.stride(0),
        *((None,) * 7 if s is None else (s.bank, s.count, s.index, s.alpha, s.beta, s.keep_norm, s.which)),
        layer,
        n_layers,
        max_terms,
        None if s is None else measured,
        TERMS=triton.next_power_of_2(max(max_terms, 1)),
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        num_stages=1,
        enable_fp_fusion=False,
    )
    return out, normed
