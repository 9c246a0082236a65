"""The first residual of a token: its row of the embedding."""

from __future__ import annotations

from torch import Tensor


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """``tokens [rows]`` int64, ``weight [vocab, hidden]`` → ``[rows, hidden]`` in the dtype of ``weight``."""
    return weight[tokens]
