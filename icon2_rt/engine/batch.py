"""The running rows: who sits where, what a step is given, and the steps under way.

Two manners of running them. A backend that does not need fixed shapes gets exactly the rows there are, with everything
that the host knows about them (what to skip), and its results at once. One that does (CUDA graphs) gets fixed buffers
of which a bucket of seats is run: rows take and leave seats by small copies, and results are looked at some steps late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon2_rt.engine.bank import DirectionBank
from icon2_rt.engine.buffers import BatchSizes, Buffers, read_results, sampling_of
from icon2_rt.engine.forward import Model
from icon2_rt.engine.graphs import StepGraphs, buckets
from icon2_rt.engine.items import ItemPlanner, ItemTable, partials_of
from icon2_rt.engine.kv import KVPages
from icon2_rt.engine.record import Record
from icon2_rt.engine.rows import Request, Row
from icon2_rt.engine.step import StepInputs, decode_step
from icon2_rt.engine.upload import Landing, Staging
from icon2_rt.steering import CompiledSteering

# Positions ahead for which attention items are laid out: with fixed buffers, and where every item must count at once.
HORIZON, EXACT_HORIZON = 64, 32


@dataclass(frozen=True)
class Manner:
    """How a batch is run: in ``fixed`` buffers or exactly; how many steps ``behind`` the device the host may look at
    results; whether a step is captured as ``graphs``."""

    fixed: bool
    behind: int = 0
    graphs: bool = False


@dataclass
class _UnderWay:
    """A step that was launched: its rows by seat, and where its results arrive."""

    rows: list[Row | None]
    slot: Tensor
    arrived: torch.cuda.Event | None


class Batch:
    """Rows in the seats of buffers that are allocated once and keep their addresses."""

    def __init__(
        self,
        model: Model,
        kv: KVPages,
        bank: DirectionBank,
        sizes: BatchSizes,
        manner: Manner,
        staging: Staging | None = None,
    ):
        self.model, self.kv, self.bank, self.sizes = model, kv, bank, sizes
        self.fixed, self.behind = manner.fixed, manner.behind
        self.rows: list[Row | None] = []
        self.under_way: deque[_UnderWay] = deque()
        self.record = Record()  # of the call that this batch runs for
        self.staging = staging or Staging(model.device)
        with torch.inference_mode(False):  # tensors made inside it could not be written to outside
            self._buffers = Buffers(model, kv, bank, sizes)
            self._landing = Landing(self._buffers.results, manner.behind + 1)
        self.buffers = self._buffers.inputs
        self._planner = self._new_planner()
        self._inputs: StepInputs | None = None
        self._repeat: Callable[[], None] | None = None  # the step of this layout, where the ops could capture it
        self._valid = 0  # steps for which the layout holds
        self._changed = True  # other rows, or rows steered otherwise, since steering and sampling were worked out
        self._taken = 0  # seats
        self._reserved = 0  # places for partial results that the rows could come to need
        self._joining: dict[int, Row] = {}  # seats whose rows the device does not know yet
        self._unsteered: list[Row] = []  # whose steering begins with the next step
        self._buckets = buckets(sizes.seats)
        self._graphs = None
        self._why_plain = _why_plain(model, manner)
        if manner.graphs:
            self._graphs = StepGraphs(self._run, self._buckets, model.device)

    @property
    def free_partials(self) -> int:
        """Places for partial results of attention that no row could come to need."""
        return self.sizes.partials - self._reserved

    def partials_of(self, request: Request) -> int:
        """Places that one row of ``request`` needs at its end: one for each split."""
        return partials_of(request, self.kv.page_size * self.sizes.split_pages)

    @property
    def capacity(self) -> int:
        """Seats that can be run at once without leaving the graphs."""
        return self._graphs.largest if self._graphs is not None and self._graphs.largest else self.sizes.seats

    @property
    def fallbacks(self) -> list[str]:
        """What was given up when graphs were captured."""
        return self._graphs.given_up if self._graphs is not None else []

    # ---------------------------------------------------------------- who sits where

    def join(self, rows: Sequence[Row]) -> None:
        """Give ``rows`` the lowest free seats. The device learns of all that have joined since the last step at once,
        before the next one."""
        free = [n for n, row in enumerate(self.rows) if row is None]
        free += range(len(self.rows), len(self.rows) + max(0, len(rows) - len(free)))
        seats = free[: len(rows)]
        self.rows += [None] * (max(seats, default=-1) + 1 - len(self.rows))
        for seat, row in zip(seats, rows, strict=True):
            self.rows[seat] = row
            self._taken += 1
            self._reserved += self.partials_of(row.request)
        self._write(seats)
        self._unsteered += [row for row in rows if row.steering is None]

    def leave(self, rows: Sequence[Row]) -> None:
        """Free the seats of ``rows``, whatever the device makes of them meanwhile."""
        gone = {id(row) for row in rows}
        stopped = []
        for seat, row in enumerate(self.rows):
            if row is not None and id(row) in gone:
                self.rows[seat] = None
                self._taken -= 1
                self._reserved -= self.partials_of(row.request)
                if row.finish in ("stop_string", "error"):  # of every other end the device knows by itself
                    stopped.append(seat)
        if stopped:
            running, no = self.buffers.state.running.view(torch.uint8), np.zeros(len(stopped), dtype=np.uint8)
            self.staging.send([(no[: end - begin], running[begin:end]) for begin, end in _runs(stopped)])
        while self.rows and self.rows[-1] is None:
            self.rows.pop()
        width = len(self._inputs.state.tokens) if self._inputs is not None else 0
        # In fixed buffers the layout still holds: an item that only such a seat needs has no length.
        if not self.fixed or self._width(len(self.rows)) < width:
            self._invalidate()

    def clear(self) -> None:
        """Nobody runs; results under way are nobody's."""
        self.rows.clear()
        self._taken = self._reserved = 0
        for step in self.under_way:
            self._landing.release(step.slot)
        self.under_way.clear()
        self._joining.clear()
        self._planner = self._new_planner()  # the old one may have been interrupted half-way
        self._unsteered.clear()
        self._invalidate()
        self.buffers.state.running.zero_()

    def _new_planner(self) -> ItemPlanner:
        return ItemPlanner(self.kv.page_size, self.sizes.split_pages, self.model.spec)

    @property
    def sparse(self) -> bool:
        """Would a step be much cheaper if the rows sat closer together?"""
        taken, width = self._taken, len(self.rows)
        return 2 * self._width(taken) <= self._width(width) if self.fixed else taken < width

    def close_ranks(self) -> None:
        """Move the rows to the lowest seats. Nothing may be under way: what the host knows of them is written anew."""
        self.buffers.state.running.zero_()
        self.rows = [row for row in self.rows if row is not None]
        self._joining.clear()
        self._write(range(len(self.rows)))

    def _width(self, n: int) -> int:
        """Seats that are run where ``n`` are taken."""
        if not self.fixed:
            return n
        return next((b for b in self._buckets if b >= n), n)

    def _invalidate(self) -> None:
        """The next step is laid out anew, steering and sampling included."""
        self._valid, self._changed = 0, True

    def _write(self, seats: Sequence[int]) -> None:
        """Bring rows into the host's side of the buffers; other seats are not touched."""
        arena, taken = self._buffers.arena, [(seat, row) for seat in seats if (row := self.rows[seat]) is not None]
        if taken:
            where = np.array([seat for seat, _ in taken])
            low, high = int(where.min()), int(where.max()) + 1
            settings = sampling_of([row for _, row in taken], self.model.spec.vocab_size, self.sizes.eos)
            for name, values in settings.items():
                arena.host[name][where] = values
                width = values.size // len(taken)
                arena.touch(name, low * width, high * width)
            tables = arena.host["tables"]
            for seat, row in taken:
                tables[seat, : len(row.low)] = row.low
                arena.touch("tables", seat * tables.shape[1], seat * tables.shape[1] + len(row.low))
            self._joining.update(taken)
        self._invalidate()

    def _bring_up(self) -> None:
        """Bring to the device what the host has written since the last time, and seat the rows that have joined.

        What a row starts from goes up with all else and is taken over by the device itself: next to it are rows that
        run. Rows join after a prefill, so a few more launches are nothing.
        """
        arena, joining, state = self._buffers.arena, self._joining, self.buffers.state
        rows = list(joining.values())
        if joining:
            arena.put("joining", np.array(list(joining), dtype=np.int64))
            arena.put("join_tokens", np.array([row.token for row in rows], dtype=np.int64))
            arena.put("join_positions", np.array([row.position for row in rows], dtype=np.int32))
            arena.put("join_generated", np.array([len(row.tokens) for row in rows], dtype=np.int32))
        arena.flush(self.staging)
        if not joining:
            return
        n, up = len(joining), arena.device
        seats = up["joining"][:n]
        state.tokens.index_copy_(0, seats, up["join_tokens"][:n])
        state.positions.index_copy_(0, seats, up["join_positions"][:n])
        state.generated.index_copy_(0, seats, up["join_generated"][:n])
        state.running.index_fill_(0, seats, True)
        self._show([(s, row) for s, row in joining.items() if row.request.sampling.repetition_penalty != 1.0])
        joining.clear()

    def _show(self, taken: Sequence[tuple[int, Row]]) -> None:
        """The tokens that the penalised rows have seen, where they are written."""
        if not taken:
            return
        vocab, seen = self.model.spec.vocab_size, self.buffers.sampling.seen
        assert seen is not None
        ids = [np.unique([*row.request.tokens, *row.tokens]) + seat * vocab for seat, row in taken]
        seats = np.array([seat for seat, _ in taken], dtype=np.int64)
        up = self.staging.upload({"seats": seats, "seen": np.concatenate(ids).astype(np.int64)})
        seen.index_fill_(0, up["seats"], False)
        seen.view(-1).index_fill_(0, up["seen"], True)

    # ---------------------------------------------------------------- steps

    def launch(self) -> None:
        """One step of every row; its results are in :meth:`results` later."""
        if self._valid == 0:
            self._lay_out()
        self._valid -= 1
        assert self._inputs is not None
        width = len(self._inputs.state.tokens)
        if self._graphs is None:
            self.step(self._inputs)
        elif replayed := self._graphs.run(width, self._run):
            self.record.graph_steps[replayed] += 1
        else:
            why = "first step of its size, captured afterwards" if self._graphs.has(width) else "no graph"
            self.record.plain_steps[why] += 1
        self.under_way.append(_UnderWay(list(self.rows), *self._landing.fetch()))
        for row in self.rows:
            if row is not None:
                row.launched += 1
        if any(row.steering is not None for row in self._unsteered):  # "generated" begins after the first step
            self._invalidate()
        self._unsteered.clear()

    def _run(self, n: int) -> None:
        """One step of the first ``n`` seats: what a graph captures."""
        decode_step(self.model, self.kv, self._views(n))

    def step(self, inputs: StepInputs) -> None:
        """One step without a graph: the first of a layout is captured where the ops can do that, the others repeat."""
        if self._repeat is not None:
            self._repeat()
            self.record.repeated_steps += 1
            return
        step, capture = partial(decode_step, self.model, self.kv, inputs), self.model.ops.capture
        if capture is not None:
            self._repeat = capture(step)
        else:
            step()
        if self._repeat is not None:
            self.record.captured_steps += 1
        else:
            self.record.plain_steps[self._why_plain] += 1

    def results(self) -> list[tuple[Row, int, float]]:
        """What the oldest step under way sampled, for the rows that were still going on then."""
        step = self.under_way.popleft()
        if step.arrived is not None:
            step.arrived.synchronize()
        tokens, logprobs = read_results(step.slot, self.sizes.seats, len(step.rows))
        self._landing.release(step.slot)
        results = zip(step.rows, tokens, logprobs, strict=True)
        return [(row, token, logprob) for row, token, logprob in results if row is not None and row.finish is None]

    def _lay_out(self) -> None:
        """Steering and attention items for the coming steps, as many as can be told now."""
        self._repeat = None
        split, planner = self.kv.page_size * self.sizes.split_pages, self._planner
        running = [(seat, row) for seat, row in enumerate(self.rows) if row is not None]
        planner.follow(running)
        launched = np.fromiter((row.launched for _, row in running), dtype=np.int64, count=len(running))
        positions = planner.first + launched
        left = planner.limit - positions
        ahead: np.ndarray | int
        if self.fixed:
            ahead, self._valid = left.clip(1, HORIZON), HORIZON
        else:
            ahead = self._valid = min(EXACT_HORIZON, int(left.min()), int((split - positions % split).min()))
        table = planner.plan(positions, ahead)
        self.record.shared(table.rows)
        arena = self._buffers.arena
        for name in ("rows", "pages", "splits", "layers", "starts"):
            arena.put(name, getattr(table, name))
        arena.put("items", np.array([len(table.rows)], dtype=np.int32))
        steerings = [row.steering if row is not None else None for row in self.rows] if self._changed else []
        if self.fixed:
            if self._changed:
                self._put_steering(steerings)
            self._bring_up()
            self._inputs = self._views(self._width(len(self.rows)))
        else:
            self._bring_up()
            self._inputs = self._exact(table, steerings)
        self._changed = False

    def _put_steering(self, steerings: Sequence[CompiledSteering | None]) -> None:
        table = self.bank.lay_out(steerings, self.sizes.terms)
        which = np.full(self.sizes.seats, -1, dtype=np.int32)
        which[: len(table.which)] = table.which
        for name, array in {**vars(table), "which": which}.items():
            self._buffers.arena.put(name, array)

    def _views(self, n: int) -> StepInputs:
        """The first ``n`` seats of the buffers, with nothing known about them."""
        return self._buffers.of(n)

    def _exact(self, table: ItemTable, steerings: Sequence[CompiledSteering | None]) -> StepInputs:
        """The rows there are, and what the host knows of them."""
        inputs, m = self._views(len(self.rows)), len(table.rows)
        items = replace(
            inputs.items,
            rows=inputs.items.rows[:m, : table.width],
            pages=inputs.items.pages[:m, : table.depth],
            splits=inputs.items.splits[:m],
            layers=inputs.items.layers[:m],
            lengths=inputs.items.lengths[:m],
            dense=True,
        )
        if not self._changed and self._inputs is not None:  # as before, but for the items
            return replace(self._inputs, items=items)
        known = self.bank.know(steerings)
        rows = [row for row in self.rows if row is not None]  # all of them: there is no gap here
        vocab = self.model.spec.vocab_size
        needed = sampling_of(rows, vocab, self.sizes.eos)
        neutral = (
            (("sampled", "seeds"), False),
            (("temperature",), 1.0),
            (("top_k",), vocab),
            (("top_p",), 1.0),
            (("min_p",), 0.0),
            (("repetition_penalty", "seen"), 1.0),
            (("min_tokens",), 0),
        )
        unused: dict[str, Any] = {
            name: None for names, value in neutral if (needed[names[0]] == value).all() for name in names
        }
        return replace(
            inputs,
            tables=inputs.tables[:, : max(len(row.low) for row in rows)],
            items=items,
            steering=known.on(self.staging.upload(known.arrays)) if known is not None else None,
            sampling=replace(inputs.sampling, **unused),
        )


def _why_plain(model: Model, manner: Manner) -> str:
    """Why a step of a batch without graphs is run one operation after another, where it is."""
    if manner.fixed:
        return "cuda_graphs=False" if model.device.type == "cuda" else "no CUDA device"
    if model.ops.capture is None:
        return f"backend {model.ops.backend}"
    return "a step that the extension could not record"


def _runs(seats: Sequence[int]) -> list[tuple[int, int]]:
    """[begin, end) of neighbouring seats: each is one copy a buffer."""
    runs: list[tuple[int, int]] = []
    for seat in sorted(seats):
        if runs and runs[-1][1] == seat:
            runs[-1] = (runs[-1][0], seat + 1)
        else:
            runs.append((seat, seat + 1))
    return runs
