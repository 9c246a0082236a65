"""The record of one call: how much every term of its steerings acted, and which code it ran through.

How much a term acted is arithmetic: the positions of a row follow from its prompt, its tokens and the scope, the blocks
from the compiled steering. So a row is counted once, when it ends, and a step costs nothing.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from icon2_rt.engine.forward import Model
from icon2_rt.engine.rows import Row
from icon2_rt.ops.prefill import path_of
from icon2_rt.outputs import Fired, LastRun, Paths
from icon2_rt.steering import CompiledSteering


@dataclass
class _Count:
    """What :class:`~icon2_rt.outputs.Fired` holds, while it is counted."""

    rows: int = 0
    idle: int = 0
    layers: set[int] = field(default_factory=set)
    tokens: int = 0
    total: int = 0


@dataclass
class Record:
    """What one call did so far.

    Attributes:
        branches: the argument that each branch of a request came from; a request of several samples has these over and
            over, once for each. asked: rows that the call asks for; ``ended`` is
            how many of them ran to their own end.
        The others are those of :class:`~icon2_rt.outputs.LastRun` and :class:`~icon2_rt.outputs.Paths`.
    """

    branches: Sequence[str] = ()
    asked: int = 0
    ended: int = 0
    rows: int = 0
    tokens: int = 0
    prefill_passes: int = 0
    graph_steps: Counter[int] = field(default_factory=Counter)
    captured_steps: int = 0
    repeated_steps: int = 0
    plain_steps: Counter[str] = field(default_factory=Counter)
    shared_items: int = 0
    sharing_rows: int = 0
    fallbacks: list[str] = field(default_factory=list)
    _fired: dict[tuple[str, str, int, str], _Count] = field(default_factory=dict)

    def decoded(self, row: Row) -> None:
        """Count a row that has ended, or that is given up with the tokens it has."""
        n_prompt, n_tokens = len(row.request.tokens), len(row.tokens)
        self.ended += row.finish is not None
        self.rows += 1
        self.tokens += n_tokens
        steering = row.request.branches[row.branch].steering
        if steering is not None:
            # Token i is drawn at position n_prompt - 1 + i, which the step before it has fed.
            fed = max(0, n_tokens - 1) if steering.scope == "generated" else n_tokens
            self._acted(row.branch, steering, n_prompt - 1 if steering.scope == "all" else 0, fed)

    def scored(self, steering: CompiledSteering | None, positions: int, n_tokens: int) -> None:
        """Count a sequence of which ``positions`` were steered and ``n_tokens`` scored."""
        self.ended += 1
        self.rows += 1
        self.tokens += n_tokens
        if steering is not None:
            self._acted(0, steering, 0, positions)

    def read(self, steering: CompiledSteering | None = None, positions: int = 0) -> None:
        """Count a prompt that was read, of which ``positions`` were steered."""
        self.ended += 1
        self.rows += 1
        if steering is not None:
            self._acted(0, steering, 0, positions)

    def _acted(self, branch: int, steering: CompiledSteering, cached: int, run: int) -> None:
        """A row whose steering held on ``cached`` positions that went through all blocks up to the last one's K and V,
        and on ``run`` positions that went through all of them."""
        for name, place, layers in zip(steering.names, steering.places, steering.layers, strict=True):
            argument = self.branches[branch % len(self.branches)] if self.branches else ""
            key = (argument, name, place, steering.scope)
            count = self._fired.setdefault(key, _Count())
            before_last = len(layers) - (layers[-1] == steering.n_layers - 1)
            total = cached * before_last + run * len(layers)
            if not total:
                count.idle += 1
                continue
            count.rows += 1
            count.layers.update(layers if run else layers[:before_last])
            count.tokens += run + (cached if before_last else 0)
            count.total += total

    def shared(self, rows: np.ndarray) -> None:
        """Look at a layout's attention items, ``[items, rows]`` seats with -1 for none."""
        several = rows[:, 1] >= 0 if rows.shape[1] > 1 else np.zeros(len(rows), dtype=bool)
        n = int(np.count_nonzero(several))
        if n > self.shared_items:
            self.shared_items = n
            self.sharing_rows = int(np.count_nonzero(np.unique(rows[several]) >= 0))

    def fall_back(self, text: str) -> None:
        """Warn, and keep the warning."""
        self.fallbacks.append(text)
        warnings.warn(text, stacklevel=3)

    def close(self, call: str, model: Model) -> LastRun:
        """The record as the caller gets it."""
        ops, stepped = model.ops, self.graph_steps or self.plain_steps or self.captured_steps
        return LastRun(
            call=call,
            complete=self.ended == self.asked,
            rows=self.rows,
            tokens=self.tokens,
            steering=tuple(
                Fired(*key, count.rows, count.idle, tuple(sorted(count.layers)), count.tokens, count.total)
                for key, count in self._fired.items()
            ),
            paths=Paths(
                backend=ops.backend,
                prefill_attention=(
                    path_of(ops.prefill_attention, model.device, model.dtype, model.spec.head_dim)
                    if self.prefill_passes
                    else None
                ),
                decode_attention=form_of(ops.grouped_decode_attention) if stepped else None,
                prefill_passes=self.prefill_passes,
                graph_steps=dict(sorted(self.graph_steps.items())),
                captured_steps=self.captured_steps,
                repeated_steps=self.repeated_steps,
                plain_steps=dict(self.plain_steps),
                shared_items=self.shared_items,
                sharing_rows=self.sharing_rows,
                fallbacks=tuple(dict.fromkeys(self.fallbacks)),
            ),
        )


def form_of(op: Callable) -> str:
    """Which implementation of an op it is, told by the module that defines it."""
    module = op.__module__
    if module.startswith("icon2_rt.kernels."):
        return "triton"
    if module.startswith("icon2_rt.ops.native"):
        return "native"
    return "reference" if module.startswith("icon2_rt.ops.") else module
