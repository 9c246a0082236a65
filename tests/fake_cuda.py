"""A double of what the engine uses of torch.cuda: streams, events, captures, and the caching allocator's idea of them.
Everything that happens is in ``log``, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

POOL = (0, 1)


class Stream:
    def __init__(self, cuda: FakeCuda, name: str, device: torch.device | None = None):
        self.cuda, self.name, self.device = cuda, name, device

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class Graph:
    """Captures as torch does it: an error in ``capture_begin`` or ``capture_end`` leaves the allocator in a capture."""

    def __init__(self, cuda: FakeCuda):
        self.cuda, self.ended, self.replays, self.stream = cuda, False, 0, cuda.current[-1]

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        cuda = self.cuda
        cuda.under_way.append(pool)
        cuda.uses[pool] += 1
        cuda.modes.append(capture_error_mode)
        cuda.fail("begin")
        cuda.capturing, self.stream = self, cuda.current[-1]

    def capture_end(self) -> None:
        cuda = self.cuda
        assert cuda.capturing is self and self.stream is cuda.current[-1]
        cuda.capturing = None
        cuda.fail("end")
        cuda.under_way.remove(POOL)
        self.ended = True

    def pool(self) -> tuple[int, int]:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return POOL

    def replay(self) -> None:
        self.replays += 1
        self.cuda.log.append("replay")


class FakeCuda:
    """Attributes: ``under_way``, pools that the allocator believes to be captured into; ``uses`` of every pool;
    ``current`` streams, the innermost last; ``failures``, what raises next, by "begin", "end" or "synchronize"."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.under_way: list[tuple[int, int]] = []
        self.uses: Counter[tuple[int, int]] = Counter()
        self.modes: list[str] = []
        self.capturing: Graph | None = None
        self.failures: dict[str, Exception] = {}
        self.current = [Stream(self, "the caller's stream")]
        self.streams: list[Stream] = []
        self.graphs: list[Graph] = []

    def fail(self, where: str) -> None:
        error = self.failures.pop(where, None)
        if error is not None:
            raise error

    def make_stream(self, device: torch.device | None = None) -> Stream:
        self.streams.append(Stream(self, f"stream {len(self.streams)}", device))
        return self.streams[-1]

    def make_graph(self) -> Graph:
        self.graphs.append(Graph(self))
        return self.graphs[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    def synchronize(self, device: torch.device | None = None) -> None:
        self.log.append("synchronize")
        self.fail("synchronize")

    def end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.under_way:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.under_way.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        assert self.uses[pool] > 0
        self.uses[pool] -= 1

    def step(self, do: Callable[[int], None] = lambda rows: None) -> Callable[[int], None]:
        """A decode step that says in the log how it ran."""

        def step(rows: int) -> None:
            self.log.append(f"{'captured' if self.capturing else 'run'} {rows}")
            do(rows)

        return step

    def install(self, patch: pytest.MonkeyPatch) -> FakeCuda:
        doubles: dict[str, Any] = {
            "CUDAGraph": self.make_graph,
            "Stream": self.make_stream,
            "stream": self.stream,
            "device": self.device,
            "current_stream": lambda device=None: self.current[-1],
            "current_device": lambda: 0,
            "graph_pool_handle": lambda: POOL,
            "synchronize": self.synchronize,
            "empty_cache": lambda: self.log.append("empty_cache"),
        }
        for name, double in doubles.items():
            patch.setattr(torch.cuda, name, double)
        allocator: dict[str, Any] = {
            "_cuda_endAllocateToPool": self.end_allocate,
            "_cuda_releasePool": self.release,
            "_cuda_clearCublasWorkspaces": lambda: self.log.append("clear workspaces"),
        }
        for name, double in allocator.items():
            patch.setattr(torch._C, name, double, raising=False)
        return self


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch)
