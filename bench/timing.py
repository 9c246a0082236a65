"""How long something takes: by events on a GPU, by the clock on a CPU; and the copy that every GB/s is read beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from icon2_rt.trial.timing import timed

COPY_BYTES = 2**30  # read, and as many written: far more than any cache holds


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, least and most of ``n`` calls."""

    median: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        return cls(median(milliseconds), min(milliseconds), max(milliseconds), len(milliseconds))

    def record(self) -> dict[str, float]:
        return asdict(self)


def device_copy(device: torch.device, n_bytes: int = COPY_BYTES) -> dict[str, Any]:
    """The bandwidth of a copy within the device, GB/s (10⁹ bytes), read plus written."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = Timing.of(timed(lambda: target.copy_(source), device, n=10))
    return {
        "gb_per_second": 2 * n_bytes / timing.median / 1e6,
        "bytes": 2 * n_bytes,
        "milliseconds": timing.record(),
    }


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` as a CUDA graph: what it launches, without the host's part. It has run once before it is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
