"""The gated activation of the feed-forward block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """``[rows, 2·F]`` (gate, then up) → ``silu(gate) · up``, ``[rows, F]``, same dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
