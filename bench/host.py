"""What the host does beside the device: copies, time and prefill passes, counted on a CPU without a GPU.

The engine runs as it does in front of CUDA graphs (fixed buffers, results three steps late) at the sizes of
Llama-3-8B with narrow heads. Its steps and its prefill are stubs: nothing computes, so what is left is the host's work.

- A *copy up* is a call that brings host memory to the device, a *copy down* one that brings device memory to the host:
  ``Tensor.to(device)``, ``torch.tensor(device=)`` and ``copy_(non_blocking=True)``. On a CUDA device each copy up of
  ``copy_`` goes through pinned memory; the others wait for the device (*blocking*).
- Times are those of the thread on its core: median, least and most. Other work on the machine makes them longer, by
  what it leaves of the caches. *Calls* are the Python and C functions that the interpreter calls meanwhile, the same
  number in every run.

``--label before`` and ``--label after`` keep two versions of the code side by side in one file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench import RESULTS
from bench.environment import environment, load, slug, write
from bench.seats import Seating, requests
from bench.shapes import SHAPES, random_weights
from bench.timing import Timing
from icon2_rt.engine import Branch, Engine, EngineOptions, Model, Request, Sampling
from icon2_rt.engine import engine as engine_module
from icon2_rt.engine.batch import HORIZON, Batch, Manner
from icon2_rt.models import DecoderWeights
from icon2_rt.ops import Ops, Segments
from icon2_rt.steering import CompiledSteering, Direction, compile_steering

# Llama-3-8B as the host sees it: blocks, heads, vocabulary, positions. Narrow heads: no step is ever computed.
SPEC = replace(SHAPES["llama3-8b"], head_dim=2, hidden_size=64, intermediate_size=64)
MANNER = Manner(fixed=True, behind=3)
STEPS = 256
LAYOUTS = ((32, 2048), (128, 2048), (128, 8192))  # pairs, prompt tokens


class Crossings(TorchFunctionMode):
    """Counts the copies between host and device memory that torch is asked for inside it."""

    def __init__(self, on_device: Sequence[Tensor] = ()):
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._memory = {t.untyped_storage().data_ptr() for t in on_device}

    def watch(self, on_device: Sequence[Tensor]) -> None:
        self._memory |= {t.untyped_storage().data_ptr() for t in on_device}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.to and isinstance(args[1] if len(args) > 1 else None, torch.device):
            self._add("up" if kwargs.get("non_blocking") else "blocking", args[0])
        elif function is Tensor.clone and self._here(args[0]):
            self._add("down", args[0])
        elif function is Tensor.copy_ and kwargs.get("non_blocking"):
            target, source = args[:2]
            if self._here(source) and not self._here(target):
                self._add("down", source)
            elif not self._here(source):
                self._add("up", source)
        elif function in (Tensor.tolist, Tensor.item, Tensor.__bool__) and self._here(args[0]):
            self._add("reads", args[0])
        result = function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor) and isinstance(kwargs.get("device"), torch.device):
            self._add("blocking", result)
        return result

    def _add(self, kind: str, what: Tensor) -> None:
        self.count[kind] += 1
        self.bytes[kind] += what.nbytes

    def _here(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._memory


def device_tensors(batch: Batch) -> list[Tensor]:
    b = batch.buffers
    parts = [b.state, b.items, b.steering, b.sampling]
    return [b.tables, *(t for part in parts for t in vars(part).values() if isinstance(t, Tensor))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench host", description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="after", help="which version this is: kept beside the others of the file")
    parser.add_argument("--rounds", type=int, default=30, help="how often a layout is timed")
    parser.add_argument("--out", type=Path, help="a folder or a file; default: bench/results/")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    here = environment()
    kept = _kept(options.out, slug(None))
    figures = {
        "seating": [seating_copies(pairs) for pairs in (1, 8, 32)],
        "steps": step_copies(32, STEPS),
        "prefill": [prefill_copies(n, scope) for scope in ("response", "all") for n in (1, 32)],
        "layout": [layout_times(pairs, prompt, options.rounds) for pairs, prompt in LAYOUTS],
        "step": step_times(32),
        "admission": [admission(seats) for seats in (64, 256)],
        "load": load(),
    }
    runs = {**kept, options.label: {"environment": here, "figures": figures}}
    write("host", {"benchmark": "host", "environment": here, "settings": {"steps": STEPS}, "runs": runs}, options.out)


def _kept(out: Path | None, machine: str) -> dict[str, Any]:
    """The versions that the file has already."""
    path = out if out is not None and out.suffix == ".json" else (out or RESULTS) / f"host-{machine}.json"
    return json.loads(path.read_text())["runs"] if path.exists() else {}


# --- engines whose device does nothing -------------------------------------------------------------------------------


def idle_engine(pages: int, max_rows: int, ops: Ops | None = None) -> Engine:
    """An engine of :data:`SPEC` without weights; its KV pages are not touched."""
    nothing = torch.zeros(1, dtype=torch.bfloat16)
    weights = DecoderWeights(nothing, [], nothing, nothing, nothing)
    each = 2 * SPEC.n_layers * SPEC.n_kv_heads * SPEC.head_dim * 32 * 2
    options = EngineOptions(kv_memory=pages * each, max_rows=max_rows)
    engine = Engine(Model(SPEC, weights, ops or Ops()), options)
    engine._manner = MANNER
    return engine


def pairs_of(engine: Engine, pairs: int, prompt: int, budget: int) -> list[Request]:
    SHAPES["host"] = SPEC
    return requests(Seating("host", pairs, prompt=prompt), engine, budget)


@contextmanager
def without_a_device(
    launched: Callable[[Batch], None] = lambda batch: None, prefilled: Callable[[int], None] = lambda jobs: None
) -> Iterator[None]:
    """Steps and prefill compute nothing. ``launched(batch)`` after each launch, ``prefilled(jobs)`` for each pass."""
    launch = Batch.launch

    def watched(batch: Batch) -> None:
        launch(batch)
        launched(batch)

    def prefill(*args: Any, **kwargs: Any) -> None:
        jobs = next(a for a in args if isinstance(a, list))
        if jobs:
            prefilled(len(jobs))

    with (
        mock.patch.object(Batch, "launch", watched),
        mock.patch.object(Batch, "step", return_value=None),
        mock.patch.object(engine_module, "run_prefill", prefill),
    ):
        yield


def drain(engine: Engine, asked: Sequence[Request]) -> None:
    for _ in engine.decode(asked):
        pass


# --- what is counted -------------------------------------------------------------------------------------------------


def copies(engine: Engine, asked: Sequence[Request]) -> list[dict[str, dict[str, int]]]:
    """Copies and bytes of each step, seating included in the first, with the buffers made by an earlier call."""
    steps: list[dict[str, dict[str, int]]] = []
    with without_a_device():
        drain(engine, [replace(r, budget=2) for r in asked])
    crossings = Crossings(device_tensors(engine._batches[0]))

    def launched(batch: Batch) -> None:
        steps.append({"count": dict(crossings.count), "bytes": dict(crossings.bytes)})
        crossings.count.clear()
        crossings.bytes.clear()

    with without_a_device(launched), crossings:
        drain(engine, asked)
    return steps


def seating_copies(pairs: int) -> dict[str, Any]:
    engine = idle_engine(pages=pairs * 80, max_rows=256)
    first = copies(engine, pairs_of(engine, pairs, prompt=2048, budget=8))[0]
    return {"pairs": pairs, "prompt": 2048, **first}


def step_copies(pairs: int, n: int) -> dict[str, Any]:
    """The steps after the first, and among them the one that lays out the next positions."""
    engine = idle_engine(pages=pairs * 110, max_rows=256)
    steps = copies(engine, pairs_of(engine, pairs, prompt=2048, budget=n + 8))[1 : n + 1]
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step["count"])
    return {
        "pairs": pairs,
        "steps": n,
        "mean": {kind: value / n for kind, value in total.items()},
        "layout": steps[HORIZON - 1],
        "steady": steps[HORIZON - 2],
    }


def prefill_copies(n: int, scope: str) -> dict[str, Any]:
    """One prefill pass of ``n`` prompts for a pair each, attention aside: it reads what a library's kernel would."""

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        for tensor in (segments.slots, segments.queries_before, segments.keys_before):
            assert tensor.numel()
        return q.reshape(len(q), -1)

    spec = SHAPES["dry"]
    weights = random_weights("dry", torch.device("cpu"), torch.float32)
    engine = Engine(Model(spec, weights, replace(Ops(), prefill_attention=attend)), EngineOptions(kv_memory="64MiB"))
    engine._manner = MANNER
    direction = Direction("d", torch.randn(spec.n_layers, spec.hidden_size))
    pair = [_compiled(sign * direction, scope, spec.n_layers, spec.hidden_size) for sign in (0.1, -0.1)]
    branches = tuple(Branch(s, None) for s in pair)
    asked = [Request(i, tuple(range(1, 41 + i % 7)), branches, Sampling(), 2) for i in range(n)]
    crossings = Crossings()
    run_prefill = engine_module.run_prefill

    def counted(*args: Any, **kwargs: Any) -> None:
        with crossings:
            run_prefill(*args, **kwargs)

    crossings.watch([engine.kv.k, engine.kv.v])
    with mock.patch.object(engine_module, "run_prefill", counted):
        drain(engine, asked)
    return {"prompts": n, "scope": scope, "count": dict(crossings.count), "bytes": dict(crossings.bytes)}


def _compiled(steering: Any, scope: str, n_layers: int, hidden: int) -> CompiledSteering:
    return compile_steering(steering.with_scope(scope), n_layers, hidden)


# --- what is timed ---------------------------------------------------------------------------------------------------


def calls_of(work: Callable[[], Any]) -> int:
    """How many functions, Python's and C's, the interpreter calls."""
    n = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal n
        n += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return n


def layout_times(pairs: int, prompt: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of laying out the next positions: with nobody new, and after one pair has taken others' seats."""
    engine = idle_engine(pages=pairs * (prompt // 32 + 40), max_rows=2 * pairs)
    asked = pairs_of(engine, pairs + 1, prompt, budget=512)
    steady, joined = [], []
    batch = engine._take_batch(asked)
    pinned = engine.bank.pin(b.steering for r in asked for b in r.branches)
    with without_a_device():
        groups = [engine._open(request)[0] for request in asked]
        batch.join([row for rows in groups[:pairs] for row in rows])
        batch.launch()
        gone, spare = groups[pairs // 2], groups[pairs]
        for _ in range(rounds):
            batch._valid = 0
            begin = time.thread_time()
            batch._lay_out()
            steady.append(1e3 * (time.thread_time() - begin))
            batch.leave(gone)
            begin = time.thread_time()
            batch.join(spare)
            batch._lay_out()
            joined.append(1e3 * (time.thread_time() - begin))
            gone, spare = spare, gone
        batch._valid = 0
        calls = calls_of(batch._lay_out)
    engine.bank.unpin(pinned)
    items = int(batch.buffers.items.count[0])
    return {
        "pairs": pairs,
        "prompt": prompt,
        "items": items,
        "calls": calls,
        "milliseconds": {"steady": Timing.of(steady).record(), "joined": Timing.of(joined).record()},
    }


def step_times(pairs: int) -> dict[str, Any]:
    """Microseconds from one launch to the next: all that the host does for a step, its launch being a stub."""
    engine = idle_engine(pages=pairs * 110, max_rows=2 * pairs)
    asked = pairs_of(engine, pairs, prompt=512, budget=512)
    marks: list[float] = []
    with without_a_device(lambda batch: marks.append(time.thread_time())):
        drain(engine, [replace(r, budget=2) for r in asked])
        marks.clear()
        drain(engine, asked)
        n_steps = 40
        few, more = (
            calls_of(lambda n=n: drain(engine, [replace(r, budget=n) for r in asked])) for n in (8, 8 + n_steps)
        )
    times = sorted(1e6 * (b - a) for a, b in pairwise(marks[8:]))
    return {
        "rows": 2 * pairs,
        "calls": (more - few) / n_steps,
        "microseconds": {**Timing.of(times).record(), "p5": times[len(times) // 20]},
    }


def admission(seats: int) -> dict[str, Any]:
    """Prefill passes and steps of pairs of mixed lengths, eight times as many as there are seats for."""
    draw = random.Random(0)
    engine = idle_engine(pages=seats * 60, max_rows=seats)
    asked = [
        replace(r, tokens=r.tokens[: draw.randrange(64, 512)], budget=draw.randrange(16, 400))
        for r in pairs_of(engine, 4 * seats, prompt=512, budget=400)
    ]
    passes: list[int] = []
    steps = [0, 0]

    def launched(batch: Batch) -> None:
        steps[0] += 1
        steps[1] += sum(row is not None for row in batch.rows)

    with without_a_device(launched, passes.append):
        drain(engine, asked)
    return {
        "seats": seats,
        "pairs": len(asked),
        "passes": len(passes),
        "pairs_per_pass": sum(passes[1:]) / max(1, len(passes) - 1),
        "steps": steps[0],
        "row_steps": steps[1],
    }


if __name__ == "__main__":
    main()
