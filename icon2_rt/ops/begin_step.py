"""What follows from the rows' positions before any block runs: where K and V go, the rotary factors, how much of every
attention item exists. Done on the device, once for all blocks, so that a step needs nothing from the host."""

from __future__ import annotations

import torch
from torch import Tensor

from icon2_rt.ops.attention import AttentionItems
from icon2_rt.ops.state import RowState


def begin_step(
    state: RowState,
    tables: Tensor,
    page_size: int,
    inv_freq: Tensor,
    rope_scaling: float,
    items: AttentionItems,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out one step for the rows of ``state``; also writes ``items.lengths`` and ``items.n_splits``.

    Args:
        tables: ``[rows, pages]`` int32, the page of every ``page_size`` positions that a row may write.
        inv_freq: ``[d / 2]`` fp32. rope_scaling: factor on cos and sin. dtype: theirs, the model's.

    Returns:
        slots ``[rows]`` int64, page · page_size + offset, -1 for a seat that is not running; cos and sin
        ``[rows, 1, d]`` as :func:`icon2_rt.ops.rope_append` takes them.
    """
    positions = state.positions.long()
    page = tables.gather(1, (positions // page_size)[:, None])[:, 0]
    slots = torch.where(state.running, page * page_size + positions % page_size, -1)
    items.update(state)
    return slots, *rotary(positions, inv_freq, rope_scaling, dtype)


def rotary(positions: Tensor, inv_freq: Tensor, rope_scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin of ``positions [...]``: ``[..., 1, d]``. In fp32, then rounded, as transformers does it."""
    angles = positions[..., None, None].float() * inv_freq
    cos, sin = angles.cos() * rope_scaling, angles.sin() * rope_scaling
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
