"""The projections: ``x Wᵀ (+ b)``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [rows, in]``, ``weight [out, in]``, ``bias [out]`` or None → ``[rows, out]``, same dtype."""
    rows = x.shape[0]
    if x.device.type == "cpu" and 1 < rows <= 32:
        # With the weight as the left operand a few rows cost as much as one: 2 rows of [32000, 768] in fp32 took 4.5 ms
        # against 16.9 ms for F.linear (MKL, AVX2, 2 threads).
        out = (weight @ x.t()).t().contiguous()
        return out if bias is None else out.add_(bias)
    return F.linear(x, weight, bias)
