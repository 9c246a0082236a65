"""Where sharing the prompt's KV pays: branches that read it together beside the same branches that each read it alone.

Both sides have the same rows, the same pages and the same numbers in them; only the work items of attention differ. An
item of the shared side serves all branches of the group (as many as fit a tile), an item of the other side serves one.
The sides take turns in one process, and a ratio is that of two neighbouring turns: above 1, sharing is faster. Below
one split (128 positions) there is nothing that an item could share, both sides are the same, and the spread of their
ratio is the noise of the machine. Beside each ratio stands the KV memory with one copy of the prompt and with a copy a
branch.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.environment import environment, load, write
from bench.roofline import kv_bytes
from bench.seats import Seating, Seats, attention_items, make_engine
from bench.shapes import SHAPES
from bench.timing import captured, timed
from icon2_rt import ops
from icon2_rt.engine import Engine
from icon2_rt.engine.step import StepInputs, decode_step
from icon2_rt.ops import AttentionItems, Ops

PREFIXES = (64, 256, 1024, 4096, 8192)
BRANCHES = (2, 4, 8, 16, 64)
PAGE_SIZE, SPLIT_PAGES = 32, 4
GENERATED = 24  # positions of the response that each branch has written when attention alone is measured
STEPS = 30  # the most that one layout of a step holds for
ROTATE_BYTES, MOST_SETS = 256 * 2**20, 192  # KV that attention alone goes through in turn: more than a cache holds
MOST_CALLS = 64  # of a turn
LEAST_ROUNDS = 8  # fewer say nothing with a confidence of 99 %


@dataclass(frozen=True)
class Sides:
    """A turn's unit of each side; ``calls``: how many calls it is (a graph on a GPU has several)."""

    shared: Callable[[], Any]
    unshared: Callable[[], Any]
    calls: int = 1


@dataclass(frozen=True)
class Cell:
    """What is measured: ``what`` is "attention" (the op alone, at one block) or "step" (a whole decode step)."""

    what: str
    model: str
    backend: str
    prefix: int
    branches: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench crossover", description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=["attention", "step"], nargs="+", default=["attention", "step"])
    parser.add_argument("--model", choices=list(SHAPES), nargs="+", help="default: random100m and random100m-mha on a "
                        "CPU, llama3-8b and llama2-7b on a GPU (a step of the first alone)")  # fmt: skip
    parser.add_argument("--backend", nargs="+", help="default: native and reference on a CPU, triton on a GPU")
    parser.add_argument("--prefix", type=int, nargs="+", default=list(PREFIXES))
    parser.add_argument("--branches", type=int, nargs="+", default=list(BRANCHES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=25, help="the most turns of each side")
    parser.add_argument("--seconds", type=float, default=4.0,
                        help="begin no further round of a cell after so many, or six times that before 8 rounds are "
                        "done")  # fmt: skip
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no further cell after so many seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a folder or a file; default: bench/results/")
    parser.add_argument("--dry", action="store_true", help="a tiny decoder on the CPU, to see that everything runs")
    options = parser.parse_args(argv)
    if options.dry and options.out is None:
        parser.error("--dry measures nothing that is worth keeping among the results: give it --out FOLDER")
    torch.set_num_threads(options.threads)
    deadline = time.monotonic() + options.limit
    device = torch.device("cpu" if options.dry else options.device)
    record: dict[str, Any] = {
        "benchmark": "crossover",
        "settings": {
            "page_size": PAGE_SIZE,
            "split": PAGE_SIZE * SPLIT_PAGES,
            "generated": GENERATED,
            "rounds": options.rounds,
            "threads": options.threads,
            "clock": "events" if device.type == "cuda" else "CPU time" if options.threads == 1 else "wall",
            "seconds": options.seconds,
            "dtype": str(_dtype(device))[6:],
            "dry": options.dry,
            "native": ops.native.describe(),
        },
        "environment": environment(device),
        "figures": [],
    }
    rounds, seconds = (3, 0.0) if options.dry else (options.rounds, options.seconds)
    for cell, sides in _measurements(options, device, deadline):
        spec = SHAPES[cell.model]
        figure = {**vars(cell), "kv_mib": memory(cell), "load": load()[0]}
        figure |= {"heads": spec.n_heads, "kv_heads": spec.n_kv_heads, "blocks": spec.n_layers}
        if isinstance(sides, str):
            figure["status"] = sides
        else:
            figure |= {"status": "measured", **compared(sides, device, rounds, seconds)}
        record["figures"].append(figure)
        print(line(figure), file=sys.stderr)
        write("crossover", record, options.out)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _measurements(options: argparse.Namespace, device: torch.device, deadline: float) -> Any:
    """(cell, its two sides or why there are none), what is worth most first."""
    on_gpu = device.type == "cuda"
    models = options.model or (["llama3-8b", "llama2-7b"] if on_gpu else ["random100m", "random100m-mha"])
    prefixes, branches = options.prefix, options.branches
    if options.dry:
        models, prefixes, branches = ["dry"], [64, 256], [2, 4]
    names = options.backend or (["triton"] if on_gpu else ["native", "reference"])
    names = [name for name in names if ops.available(device)[name] is None]
    late = "not reached: out of time"
    for what in options.what:
        for name in names:
            for model in models[:1] if what == "step" and on_gpu and not options.model else models:
                cells = [Cell(what, model, name, p, k) for p in prefixes for k in branches]
                if time.monotonic() > deadline:
                    yield from ((cell, late) for cell in cells)
                elif what == "attention":
                    for cell in cells:
                        yield cell, late if time.monotonic() > deadline else attention_sides(cell, device)
                else:
                    yield from _steps(cells, device, deadline, late)


def _steps(cells: list[Cell], device: torch.device, deadline: float, late: str) -> Any:
    """Whole steps: one engine for all cells, of which each seats its group."""
    first, spec = cells[0], SHAPES[cells[0].model]
    most = max(cell.branches for cell in cells)
    own = -(-(STEPS + 2) // PAGE_SIZE) + 1
    pages = max(-(-cell.prefix // PAGE_SIZE) + cell.branches * own for cell in cells) + 1
    memory = pages * PAGE_SIZE * kv_bytes(spec, _dtype(device).itemsize)
    engine = make_engine(first.model, device, max_rows=most, backend=first.backend, kv_memory=memory, exact=True)
    seats = Seats(engine)
    for cell in cells:
        if time.monotonic() > deadline:
            yield cell, late
            continue
        seating = Seating(cell.model, 1, cell.branches, cell.prefix + 1)
        why = seats.missing(seating, STEPS + 2)
        if why is not None:
            yield cell, why
            continue
        try:
            batch = seats.take(seating, STEPS + 2)
            batch._lay_out()
            assert batch._inputs is not None
            yield cell, step_sides(engine, batch._inputs)
        finally:
            seats.leave()


def attention_sides(cell: Cell, device: torch.device) -> Sides:
    """The op at one block, going through so many sets of KV that a turn reads them from memory."""
    spec, dtype = SHAPES[cell.model], _dtype(device)
    items, n_pages, _ = attention_items(
        spec, 1, cell.branches, cell.prefix + 1, GENERATED, PAGE_SIZE, SPLIT_PAGES, device
    )
    if device.type == "cpu":  # as a layout on a CPU is: no wider than its widest item, and all of it counts
        width = int((items.rows >= 0).sum(dim=1).max())
        items = replace(items, rows=items.rows[:, :width].contiguous(), dense=True)
    op: Ops = ops.select(cell.backend, device)  # type: ignore[arg-type]
    generator = torch.Generator(device).manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)

    shape = (n_pages, PAGE_SIZE, spec.n_kv_heads, spec.head_dim)
    sets = min(MOST_SETS, max(1, ROTATE_BYTES // (2 * math.prod(shape) * dtype.itemsize)))
    kv = [(rand(*shape), rand(*shape)) for _ in range(sets)]
    q = rand(cell.branches, spec.n_heads, spec.head_dim)

    def side(items: AttentionItems) -> Callable[[], Tensor]:
        turn = 0

        def call() -> Tensor:
            nonlocal turn
            turn += 1
            k, v = kv[turn % sets]
            return op.grouped_decode_attention(q, k, v, items, spec.head_dim**-0.5, 0)

        if device.type != "cuda":
            return call
        return captured(lambda: [call() for _ in range(sets)])

    return Sides(side(items), side(apart(items)), sets if device.type == "cuda" else 1)


def step_sides(engine: Engine, inputs: StepInputs) -> Sides:
    """A whole step with the items that the engine laid out, and with those items taken apart. Each call of a side
    begins at the same position."""
    sides = []
    state = list(vars(inputs.state).values())
    begin = [tensor.clone() for tensor in state]
    for items in (inputs.items, apart(inputs.items)):
        step = partial(decode_step, engine.model, engine.kv, replace(inputs, items=items))
        if engine.model.device.type == "cuda":
            repeat: Callable[[], Any] | None = captured(step)
        else:
            repeat = engine.model.ops.capture(step) if engine.model.ops.capture is not None else None
        again = repeat or step

        def call(again: Callable[[], Any] = again) -> None:
            for tensor, value in zip(state, begin, strict=True):
                tensor.copy_(value)
            again()

        sides.append(call)
    return Sides(*sides)


def apart(items: AttentionItems) -> AttentionItems:
    """The same KV ranges, each item one row's: every row reads by itself. The items of a range stay neighbours."""
    n = int(items.count)
    item, place = (items.rows[:n] >= 0).nonzero(as_tuple=True)
    rows = torch.full((len(item), 1 if items.dense else items.rows.shape[1]), -1).to(items.rows)
    rows[:, 0] = items.rows[item, place]
    return replace(
        items,
        rows=rows,
        pages=items.pages[item],
        splits=items.splits[item],
        layers=items.layers[item],
        count=torch.full_like(items.count, len(item)),
        lengths=items.lengths[item],
        n_splits=items.n_splits.clone(),
    )


def compared(sides: Sides, device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a call of each side, and the ratio of neighbouring turns: unshared over shared."""
    # Of one thread the processor's time is counted: what else the machine does costs less of it than of the clock's.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode():
        both = (sides.shared, sides.unshared)
        once = [sum(timed(side, device, n=1, warm_up=2)) for side in both]
        n = max(1, min(MOST_CALLS, round(5.0 / max(once[0], 1e-3))))  # a turn takes 5 ms or one unit
        times: list[list[float]] = [[], []]
        end = time.monotonic() + seconds
        for turn in range(rounds):
            late = time.monotonic() - end
            if late > 0 and (turn >= LEAST_ROUNDS or (turn >= 3 and late > 5 * seconds)):
                break
            for which in (0, 1) if turn % 2 else (1, 0):
                times[which].append(median(timed(both[which], device, n, warm_up=min(1, n - 1), clock=clock)))
    ratios = sorted(alone / shared for shared, alone in zip(*times, strict=True))
    low, high = interval(ratios)
    return {
        "milliseconds": {"shared": median(times[0]) / sides.calls, "unshared": median(times[1]) / sides.calls},
        "ratio": {"median": median(ratios), "low": low, "high": high, "min": ratios[0], "max": ratios[-1]},
        "rounds": len(ratios),
        "calls": n * sides.calls,
        "verdict": "faster" if low > 1 else "slower" if high < 1 else "no difference",
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with a confidence of 99 %, whatever the distribution: between two of the sorted ``values``.
    With fewer than eight of them no two are that sure, and it is the first and the last."""
    n = len(values)
    below, k = 0.0, 0
    while k < n // 2:  # below: the chance that no more than k of n values lie under the median
        below += math.comb(n, k) / 2**n
        if below > 0.005:
            break
        k += 1
    k = max(0, k - 1)
    return values[k], values[n - 1 - k]


def memory(cell: Cell) -> dict[str, float]:
    """MiB of KV of all blocks for the prompt and what was generated: one copy of the prompt, and one a branch."""
    spec = SHAPES[cell.model]
    itemsize = 4 if cell.backend != "triton" else 2
    page = PAGE_SIZE * kv_bytes(spec, itemsize) / 2**20
    common = cell.prefix // PAGE_SIZE
    own = -(-(cell.prefix + 1 + GENERATED) // PAGE_SIZE) - common
    return {"shared": page * (common + cell.branches * own), "unshared": page * cell.branches * (common + own)}


def line(figure: dict[str, Any]) -> str:
    cell = f"{figure['what']} {figure['model']} {figure['backend']} {figure['prefix']:5} × {figure['branches']:2}"
    if figure["status"] != "measured":
        return f"{cell}: {figure['status']}"
    r, ms = figure["ratio"], figure["milliseconds"]
    return (
        f"{cell}: {ms['shared']:.3f} ms shared, {ms['unshared']:.3f} apart, {r['median']:.3f}× "
        f"({r['low']:.3f}–{r['high']:.3f}), {figure['verdict']}, {figure['rounds']} rounds, load {figure['load']}"
    )


if __name__ == "__main__":
    main()
