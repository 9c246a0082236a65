"""Prefill attention by torch's varlen_attn: the flash attention that torch brings itself, over packed sequences."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from icon2_rt.ops.prefill.segments import Segments


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """See :data:`icon2_rt.ops.prefill.Attend`. A window of (-1, 0) is what torch calls causal here; it is aligned
    bottom-right, unlike ``is_causal`` of scaled_dot_product_attention."""
    # Where it is used: it brings torch's compiler along, seconds of import.
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        # torch 2.12 and later want to be told that heads share KV heads; 2.11 takes them as they are.
        options["enable_gqa"] = True
    out: Tensor = varlen_attn(  # type: ignore[assignment]
        q,
        k,
        v,
        segments.queries_before,
        segments.keys_before,
        segments.most_queries,
        segments.most_keys,
        **options,
    )
    return out
