"""Prefill attention by flash-attn 4.x (``flash_attn.cute``), a wheel of plain Python that compiles at the first call.

Everything is passed by name: the third argument after v became another one between the betas.
"""

from __future__ import annotations

import inspect

from torch import Tensor

from icon2_rt.ops.prefill.segments import Segments


def why_not() -> str | None:
    """None where flash-attn 4 can be imported, else what is in the way."""
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except Exception as error:  # a beta over other betas: whatever is amiss there must not stop a model from loading
        return f"flash-attn 4 cannot be imported ({error})"
    if "max_seqlen_q" not in inspect.signature(flash_attn_varlen_func).parameters:
        return "this flash_attn.cute came with flash-attn 2 and is older than the first beta of 4"
    return None


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """See :data:`icon2_rt.ops.prefill.Attend`. ``causal`` is aligned bottom-right."""
    from flash_attn.cute import flash_attn_varlen_func

    out: Tensor
    out, _ = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=segments.queries_before,
        cu_seqlens_k=segments.keys_before,
        max_seqlen_q=segments.most_queries,
        max_seqlen_k=segments.most_keys,
        softmax_scale=scale,
        causal=True,
    )
    return out
