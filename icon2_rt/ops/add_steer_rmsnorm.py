"""Residual add, the steering law and RMSNorm: the one place where a row's residual stream is changed.

The steering is a term of an operation that runs anyway, so that it costs nothing more than its own arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowSteering:
    """Which steering each row has, for all blocks: S distinct steerings of at most K terms over a bank of N vectors.

    A block's active terms come first in its K places, in the order in which the steering names them.

    Attributes:
        bank: ``[N, n_layers, hidden]`` fp32, the unit vectors on the device.
        count: ``[S, n_layers]`` int32, how many terms act at each block.
        index: ``[S, n_layers, K]`` int32, each term's place in the bank (any valid place beyond ``count``).
        alpha, beta: ``[S, n_layers, K]`` fp32, 0 beyond ``count``.
        keep_norm: ``[S]`` bool.
        which: ``[rows]`` int32, each row's steering, -1 for none.
        rows: per block, what the host knows of the rows where some term is active: None for no row, ``slice(None)``
            for all of them, else their int64 indices ``[n]``. All other rows take no extra work. None instead of the
            tuple where the host knows nothing: the buffers of a graph change after it is captured.
        rescale: False where the host knows that none of the S keeps its norm.
        additive: True where the host knows that all of beta is 0, so that what a steering adds at a block is one
            vector, whatever h is.
    """

    bank: Tensor
    count: Tensor
    index: Tensor
    alpha: Tensor
    beta: Tensor
    keep_norm: Tensor
    which: Tensor
    rows: tuple[Tensor | slice | None, ...] | None = None
    rescale: bool = True
    additive: bool = False

    @cached_property
    def _pushes(self) -> dict[int, Tensor]:
        return {}

    def push(self, layer: int) -> Tensor:
        """Σ α·u of every distinct steering at ``layer``, ``[S, hidden]`` fp32: made once, used at every step."""
        if layer not in self._pushes:
            self._pushes[layer] = (self.alpha[:, None, layer] @ self.bank[self.index[:, layer], layer])[:, 0]
        return self._pushes[layer]


def add_steer_rmsnorm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    steering: RowSteering | None = None,
    layer: int = -1,
    measured: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = residual + x``; steer h as after block ``layer``; return (h, RMSNorm(h)·weight).

    One fp32 sum of residual, block output and steering, one rounding to the residual's dtype, then the norm of the
    rounded value as transformers' RMSNorm does it. ⟨h, u⟩ is taken before any term is added, from the fp32 sum.

    Args:
        x: ``[rows, hidden]`` output of the block, or None (the embedding enters, nothing to add).
        residual: ``[rows, hidden]``. weight: ``[hidden]``, in the model's dtype. eps: the norm's epsilon.
        steering, layer: None, or the rows' steerings and the block (0-based) that h is the output of.
        measured: ``[rows, 1 + K]`` fp32 to be written, with ``steering``: ‖h‖ and the ⟨h, u⟩ of the row's terms, both
            before the steering (0 for a term that does not act here). None: nothing is measured.

    Returns:
        ``[rows, hidden]`` in the residual's dtype and ``[rows, hidden]`` in the weight's. A row without an active
        term has the same bytes as without ``steering``.
    """
    h = residual.float() if x is None else residual.float() + x.float()
    if steering is not None:
        if measured is not None:
            measured.copy_(measure(h, steering, layer))
        if steering.rows is None:
            which = steering.which.clamp(min=0)
            acts = (steering.which >= 0) & (steering.count[which, layer] > 0)
            h = torch.where(acts[:, None], steer(h, steering, layer, which), h)
        elif (rows := steering.rows[layer]) is not None:
            if isinstance(rows, slice):
                h = steer(h, steering, layer, steering.which)
            else:
                h = h.index_copy(0, rows, steer(h[rows], steering, layer, steering.which[rows]))
    residual = h.to(residual.dtype)
    normed = F.rms_norm(residual.float(), weight.shape, eps=eps)
    return residual, weight * normed.to(weight.dtype)


def steer(h: Tensor, steering: RowSteering, layer: int, which: Tensor) -> Tensor:
    """The steering law on ``h [n, hidden]`` fp32, all of whose rows have an active term; returns a new tensor."""
    if steering.additive:
        out = h + steering.push(layer).index_select(0, which)
    else:
        u = steering.bank[steering.index[which, layer], layer]  # [n, K, hidden]
        alpha, beta = steering.alpha[which, layer], steering.beta[which, layer]  # [n, K]
        coefficient = alpha + beta * (u @ h[:, :, None])[:, :, 0]
        out = h + (coefficient[:, None, :] @ u)[:, 0]
    if steering.rescale:
        before, after = h.norm(dim=-1, keepdim=True), out.norm(dim=-1, keepdim=True)
        scale = torch.where((before > 0) & (after > 0) & steering.keep_norm[which][:, None], before / after, 1.0)
        out = out * scale
    return out


def measure(h: Tensor, steering: RowSteering, layer: int) -> Tensor:
    """``[rows, 1 + K]`` fp32: ‖h‖ and ⟨h, u⟩ of each term that acts on the row at ``layer``, 0 for the others."""
    which = steering.which.clamp(min=0)
    u = steering.bank[steering.index[which, layer], layer]
    terms = torch.arange(u.shape[1], device=h.device)
    acts = (terms < steering.count[which, layer][:, None]) & (steering.which >= 0)[:, None]
    return torch.cat((h.norm(dim=-1, keepdim=True), torch.where(acts, (u @ h[:, :, None])[:, :, 0], 0.0)), dim=1)
