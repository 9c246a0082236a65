"""The direction bank: every unit vector in use, once, on the device; rows refer to them by index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icon2_rt.ops import RowSteering
from icon2_rt.steering import CompiledSteering


class DirectionBank:
    """``vectors`` is ``[max_directions, n_layers, hidden]`` fp32; a slot is pinned while some call uses it."""

    def __init__(self, max_directions: int, max_terms: int, n_layers: int, hidden_size: int, device: torch.device):
        self.max_directions, self.max_terms = max_directions, max_terms
        self.vectors = torch.zeros(max_directions, n_layers, hidden_size, dtype=torch.float32, device=device)
        self._slot: dict[str, int] = {}  # content key → slot, least recently pinned first
        self._pins: dict[str, int] = {}

    def check(self, steerings: Iterable[CompiledSteering | None]) -> dict[str, Tensor]:
        """The distinct vectors of ``steerings`` by key, if the bank could hold them when nobody else uses it.

        Raises:
            ValueError: more terms or more distinct directions than the runtime was made for.
        """
        wanted: dict[str, Tensor] = {}
        for steering in steerings:
            if steering is None:
                continue
            if steering.n_terms > self.max_terms:
                raise ValueError(
                    f"a steering has {steering.n_terms} terms, this runtime was made for max_terms={self.max_terms}: "
                    f"pass max_terms={steering.n_terms} to Runtime"
                )
            wanted.update(zip(steering.keys, steering.vectors, strict=True))
        self._check_room(wanted.keys())
        return wanted

    def _check_room(self, keys: Set[str]) -> None:
        if len(keys) > self.max_directions:
            raise ValueError(
                f"{len(keys)} distinct directions are needed at once, this runtime was made for "
                f"max_directions={self.max_directions}: pass a larger max_directions to Runtime"
            )

    def pin(self, steerings: Iterable[CompiledSteering | None]) -> list[str]:
        """Bring the vectors of ``steerings`` into the bank and hold them until :meth:`unpin` of the returned keys.

        Raises:
            ValueError: as :meth:`check`, or the directions of open streams leave too little room.
        """
        wanted = self.check(steerings)
        held = {key for key, pins in self._pins.items() if pins}
        self._check_room(wanted.keys() | held)
        for key, vectors in wanted.items():
            slot = self._slot.pop(key, None)
            if slot is None:
                slot = self._take_slot(held | wanted.keys())
                self.vectors[slot].copy_(vectors)
            self._slot[key] = slot
            self._pins[key] = self._pins.get(key, 0) + 1
        return list(wanted)

    def unpin(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._pins[key] -= 1

    def _take_slot(self, keep: set[str]) -> int:
        if len(self._slot) < self.max_directions:
            return len(self._slot)
        oldest = next(key for key in self._slot if key not in keep)
        del self._pins[oldest]
        return self._slot.pop(oldest)

    def lay_out(self, steerings: Sequence[CompiledSteering | None], width: int | None = None) -> SteeringTable:
        """What the rows need, from each row's (pinned) steering, with room for ``width`` terms (None: as many as the
        largest has)."""
        distinct = list(dict.fromkeys(s for s in steerings if s is not None))
        place = {s: n for n, s in enumerate(distinct)}
        n_layers, k = self.vectors.shape[1], width or max((s.n_terms for s in distinct), default=1)
        count = np.zeros((len(distinct), n_layers), dtype=np.int32)
        index = np.zeros((len(distinct), n_layers, k), dtype=np.int32)
        alpha = np.zeros(index.shape, dtype=np.float32)
        beta = np.zeros_like(alpha)
        for n, s in enumerate(distinct):
            terms = s.terms
            here = terms.which.shape[1]
            count[n] = terms.count
            index[n, :, :here] = np.array([self._slot[key] for key in s.keys], dtype=np.int32)[terms.which]
            alpha[n, :, :here], beta[n, :, :here] = terms.alpha, terms.beta
        return SteeringTable(
            count=count,
            index=index,
            alpha=alpha,
            beta=beta,
            keep_norm=np.array([s.keep_norm for s in distinct], dtype=bool),
            which=np.array([-1 if s is None else place[s] for s in steerings], dtype=np.int32),
        )

    def row_steering(self, steerings: Sequence[CompiledSteering | None]) -> RowSteering | None:
        """:meth:`lay_out` on the device, with what the host knows of it; None where no row has a steering."""
        table = self.lay_out(steerings)
        if not len(table.count):
            return None
        device = self.vectors.device
        active = (table.count > 0)[table.which] & (table.which >= 0)[:, None]  # [rows, n_layers]
        return RowSteering(
            bank=self.vectors,
            **{name: torch.from_numpy(array).to(device) for name, array in vars(table).items()},
            rows=tuple(_rows_of(acts, device) for acts in active.T),
            rescale=bool(table.keep_norm.any()),
            additive=not table.beta.any(),
        )


@dataclass(frozen=True)
class SteeringTable:
    """The tensors of a :class:`~icon2_rt.ops.RowSteering` as arrays of the host, under the same names."""

    count: np.ndarray
    index: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    keep_norm: np.ndarray
    which: np.ndarray


def _rows_of(acts: np.ndarray, device: torch.device) -> Tensor | slice | None:
    if not acts.any():
        return None
    return slice(None) if acts.all() else torch.from_numpy(acts.nonzero()[0]).to(device)
