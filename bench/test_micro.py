"""Micro benchmarks of every op: ``pytest bench --benchmark-only``; figures go to bench/results/micro-DEVICE.json, or to
the folder that the environment variable BENCH_OUT names.

On a GPU an op is captured in a CUDA graph, several calls long, and timed by events. Elsewhere a call is timed by the
clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import micro
from bench.check import compare
from bench.environment import environment, write
from bench.timing import Timing, captured, timed
from icon2_rt.ops import Ops

Figures = list[dict[str, Any]]
# Calls in a graph: enough that a launch of the graph is little beside them, and that all sets of arguments have a turn.
CALLS = 2 * micro.MOST_SETS
ON_GPU = micro.HERE.device.type == "cuda"


class EventTimer:
    """Seconds as the GPU counts them. Each reading waits for the device; the difference of two is what ran between."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds


TIMED = [pytest.mark.benchmark(timer=EventTimer())] if ON_GPU else []
pytestmark = TIMED


@pytest.fixture(scope="module")
def figures() -> Iterator[Figures]:
    """What the tests below measured; written at the end, if anything was."""
    found: Figures = []
    yield found
    if found:
        store(found)


def store(found: Figures) -> None:
    here = micro.HERE
    settings = {"dtype": str(here.dtype)[6:], "backend": here.ops.backend, "rotated_bytes": micro.ROTATE_BYTES}
    record = {"benchmark": "micro", "settings": settings, "environment": environment(here.device), "figures": found}
    out = os.environ.get("BENCH_OUT")
    write("micro", record, Path(out) if out else None)


def measure(benchmark: Any, case: micro.Case, figures: Figures) -> None:
    calls = case.calls()
    n_calls = 1
    with torch.inference_mode():
        if ON_GPU:
            n_calls = CALLS
            benchmark(captured(lambda: run(calls, n_calls)))
        else:
            benchmark(calls)
        beside = beside_reference(case)
    if benchmark.stats is None:  # benchmarks are off: the op ran once, and that is all
        return
    stats = benchmark.stats.stats
    micros = {name: getattr(stats, name) * 1e6 / n_calls for name in ("median", "min", "iqr")}
    speed = case.n_bytes / micros["median"] / 1e3
    benchmark.extra_info["GB/s"] = round(speed, 2)
    figures.append(
        {
            "op": case.name,
            "model": case.model,
            "rows": case.rows,
            "bytes": case.n_bytes,
            "microseconds": {**micros, "rounds": stats.rounds},
            "gb_per_second": speed,
            **beside,
        }
    )
    if ON_GPU:  # a run that is cut off keeps what it has
        store(figures)


def run(call: Callable[[], Any], n: int) -> None:
    for _ in range(n):
        call()


def beside_reference(case: micro.Case) -> dict[str, Any]:
    """Where the op is not the reference itself: how far off it is, and the reference's time on the same device."""
    reference = getattr(Ops("reference"), case.op, case.function)
    if reference is case.function:
        return {}
    turn = cycle(case.arguments)
    took = Timing.of(timed(lambda: reference(*next(turn)), micro.HERE.device, n=5, warm_up=2))
    return {**compare(case.function, reference, case.arguments[0]), "reference_microseconds": 1e3 * took.median}


def test_device_copy(benchmark: Any, figures: Figures) -> None:
    measure(benchmark, micro.copy(micro.HERE), figures)


def test_device_read(benchmark: Any, figures: Figures) -> None:
    measure(benchmark, micro.read(micro.HERE), figures)


@pytest.mark.parametrize(("pairs", "prompt"), micro.HERE.attention)
@pytest.mark.parametrize("model", micro.HERE.models)
def test_attention(benchmark: Any, figures: Figures, model: str, pairs: int, prompt: int) -> None:
    measure(benchmark, micro.attention(micro.HERE, model, pairs, prompt), figures)


@pytest.mark.parametrize("rows", micro.HERE.rows)
@pytest.mark.parametrize("name", micro.CASES)
@pytest.mark.parametrize("model", micro.HERE.models)
def test_op(benchmark: Any, figures: Figures, model: str, name: str, rows: int) -> None:
    if rows > 1024 and name not in micro.PREFILL_OPS:
        pytest.skip("a decode step has no so many rows")
    if rows > micro.MOST_ROWS.get(name, rows):
        pytest.skip("above so many rows it is torch's product")
    measure(benchmark, micro.CASES[name](micro.Subject(micro.HERE, model, rows)), figures)
