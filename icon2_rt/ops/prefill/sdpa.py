"""Prefill attention by torch's scaled_dot_product_attention, a segment at a time: the definition, on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icon2_rt.ops.prefill.segments import Segments


def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """See :data:`icon2_rt.ops.prefill.Attend`."""
    out = torch.empty_like(q)
    keys = 0
    for s in segments.runs:
        # torch's is_causal is aligned top-left: right only where there is no earlier KV.
        mask = None
        if s.start > 0:
            mask = torch.ones(s.queries, s.length, dtype=torch.bool, device=q.device).tril(s.start)
        seen = F.scaled_dot_product_attention(
            q[s.begin : s.end].transpose(0, 1)[None],
            k[keys : keys + s.length].transpose(0, 1)[None],
            v[keys : keys + s.length].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[s.begin : s.end] = seen[0].transpose(0, 1)
        keys += s.length
    return out
