"""The running rows: who sits where, the buffers that a step reads, and the steps under way.

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
from icon2_rt.engine.forward import Model
from icon2_rt.engine.graphs import StepGraphs, buckets
from icon2_rt.engine.items import ItemTable, item_rows, partials_of, plan_items
from icon2_rt.engine.kv import KVPages
from icon2_rt.engine.record import Record
from icon2_rt.engine.rows import Request, Row
from icon2_rt.engine.step import StepInputs, decode_step
from icon2_rt.ops import AttentionItems, RowSampling, RowState, RowSteering
from icon2_rt.steering import CompiledSteering

# Positions ahead for which attention items are laid out: with fixed buffers, and where every item must count at once.
HORIZON, EXACT_HORIZON = 64, 32


@dataclass(frozen=True)
class BatchSizes:
    """``seats`` rows; ``partials`` places for the partial results of attention; at most ``eos`` ending tokens a row;
    ``terms`` of a steering; ``split_pages`` pages in a split."""

    seats: int
    partials: int
    eos: int
    terms: int
    split_pages: int

    def hold(self, other: BatchSizes) -> bool:
        return self.seats >= other.seats and self.partials >= other.partials and self.eos >= other.eos


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
    tokens: Tensor
    logprobs: Tensor
    arrived: torch.cuda.Event | None


class Batch:
    """Rows in the seats of buffers that are allocated once and keep their addresses."""

    def __init__(self, model: Model, kv: KVPages, bank: DirectionBank, sizes: BatchSizes, manner: Manner):
        self.model, self.kv, self.bank, self.sizes = model, kv, bank, sizes
        self.fixed, self.behind = manner.fixed, manner.behind
        self.rows: list[Row | None] = []
        self.under_way: deque[_UnderWay] = deque()
        self.record = Record()  # of the call that this batch runs for
        with torch.inference_mode(False):  # tensors made inside it could not be written to outside
            self.buffers = _allocate(model, kv, bank, sizes)
        self._inputs: StepInputs | None = None
        self._repeat: Callable[[], None] | None = None  # the step of this layout, where the ops could capture it
        self._valid = 0  # steps for which the layout holds
        self._changed = True  # other rows, or rows steered otherwise, since steering and sampling were worked out
        self._unsteered: list[Row] = []  # whose steering begins with the next step
        self._buckets = buckets(sizes.seats)
        self._graphs = None
        self._why_plain = _why_plain(model, manner)
        if manner.graphs:
            self._graphs = StepGraphs(self._run, self._buckets, model.device)

    @property
    def free_partials(self) -> int:
        """Places for partial results of attention that no row could come to need."""
        return self.sizes.partials - sum(self.partials_of(row.request) for row in self.rows if row is not None)

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
        """Give ``rows`` the lowest free seats."""
        free = [n for n, row in enumerate(self.rows) if row is None]
        free += range(len(self.rows), len(self.rows) + max(0, len(rows) - len(free)))
        seats = free[: len(rows)]
        self.rows += [None] * (max(seats, default=-1) + 1 - len(self.rows))
        for seat, row in zip(seats, rows, strict=True):
            self.rows[seat] = row
        self._write(seats)
        self._unsteered += [row for row in rows if row.steering is None]

    def leave(self, rows: Sequence[Row]) -> None:
        """Free the seats of ``rows``, whatever the device makes of them meanwhile."""
        gone = {id(row) for row in rows}
        for seat, row in enumerate(self.rows):
            if row is not None and id(row) in gone:
                self.rows[seat] = None
                if row.finish == "stop_string":  # of every other end the device knows by itself
                    _put(self.buffers.state.running[seat : seat + 1], np.zeros(1, dtype=bool))
        while self.rows and self.rows[-1] is None:
            self.rows.pop()
        width = len(self._inputs.state.tokens) if self._inputs is not None else 0
        # In fixed buffers the layout still holds: an item that only such a seat needs has no length.
        if not self.fixed or self._width(len(self.rows)) < width:
            self._invalidate()

    def clear(self) -> None:
        """Nobody runs; results under way are nobody's."""
        self.rows.clear()
        self.under_way.clear()
        self._unsteered.clear()
        self._invalidate()
        self.buffers.state.running.zero_()

    @property
    def sparse(self) -> bool:
        """Would a step be much cheaper if the rows sat closer together?"""
        taken, width = sum(row is not None for row in self.rows), len(self.rows)
        return 2 * self._width(taken) <= self._width(width) if self.fixed else taken < width

    def close_ranks(self) -> None:
        """Move the rows to the lowest seats. Nothing may be under way: what the host knows of them is written anew."""
        self.buffers.state.running.zero_()
        self.rows = [row for row in self.rows if row is not None]
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
        """Bring rows into the buffers as the host knows them; other seats are not touched."""
        state, how, model = self.buffers.state, self.buffers.sampling, self.model
        for begin, end in _runs(seats):
            rows = [row for row in self.rows[begin:end] if row is not None]
            at = slice(begin, end)
            _put(state.tokens[at], np.array([row.token for row in rows]))
            _put(state.positions[at], np.array([row.position for row in rows], dtype=np.int32))
            _put(state.generated[at], np.array([len(row.tokens) for row in rows], dtype=np.int32))
            _put(state.running[at], np.ones(len(rows), dtype=bool))
            tables = np.zeros((len(rows), self.buffers.tables.shape[1]), dtype=np.int32)
            for table, row in zip(tables, rows, strict=True):
                table[: len(row.low)] = row.low
            _put(self.buffers.tables[at], tables)
            for name, values in sampling_of(rows, model.spec.vocab_size, self.sizes.eos).items():
                _put(getattr(how, name)[at], values)
        for seat in seats:
            sitter = self.rows[seat]
            if sitter is not None and sitter.request.sampling.repetition_penalty != 1.0:
                seen = np.zeros(model.spec.vocab_size, dtype=bool)
                seen[[*sitter.request.tokens, *sitter.tokens]] = True
                assert how.seen is not None
                _put(how.seen[seat], seen)
        self._invalidate()

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
        state, n = self._inputs.state, len(self.rows)
        if self.model.device.type == "cuda":
            tokens, logprobs = (x[:n].to("cpu", non_blocking=True) for x in (state.tokens, state.logprobs))
            arrived = _end_of_work(self.model.device)
        else:
            tokens, logprobs, arrived = state.tokens[:n].clone(), state.logprobs[:n].clone(), None
        self.under_way.append(_UnderWay(list(self.rows), tokens, logprobs, arrived))
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
        results = zip(step.rows, step.tokens.tolist(), step.logprobs.tolist(), strict=True)
        return [(row, token, logprob) for row, token, logprob in results if row is not None and row.finish is None]

    def _lay_out(self) -> None:
        """Steering and attention items for the coming steps, as many as can be told now."""
        self._repeat = None
        n, split = len(self.rows), self.kv.page_size * self.sizes.split_pages
        running = [(seat, row) for seat, row in enumerate(self.rows) if row is not None]
        left = [row.request.positions - row.next_position for _, row in running]
        if self.fixed:
            ahead = [min(HORIZON, max(1, steps)) for steps in left]
            self._valid = HORIZON
        else:
            self._valid = min(EXACT_HORIZON, *left, *(split - row.next_position % split for _, row in running))
            ahead = [self._valid] * len(running)
        table = plan_items(running, ahead, self.kv.page_size, self.sizes.split_pages, self.model.spec)
        self.record.shared(table.rows)
        _put_items(self.buffers.items, table)
        steerings = [row.steering if row is not None else None for row in self.rows]
        if self.fixed:
            if self._changed:
                self._put_steering(steerings)
            self._inputs = self._views(self._width(n))
        else:
            self._inputs = self._exact(table, steerings)
        self._changed = False

    def _put_steering(self, steerings: Sequence[CompiledSteering | None]) -> None:
        buffers = self.buffers.steering
        assert buffers is not None
        table = self.bank.lay_out(steerings, self.sizes.terms)
        which = np.full(self.sizes.seats, -1, dtype=np.int32)
        which[: len(table.which)] = table.which
        for name, array in {**vars(table), "which": which}.items():
            _put(getattr(buffers, name)[: len(array)], array)

    def _views(self, n: int) -> StepInputs:
        """The first ``n`` seats of the buffers, with nothing known about them."""
        b = self.buffers
        assert b.steering is not None
        items = replace(b.items, starts=b.items.starts[:n], n_splits=b.items.n_splits[:n])
        return StepInputs(
            state=RowState(*(x[:n] for x in vars(b.state).values())),
            tables=b.tables[:n],
            items=items,
            steering=replace(b.steering, which=b.steering.which[:n]),
            sampling=RowSampling(*(x[:n] for x in vars(b.sampling).values())),
        )

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
            steering=self.bank.row_steering(steerings),
            sampling=replace(inputs.sampling, **unused),
        )


def _why_plain(model: Model, manner: Manner) -> str:
    """Why a step of a batch without graphs is run one operation after another, where it is."""
    if manner.fixed:
        return "cuda_graphs=False" if model.device.type == "cuda" else "no CUDA device"
    if model.ops.capture is None:
        return f"backend {model.ops.backend}"
    return "a step that the extension could not record"


def sampling_of(rows: Sequence[Row], vocab: int, n_eos: int) -> dict[str, np.ndarray]:
    """The rows' settings under the names of :class:`~icon2_rt.ops.RowSampling`; a greedy row's filters are neutral."""
    options = [row.request.sampling for row in rows]
    seeds = [row.seed for row in rows]

    def column(name: str, neutral: float, dtype: type) -> np.ndarray:
        values = (neutral if seed is None else getattr(o, name) for o, seed in zip(options, seeds, strict=True))
        return np.fromiter(values, dtype=dtype, count=len(rows))

    top_k = column("top_k", 0, np.int32)
    words = [(0, 0) if seed is None else (seed & 0xFFFFFFFF, seed >> 32) for seed in seeds]
    eos = np.full((len(rows), n_eos), -1, dtype=np.int32)
    for row, o in enumerate(options):
        eos[row, : len(o.eos_token_ids)] = o.eos_token_ids
    return {
        "sampled": np.array([seed is not None for seed in seeds]),
        "seeds": np.array(words, dtype=np.int64),
        "temperature": column("temperature", 1.0, np.float32),
        "top_k": np.where(top_k == 0, vocab, top_k).astype(np.int32),
        "top_p": column("top_p", 1.0, np.float32),
        "min_p": column("min_p", 0.0, np.float32),
        "repetition_penalty": np.array([o.repetition_penalty for o in options], dtype=np.float32),
        "eos": eos,
        "min_tokens": np.array([max(0, row.min_tokens) for row in rows], dtype=np.int32),
        "budget": np.array([row.request.budget for row in rows], dtype=np.int32),
    }


def _allocate(model: Model, kv: KVPages, bank: DirectionBank, sizes: BatchSizes) -> StepInputs:
    """All buffers at their full size, every seat free."""
    spec, device, seats = model.spec, model.device, sizes.seats
    n_items = 2 * sizes.partials  # a row's split is one item below its fork and one above

    def full(*shape: int, value: float = 0, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    terms = (seats, spec.n_layers, sizes.terms)
    return StepInputs(
        state=RowState(
            tokens=full(seats, dtype=torch.int64),
            positions=full(seats),
            generated=full(seats),
            running=full(seats, value=False, dtype=torch.bool),
            logprobs=full(seats, dtype=torch.float32),
        ),
        tables=full(seats, min(kv.n_pages, kv.pages_for(spec.max_length))),
        items=AttentionItems(
            rows=full(n_items, item_rows(spec), value=-1),
            pages=full(n_items, sizes.split_pages),
            splits=full(n_items),
            layers=full(n_items, 2),
            count=full(1),
            starts=full(seats),
            lengths=full(n_items),
            n_splits=full(seats),
            split=kv.page_size * sizes.split_pages,
            n_partials=sizes.partials,
        ),
        steering=RowSteering(
            bank=bank.vectors,
            count=full(*terms[:2]),
            index=full(*terms),
            alpha=full(*terms, dtype=torch.float32),
            beta=full(*terms, dtype=torch.float32),
            keep_norm=full(seats, value=False, dtype=torch.bool),
            which=full(seats, value=-1),
        ),
        sampling=RowSampling(
            sampled=full(seats, value=False, dtype=torch.bool),
            seeds=full(seats, 2, dtype=torch.int64),
            temperature=full(seats, value=1.0, dtype=torch.float32),
            top_k=full(seats, value=spec.vocab_size),
            top_p=full(seats, value=1.0, dtype=torch.float32),
            min_p=full(seats, dtype=torch.float32),
            repetition_penalty=full(seats, value=1.0, dtype=torch.float32),
            seen=full(seats, spec.vocab_size, value=False, dtype=torch.bool),
            eos=full(seats, sizes.eos, value=-1),
            min_tokens=full(seats),
            budget=full(seats),
        ),
    )


def _put_items(items: AttentionItems, table: ItemTable) -> None:
    n = len(table.rows)
    for name in ("rows", "pages", "splits", "layers"):
        _put(getattr(items, name)[:n], getattr(table, name))
    _put(items.starts[: len(table.starts)], table.starts)
    _put(items.count, np.array([n], dtype=np.int32))


def _put(target: Tensor, values: np.ndarray) -> None:
    """Copy to the device without waiting for it: through pinned memory, which torch keeps until the copy is done."""
    source = torch.from_numpy(values)
    target.copy_(source.pin_memory() if target.device.type == "cuda" else source, non_blocking=True)


def _end_of_work(device: torch.device) -> torch.cuda.Event:
    """What has happened once all that ``device`` was given so far is done; another device may be the current one."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _runs(seats: Sequence[int]) -> list[tuple[int, int]]:
    """[begin, end) of neighbouring seats: each is one copy a buffer."""
    runs: list[tuple[int, int]] = []
    for seat in sorted(seats):
        if runs and runs[-1][1] == seat:
            runs[-1] = (runs[-1][0], seat + 1)
        else:
            runs.append((seat, seat + 1))
    return runs
