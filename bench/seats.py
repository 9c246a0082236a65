"""Rows that decode over KV filled with random numbers: a step at any length of prompt, without a prefill before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bench.roofline import Load
from bench.shapes import SHAPES, random_weights
from icon2_rt.engine import Branch, Engine, EngineOptions, Model, Request, Row, Sampling
from icon2_rt.engine.batch import Batch, Manner
from icon2_rt.engine.items import plan_items
from icon2_rt.engine.step import StepInputs
from icon2_rt.models import DecoderSpec
from icon2_rt.ops import AttentionItems, Backend, RowState, select
from icon2_rt.steering import CompiledSteering, Direction, compile_steering

# As many distinct steerings as a batch has rows, and the directions of a steering of three.
MOST_DIRECTIONS = 260
# Far too weak to overflow, whatever the residual stream; what a push costs does not depend on how strong it is.
STRENGTH = 0.01


@dataclass(frozen=True)
class Seating:
    """Who sits in a batch: ``groups`` prompts of ``prompt`` tokens with ``branches`` each.

    Attributes:
        steering: "off": the engine has no steering at all; "idle": it could, and no row does; "on".
        terms: directions of a steering. distinct: so many steerings, dealt out to the rows in turn; in a pair of one
            the branches push opposite ways. blocks: steered ones, "all" or the middle "one".
        shared: the branches of a group read one copy of their prompt's KV; else each is a group of its own.
    """

    model: str
    groups: int
    branches: int = 2
    prompt: int = 256
    steering: Literal["off", "idle", "on"] = "on"
    terms: int = 1
    distinct: int = 1
    blocks: Literal["all", "one"] = "all"
    shared: bool = True

    @property
    def rows(self) -> int:
        return self.groups * self.branches

    def load(self, itemsize: int = 2) -> Load:
        """What one of its steps has to move."""
        acts = self.steering == "on" and self.blocks == "all"  # a single block's vectors are nothing
        return Load(
            SHAPES[self.model], self.groups, self.branches, self.prompt, terms=self.terms if acts else 0,
            distinct=self.distinct, shared=self.shared, itemsize=itemsize,
        )  # fmt: skip

    def __str__(self) -> str:
        what = f"{self.groups} × {self.branches} rows" + ("" if self.shared else ", each with its prompt")
        if self.steering != "on":
            return f"{what}, {self.prompt} tokens, steering {self.steering}"
        blocks = "all blocks" if self.blocks == "all" else "one block"
        return f"{what}, {self.prompt} tokens, {self.distinct} steering(s) of {self.terms} term(s), {blocks}"


def make_engine(
    model: str,
    device: torch.device,
    max_rows: int,
    backend: Backend | None = None,
    kv_memory: int | str | None = None,
    exact: bool = False,
) -> Engine:
    """An engine on random weights whose KV pages hold random numbers.

    Args:
        backend: "triton" on a GPU and "reference" on a CPU where None.
        kv_memory: where None, all the memory that is left on a GPU, and 8 MiB on a CPU.
        exact: on a CPU run exactly the rows there are, as a CPU does; else in the fixed buffers that a GPU's graphs
            read, without the graphs.
    """
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if kv_memory is None and not on_gpu:
        kv_memory = "8MiB"
    options = EngineOptions(kv_memory=kv_memory, max_rows=max_rows, max_directions=MOST_DIRECTIONS)
    ops = select(backend or ("triton" if on_gpu else "reference"), device)
    engine = Engine(Model(SHAPES[model], random_weights(model, device, dtype), ops), options)
    if not on_gpu and not exact:
        engine._manner = Manner(fixed=True)
    for pages in (engine.kv.k, engine.kv.v):
        for block in pages:
            block.normal_()
    return engine


class WithoutSteering(Batch):
    """A batch whose steps were captured with no steering in them, to hold "idle" and "on" against."""

    def _views(self, n: int) -> StepInputs:
        return replace(super()._views(n), steering=None)


def without_steering(engine: Engine, usual: Batch) -> Batch:
    """A batch like ``usual``, and none of its steps knows of steering."""
    return WithoutSteering(usual.model, usual.kv, usual.bank, usual.sizes, engine._manner, usual.staging)


class Seats:
    """The rows of a :class:`Seating`, as an engine has them after their prefill; one batch of buffers (and its graphs)
    per engine and kind, used again by the next seating."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._batches: dict[bool, Batch] = {}  # without steering: True
        self._rows: list[Row] = []
        self._pinned: list[str] = []

    def missing(self, seating: Seating, budget: int) -> str | None:
        """Why the seating's rows cannot sit down, None if they can."""
        kv = self.engine.kv
        n = sum(self.engine._plan(r).pages for r in requests(seating, self.engine, budget))
        if n <= kv.n_pages:
            return None
        gib = kv.n_bytes / kv.n_pages / 2**30
        return f"does not fit: {n * gib:.1f} GiB of KV, and there are {kv.n_pages * gib:.1f}"

    def take(self, seating: Seating, budget: int) -> Batch:
        """Seat the rows, each to run for ``budget`` steps. They stay until :meth:`leave`.

        Raises:
            ValueError: more rows, or more partial results of attention, than the batch has places for.
        """
        engine = self.engine
        asked = requests(seating, engine, budget)
        batch = self._batch(seating.steering == "off", asked)
        partials = sum(len(r.branches) * batch.partials_of(r) for r in asked)
        if seating.rows > batch.sizes.seats or partials > batch.sizes.partials:
            raise ValueError(
                f"{seating}: {seating.rows} rows and {partials} partial results do not go into a batch of "
                f"{batch.sizes.seats} and {batch.sizes.partials}"
            )
        self._pinned = engine.bank.pin(b.steering for r in asked for b in r.branches)
        self._rows = [row for request in asked for row in engine._open(request)[0]]
        batch.join(self._rows)
        return batch

    def _batch(self, off: bool, asked: Sequence[Request]) -> Batch:
        if not self._batches:
            self._batches[False] = self.engine._take_batch(asked)
        usual = self._batches[False]
        if off not in self._batches:
            self._batches[off] = without_steering(self.engine, usual)
        return self._batches[off]

    def graphed(self, rows: int) -> bool:
        """Were steps of so many rows replays? Not on a CPU, nor where no memory was left for their graph or its capture
        failed. Asked after they have run: a graph is captured when it is first needed."""
        return all(batch._graphs is not None and batch._graphs.largest >= rows for batch in self._batches.values())

    def leave(self) -> None:
        for batch in self._batches.values():
            batch.clear()
        for row in self._rows:
            self.engine.kv.release(row.pages)
        self.engine.bank.unpin(self._pinned)
        self._rows, self._pinned = [], []


def requests(seating: Seating, engine: Engine, budget: int) -> list[Request]:
    """The groups, greedy and without an end-of-sequence token."""
    spec = engine.model.spec
    tokens = tuple(n % spec.vocab_size for n in range(seating.prompt))
    given = steerings(seating, spec.n_layers, spec.hidden_size)
    rows = [Branch(given[n % len(given)], None) for n in range(seating.rows)]
    size = seating.branches if seating.shared else 1
    groups = [tuple(rows[n : n + size]) for n in range(0, len(rows), size)]
    return [Request(n, tokens, branches, Sampling(), budget) for n, branches in enumerate(groups)]


def steerings(seating: Seating, n_layers: int, hidden_size: int) -> Sequence[CompiledSteering | None]:
    """What the rows get in turn; a pair with a single steering gets it with both signs."""
    if seating.steering != "on":
        return [None]
    return _steerings(seating.terms, seating.distinct, seating.blocks, n_layers, hidden_size)


@cache
def _steerings(
    terms: int, distinct: int, blocks: str, n_layers: int, hidden_size: int
) -> list[CompiledSteering | None]:
    middle = n_layers // 2
    made = []
    for n in range(distinct):
        parts = []
        for k in range(terms):
            generator = torch.Generator().manual_seed(n * terms + k)
            direction = Direction(f"random-{n}-{k}", torch.randn(n_layers, hidden_size, generator=generator))
            parts.append(STRENGTH * (direction if blocks == "all" else direction[middle : middle + 1]))
        total = sum(parts[1:], start=parts[0])
        made += [total, -1.0 * total] if distinct == 1 else [total]
    return [compile_steering(steering, n_layers, hidden_size) for steering in made]


def attention_items(
    spec: DecoderSpec,
    groups: int,
    branches: int,
    prompt: int,
    generated: int,
    page_size: int,
    split_pages: int,
    device: torch.device,
) -> tuple[AttentionItems, int, int]:
    """Work items of groups over prompts of ``prompt`` tokens, every row ``generated`` tokens further.

    Returns:
        the items; how many pages there are; how many positions are read, a shared one once.
    """
    rows: list[Row] = []
    free = 0
    positions = prompt + generated
    shared, own = (prompt - 1) // page_size, -(-positions // page_size) - (prompt - 1) // page_size
    for n in range(groups):
        request = Request(n, (0,) * prompt, (Branch(None, None),) * branches, Sampling(), generated + 1)
        common = list(range(free, free + shared))
        free += shared
        for branch in range(branches):
            pages = common + list(range(free, free + own))
            free += own
            rows.append(Row(request, branch, pages, pages, spec.n_layers - 1, positions - 1, 0, launched=generated))
    table = plan_items(list(enumerate(rows)), [1] * len(rows), page_size, split_pages, spec)
    depth = -(-positions // (page_size * split_pages))

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    items = AttentionItems(
        rows=put(table.rows),
        pages=put(table.pages),
        splits=put(table.splits),
        layers=put(table.layers),
        count=torch.tensor([len(table.rows)], dtype=torch.int32, device=device),
        starts=put(table.starts),
        lengths=torch.zeros(len(table.rows), dtype=torch.int32, device=device),
        n_splits=torch.zeros(len(rows), dtype=torch.int32, device=device),
        split=page_size * split_pages,
        n_partials=depth * len(rows),
    )

    def per_row(value: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full((len(rows),), value, dtype=dtype, device=device)

    items.update(
        RowState(
            tokens=per_row(0, torch.int64), positions=per_row(positions - 1), generated=per_row(generated),
            running=per_row(True, torch.bool), logprobs=per_row(0, torch.float32),
        )
    )  # fmt: skip
    return items, free, groups * shared * page_size + len(rows) * (positions - shared * page_size)
