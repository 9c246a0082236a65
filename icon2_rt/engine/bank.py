"""The direction bank: every unit vector in use, once, on the device; rows refer to them by index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields

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
        known = self.know(steerings)
        if known is None:
            return None
        return known.on({name: torch.from_numpy(array).to(self.vectors.device) for name, array in known.arrays.items()})

    def know(self, steerings: Sequence[CompiledSteering | None]) -> KnownSteering | None:
        """:meth:`lay_out` and what the host knows of it, still on the host; None where no row has a steering."""
        table = self.lay_out(steerings)
        if not len(table.count):
            return None
        active = (table.count > 0)[table.which] & (table.which >= 0)[:, None]  # [rows, n_layers]
        arrays: dict[str, np.ndarray] = dict(vars(table))
        names: dict[bytes, str] = {}
        rows: list[str | slice | None] = []
        for acts in active.T:  # many blocks have the same rows
            if acts.all() or not acts.any():
                rows.append(slice(None) if acts.any() else None)
                continue
            name = names.setdefault(acts.tobytes(), f"rows {len(names)}")
            arrays[name] = acts.nonzero()[0]
            rows.append(name)
        return KnownSteering(self.vectors, arrays, tuple(rows), bool(table.keep_norm.any()), not table.beta.any())


@dataclass(frozen=True)
class SteeringTable:
    """The tensors of a :class:`~icon2_rt.ops.RowSteering` as arrays of the host, under the same names."""

    count: np.ndarray
    index: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    keep_norm: np.ndarray
    which: np.ndarray


@dataclass(frozen=True)
class KnownSteering:
    """A :class:`~icon2_rt.ops.RowSteering` before its ``arrays`` are on the device. ``rows`` as there, an array by its
    name."""

    bank: Tensor
    arrays: dict[str, np.ndarray]
    rows: tuple[str | slice | None, ...]
    rescale: bool
    additive: bool

    def on(self, tensors: Mapping[str, Tensor]) -> RowSteering:
        """With the arrays as tensors of the device, by the same names."""
        return RowSteering(
            bank=self.bank,
            **{field.name: tensors[field.name] for field in fields(SteeringTable)},
            rows=tuple(tensors[rows] if isinstance(rows, str) else rows for rows in self.rows),
            rescale=self.rescale,
            additive=self.additive,
        )
