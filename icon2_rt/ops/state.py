"""The running rows of a batch as the device sees them: what every step advances, in place.

A seat is a row's place in these tensors. A seat that nobody has, or whose row is done, is not running: it reads what is
there, and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowState:
    """One entry per seat.

    Attributes:
        tokens: ``[rows]`` int64, fed next. positions: ``[rows]`` int32, where that token goes.
        generated: ``[rows]`` int32, how many tokens the row has generated.
        running: ``[rows]`` bool.
        logprobs: ``[rows]`` fp32, of the token sampled last, under the raw logits.
    """

    tokens: Tensor
    positions: Tensor
    generated: Tensor
    running: Tensor
    logprobs: Tensor
