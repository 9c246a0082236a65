"""Directions from contrastive states, in one pass: Icon², step 1 (Eq. 1), without keeping the states.

The paper takes the first principal component of the differences v = h⁺ - h⁻ per block. The differences are *not*
centred: both orders of a pair are the same fact, and centring un-shuffled differences subtracts the mean difference,
which is the signal. What is kept of the pairs seen so far is a truncated SVD per block (rank 64 for each half of the
data), so memory does not grow with the hidden states of all pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The first component converges far sooner: on 512 pairs of a random Llama the truncated and the full SVD agree to 1e-6.
RANK = 64


class _TruncatedSVD:
    """The rows seen so far, per block: ``u [n_layers, n, r] · s [n_layers, 1, r] @ basis [n_layers, r, hidden]``."""

    def __init__(self, n_layers: int, hidden: int):
        self.u = torch.zeros(n_layers, 0, 0, dtype=torch.float32, device="cpu")
        self.s = torch.zeros(n_layers, 1, 0, dtype=torch.float32, device="cpu")
        self.basis = torch.zeros(n_layers, 0, hidden, dtype=torch.float32, device="cpu")

    @property
    def weighted(self) -> Tensor:
        """``[n_layers, r, hidden]``, with the same right singular vectors as the rows themselves."""
        return self.s.transpose(1, 2) * self.basis

    def add(self, rows: Tensor) -> None:
        """``rows [n_layers, b, hidden]`` fp32."""
        old = self.basis.shape[1]
        u, s, basis = torch.linalg.svd(torch.cat([self.weighted, rows], dim=1), full_matrices=False)
        u, self.s, self.basis = u[..., :RANK], s[:, None, :RANK], basis[:, :RANK]
        self.u = torch.cat([self.u @ u[:, :old], u[:, old:]], dim=1)

    def along(self, direction: Tensor) -> Tensor:
        """``[n_layers, n]``: every row's dot product with ``direction [n_layers, hidden]``."""
        return ((self.u * self.s) @ (self.basis @ direction[:, :, None]))[..., 0]


def _first_component(rows: Tensor) -> Tensor:
    """First right singular vector of ``rows [n_layers, n, hidden]``, per block."""
    return torch.linalg.svd(rows, full_matrices=False).Vh[:, 0]


def _signed(u: Tensor, mean: Tensor) -> Tensor:
    """``u`` or ``-u`` per block, so that ``mean`` projects positively."""
    return torch.where(((u * mean).sum(dim=-1) < 0)[:, None], -u, u)


class ContrastStatistics:
    """Accumulates pairs of states and yields the direction with its health figures."""

    def __init__(self, n_layers: int, hidden: int):
        self._halves = (_TruncatedSVD(n_layers, hidden), _TruncatedSVD(n_layers, hidden))
        self._sum = torch.zeros(n_layers, hidden, dtype=torch.float64, device="cpu")  # of the differences
        self._norms = torch.zeros(n_layers, dtype=torch.float32, device="cpu")  # of ‖h‖ over both prompts of all pairs
        self.n = 0

    def add(self, positive: Tensor, negative: Tensor) -> None:
        """``[b, n_layers, hidden]`` fp32 states of b pairs."""
        difference = positive - negative
        self._sum += difference.double().sum(dim=0)
        self._norms += positive.norm(dim=-1).sum(dim=0) + negative.norm(dim=-1).sum(dim=0)
        by_layer = difference.transpose(0, 1)
        for half in (0, 1):
            rows = by_layer[:, (self.n + half) % 2 :: 2]  # pairs of even and of odd number
            if rows.shape[1]:
                self._halves[half].add(rows)
        self.n += len(difference)

    def direction(self, method: str) -> tuple[Tensor, dict[str, list[float]]]:
        """Unit vectors ``[n_layers, hidden]``, signed by the mean difference, and the health figures per block.

        Raises:
            ValueError: fewer than two pairs, or pairs that do not differ.
        """
        if self.n < 2:
            raise ValueError(f"a direction needs at least 2 pairs of prompts, not {self.n}")
        mean = (self._sum / self.n).float()
        length = mean.norm(dim=-1)
        if bool((length == 0).any()):
            blocks = (length == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"the positive and negative prompts have the same states after block(s) {blocks}: are they equal?"
            )
        a, b = self._halves
        first = _signed(_first_component(torch.cat([a.weighted, b.weighted], dim=1)), mean)
        unit_mean = mean / length[:, None]
        u = first if method == "pca" else unit_mean
        halves = [_signed(_first_component(half.weighted), mean) for half in self._halves]
        health = {
            "cos_mean_difference": (first * unit_mean).sum(dim=-1),
            "sign_agreement": (torch.cat([a.along(u), b.along(u)], dim=1) > 0).float().mean(dim=1),
            "split_half_cosine": (halves[0] * halves[1]).sum(dim=-1),
            "contrast": length / (self._norms / (2 * self.n)),
        }
        return u, {name: figures.tolist() for name, figures in health.items()}
