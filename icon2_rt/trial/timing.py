"""Repeating calls on a device without the host's part in it: CUDA graphs where there are any, else plain calls."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from icon2_rt.engine.graphs import StepGraphs
from icon2_rt.trial.check import tensors


def captured(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
    """``call`` as a CUDA graph, and what it returned while it was captured, which every replay writes anew. It runs
    once before. On a CPU: a function that calls it and copies its results there.

    Raises:
        RuntimeError: it cannot be captured. The current stream is what it was.
    """
    if device.type != "cuda":
        return _repeated(call)
    results: list[Any] = []

    def step(rows: int) -> None:
        results[:] = [call()]

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        graphs = StepGraphs(step, [1], device)  # the engine's own, which knows what to do when a capture fails
    if not graphs.largest:
        raise RuntimeError(str(said[-1].message) if said else "it cannot be captured as a CUDA graph")
    return partial(graphs.run, 1, step), results[0]


def _repeated(call: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    result = call()

    def replay() -> None:
        for (_, kept), (_, now) in zip(tensors(result), tensors(call()), strict=True):
            if kept.data_ptr() != now.data_ptr():
                kept.copy_(now)

    return replay, result


def timed(
    call: Callable[[], Any],
    device: torch.device,
    n: int,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Milliseconds of each of ``n`` calls, after ``warm_up`` others.

    On a CPU they are read from ``clock``: with one thread on a machine that does other things, time.process_time counts
    only what the calls themselves took.

    On a GPU all calls are enqueued one after the other with an event between each two and are looked at when the last
    is done: what is measured is the device's time from the end of one call to the end of the next, with nothing of the
    host's as long as it is ahead.
    """
    for _ in range(warm_up):
        call()
    if device.type != "cuda":
        marks = [clock()]
        for _ in range(n):
            call()
            marks.append(clock())
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def microseconds(call: Callable[[], Any], device: torch.device, n: int, warm_up: int = 2) -> float:
    """The median time of ``call``."""
    return 1e3 * median(timed(call, device, n, warm_up))
