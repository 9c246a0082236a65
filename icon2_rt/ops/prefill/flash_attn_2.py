"""Prefill attention by flash-attn 2.x, which is built from source against the torch at hand."""

from __future__ import annotations

from torch import Tensor

from icon2_rt.ops.prefill.segments import Segments


def why_not() -> str | None:
    """None where flash-attn 2 can be imported, else what is in the way."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except (ImportError, OSError) as error:  # flash-attn 4 alone has the folder and not the function
        return f"flash-attn 2 cannot be imported ({error})"
    return None


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """See :data:`icon2_rt.ops.prefill.Attend`. Since 2.1 ``causal`` is aligned bottom-right, which is what a segment
    with earlier KV needs."""
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        segments.queries_before,
        segments.keys_before,
        segments.most_queries,
        segments.most_keys,
        softmax_scale=scale,
        causal=True,
    )
    return out
