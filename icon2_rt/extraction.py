"""Directions from contrastive states, in one pass: Icon², step 1 (Eq. 1), without keeping the states.

The paper takes the first principal component of the differences v = h⁺ - h⁻ per block. The differences are *not*
centred: both orders of a pair are the same fact, and centring un-shuffled differences subtracts the mean difference,
which is the signal. What is kept of the pairs seen so far is a truncated SVD per block (rank 64 for each half of the
data), so memory does not grow with the hidden states of all pairs.

All of it happens on the device that has the states: an SVD is that of the rows' Gram matrix, in fp64 (a product and the
eigenvectors of some 200 × 200 numbers a block), and only the result is copied to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The first component converges far sooner: on 512 pairs of a random Llama the truncated and the full SVD agree to 1e-6.
RANK = 64
# Rows that are collected before they are merged into what is kept: 200 MB of a model with 32 blocks of 4096.
PENDING = 128


def _left_vectors(rows: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of ``rows [n_layers, n, hidden]``, per block: ``[n_layers, n, ≤ rank]`` fp32.

    The Gram matrix has the squares of the singular values, so fp64 leaves of them what fp32 rows have.
    """
    gram = torch.stack([block @ block.T for block in (r.double() for r in rows)])
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors  # the largest eigenvalue is last
    return vectors.flip(-1)[..., :rank].float()


class _TruncatedSVD:
    """The rows seen so far, per block: ``u [n_layers, n, r] @ weighted [n_layers, r, hidden]``, the left singular
    vectors and the right ones times their singular values."""

    def __init__(self, n_layers: int, hidden: int, device: torch.device):
        self.u = torch.zeros(n_layers, 0, 0, dtype=torch.float32, device=device)
        self._weighted = torch.zeros(n_layers, 0, hidden, dtype=torch.float32, device=device)
        self._pending: list[Tensor] = []

    @property
    def weighted(self) -> Tensor:
        """``[n_layers, r, hidden]``, with the same right singular vectors as the rows themselves."""
        self._merge()
        return self._weighted

    def add(self, rows: Tensor) -> None:
        """``rows [n_layers, b, hidden]`` fp32."""
        self._pending.append(rows)
        if sum(r.shape[1] for r in self._pending) >= PENDING:
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        old = self._weighted.shape[1]
        rows = torch.cat([self._weighted, *self._pending], dim=1)
        self._pending.clear()
        u = _left_vectors(rows, RANK)
        self._weighted = u.transpose(1, 2) @ rows
        self.u = torch.cat([self.u @ u[:, :old], u[:, old:]], dim=1)

    def along(self, direction: Tensor) -> Tensor:
        """``[n_layers, n]``: every row's dot product with ``direction [n_layers, hidden]``."""
        weighted = self.weighted  # before u is looked at: it brings both up to date
        return (self.u @ (weighted @ direction[:, :, None]))[..., 0]


def _first_component(rows: Tensor) -> Tensor:
    """First right singular vector of ``rows [n_layers, n, hidden]``, per block; 0 where all rows are."""
    along = (_left_vectors(rows, 1).transpose(1, 2) @ rows)[:, 0]
    return torch.nn.functional.normalize(along, dim=-1)


def _signed(u: Tensor, mean: Tensor) -> Tensor:
    """``u`` or ``-u`` per block, so that ``mean`` projects positively."""
    return torch.where(((u * mean).sum(dim=-1) < 0)[:, None], -u, u)


class PromptStates:
    """The states of prompts as they come, a block of some prompts at a time. They stay on the device that they come
    from."""

    def __init__(self, n_layers: int):
        self._n_layers = n_layers
        self._seen: dict[tuple[int, ...], dict[int, Tensor]] = {}  # prompts of one pass → block → [prompts, hidden]

    def keep(self, prompts: list[int], layer: int, h: Tensor) -> None:
        """``h [prompts, hidden]`` after block ``layer``. What is shown again replaces what was shown before."""
        self._seen.setdefault(tuple(prompts), {})[layer] = h.to(torch.float32, copy=True)

    def take_whole(self) -> dict[tuple[int, ...], Tensor]:
        """The states of the prompts of each pass, ``[prompts, n_layers, hidden]`` fp32. Call it between passes: one
        that broke off is forgotten."""
        whole = {
            prompts: torch.stack([blocks[layer] for layer in range(self._n_layers)], dim=1)
            for prompts, blocks in self._seen.items()
            if len(blocks) == self._n_layers
        }
        self._seen.clear()
        return whole


class PairStates(PromptStates):
    """The states of prompts until both of a pair are whole. Prompts 2i and 2i + 1 are a pair."""

    def __init__(self, n_layers: int):
        super().__init__(n_layers)
        self._left: dict[int, Tensor] = {}  # a prompt whose other one is not there yet → [n_layers, hidden]

    def take(self) -> tuple[Tensor, Tensor] | None:
        """The states of all pairs that are whole, by number: twice ``[pairs, n_layers, hidden]`` fp32; None where there
        is none. Call it between passes."""
        whole = self.take_whole()
        if not whole:
            return None
        names = [*self._left, *(n for prompts in whole for n in prompts)]
        place = {n: at for at, n in enumerate(names)}
        states = torch.cat([*(state[None] for state in self._left.values()), *whole.values()])
        even = sorted(n for n in place if n % 2 == 0 and n + 1 in place)
        paired = {*even, *(n + 1 for n in even)}
        self._left = {n: states[at].clone() for n, at in place.items() if n not in paired}
        if not even:
            return None
        each = states.unbind()  # an index would have to be brought to the device, which the host waits for
        return torch.stack([each[place[n]] for n in even]), torch.stack([each[place[n + 1]] for n in even])


class ContrastStatistics:
    """Accumulates pairs of states and yields the direction with its health figures."""

    def __init__(self, n_layers: int, hidden: int, device: torch.device):
        self._halves = (_TruncatedSVD(n_layers, hidden, device), _TruncatedSVD(n_layers, hidden, device))
        self._sum = torch.zeros(n_layers, hidden, dtype=torch.float64, device=device)  # of the differences
        self._norms = torch.zeros(n_layers, dtype=torch.float32, device=device)  # of ‖h‖ over both prompts of all pairs
        self.n = 0

    def add(self, positive: Tensor, negative: Tensor) -> None:
        """``[b, n_layers, hidden]`` fp32 states of b pairs, on the device of the statistics."""
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
        """Unit vectors ``[n_layers, hidden]`` on the CPU, signed by the mean difference, and health figures per block.

        Raises:
            ValueError: fewer than two pairs, or pairs that do not differ.
        """
        if self.n < 2:
            raise ValueError(f"a direction needs at least 2 pairs of prompts, not {self.n}")
        mean = (self._sum / self.n).float()
        length = mean.norm(dim=-1)
        _check_difference(length)
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
        host = torch.cat([u, torch.stack([*health.values()], dim=1)], dim=1).cpu()  # one copy
        figures = host[:, u.shape[1] :].T.tolist()
        return host[:, : u.shape[1]].clone(), dict(zip(health, figures, strict=True))


class SideStatistics:
    """Accumulates the states of positive and of negative prompts that are no pairs, and yields their mean difference
    with the one health figure that needs no pairs."""

    # What ContrastStatistics tells of pairs, and cannot be told here.
    NEED_PAIRS = ("cos_mean_difference", "sign_agreement", "split_half_cosine")

    def __init__(self, n_layers: int, hidden: int, device: torch.device):
        self._sum = torch.zeros(2, n_layers, hidden, dtype=torch.float64, device=device)  # of the states of each side
        self._norms = torch.zeros(2, n_layers, dtype=torch.float64, device=device)  # of ‖h‖
        self.n = [0, 0]

    def add(self, side: int, states: Tensor) -> None:
        """``[b, n_layers, hidden]`` fp32 states of b prompts; ``side`` 0 is positive, 1 negative."""
        self._sum[side] += states.double().sum(dim=0)
        self._norms[side] += states.double().norm(dim=-1).sum(dim=0)
        self.n[side] += len(states)

    def direction(self) -> tuple[Tensor, dict[str, list[float]]]:
        """Unit vectors ``[n_layers, hidden]`` on the CPU, and ``contrast`` per block: the length of the mean difference
        beside the mean of the two sides' ‖h‖.

        Raises:
            ValueError: the two means are equal at some block.
        """
        count = torch.tensor(self.n, dtype=torch.float64, device=self._sum.device)
        positive, negative = self._sum / count[:, None, None]
        mean = positive - negative
        length = mean.norm(dim=-1)
        _check_difference(length)
        contrast = length / (self._norms / count[:, None]).mean(dim=0)
        return (mean / length[:, None]).float().cpu(), {"contrast": contrast.cpu().tolist()}


def _check_difference(length: Tensor) -> None:
    """Refuse a mean difference of length 0 at some block; ``length [n_layers]``."""
    if bool((length == 0).any()):
        blocks = (length == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"the positive and negative prompts have the same states after block(s) {blocks}: are they equal?"
        )
