"""Prefill attention by torch's scaled_dot_product_attention, a segment at a time: the definition, on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icon2_rt.ops.prefill.segments import Segments


def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """See :data:`icon2_rt.ops.prefill.Attend`.

    On a CUDA device torch has three ways. Flash attention takes shared KV heads, but no mask and no fp32; memory-
    efficient attention takes both, but (up to torch 2.13) a KV head for every query head. What neither takes goes
    through the plain formula, whose scores of 32 heads are 2 GB in fp32 at 4096 queries and keys. So KV heads are
    repeated there where flash attention would refuse: some megabytes.
    """
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    keys = 0
    for s in segments.runs:
        # torch's is_causal is aligned top-left: right only where there is no earlier KV.
        mask = None
        if s.start > 0:
            mask = torch.ones(s.queries, s.length, dtype=torch.bool, device=q.device).tril(s.start)
        keys_here, values_here = k[keys : keys + s.length], v[keys : keys + s.length]
        repeat = q.device.type == "cuda" and group > 1 and (mask is not None or q.dtype == torch.float32)
        if repeat:
            keys_here, values_here = (x.repeat_interleave(group, dim=1) for x in (keys_here, values_here))
        seen = F.scaled_dot_product_attention(
            q[s.begin : s.end].transpose(0, 1)[None],
            keys_here.transpose(0, 1)[None],
            values_here.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=group > 1 and not repeat,
        )
        out[s.begin : s.end] = seen[0].transpose(0, 1)
        keys += s.length
    return out
