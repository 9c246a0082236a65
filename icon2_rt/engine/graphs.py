"""A decode step as CUDA graphs, one per bucket of rows: in steady state a step is one replay."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from icon2_rt.ops.native_cuda import one_graph

# Graphs whose capture failed, for the life of the process: torch's allocator of pinned memory goes on asking them
# whether they are being captured, and nothing reachable from Python makes it stop.
_failed: list[torch.cuda.CUDAGraph] = []


def buckets(seats: int) -> list[int]:
    """The numbers of rows for which a graph is captured, ascending: a step runs the next larger one."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max(seats, 256) + 64, 64)]
    return [*(n for n in steps if n < seats), seats]


class StepGraphs:
    """The captured steps of one batch, each for a number of rows out of ``sizes``.

    The largest is captured when this is made, while no seat is taken: the step that runs once before it, in which
    compilers, libraries and their workspaces come into being, writes nothing then. Any other is captured when it is
    first needed: the step of that moment runs without a graph, which is all the warming up that its kernels need, and
    is captured afterwards; a capture runs nothing. So a call pays for the sizes that it runs, and which size a step
    runs depends on its rows alone, never on what was captured before: the same call gives the same bytes.

    All graphs share one memory pool. The largest comes first, so the others find room in it and memory does not grow
    with their number. Caches are emptied only after a capture that found no memory. A size that does not fit even
    then is given up with a warning, and its rows run in the next larger graph; if it was the largest, fewer rows run
    at once.

    The stream of the captures belongs to this object. cuBLAS has a workspace for every stream, and newer versions of
    torch free that of a graph's stream when the graph dies: two families of graphs that shared a stream, or one graph
    that died alone, would leave the others with an address that is no longer theirs. So graphs die together, and only
    then are the workspaces cleared, which older versions (2.11) would keep for good.

    A capture that fails for anything but memory (another thread's call, a library that cannot be captured) ends the
    use of graphs: all are dropped with one warning, and steps run without. A fault of the device is an error.

    Args:
        step: runs the step of so many rows; not kept. device: replays run there, whichever is current.
    """

    def __init__(self, step: Callable[[int], None], sizes: Sequence[int], device: torch.device):
        self._device, self._sizes = device, sorted(sizes)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._spoilt: list[torch.cuda.CUDAGraph] = []  # captured in part: useless, but graphs die together
        self._without: set[int] = set()  # sizes that were given up
        self.given_up: list[str] = []  # what the warnings said
        with torch.cuda.device(device):
            # A stream of our own: the one that torch would take is of the device that captured first in this process.
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
            _clear_cublas_workspaces()  # one that this stream already has would lie outside the pool
            for rows in reversed(self._sizes):
                try:
                    step(rows)
                except torch.OutOfMemoryError:
                    self._give_up(rows)
                    continue
                if self._capture(rows, step) or not self._sizes:
                    break

    def __del__(self) -> None:
        if self._graphs or self._spoilt:
            self._graphs.clear()
            self._spoilt.clear()
            with suppress(Exception):  # the interpreter may be going down
                _clear_cublas_workspaces()

    @property
    def largest(self) -> int:
        """Rows of the largest graph; 0 where there is none."""
        return max(self._graphs, default=0)

    def has(self, rows: int) -> bool:
        """Whether there is a graph of just so many rows."""
        return rows in self._graphs

    def run(self, rows: int, step: Callable[[int], None]) -> int:
        """Run the step of ``rows`` rows, one of the sizes, by a graph wherever there can be one.

        Returns how many rows the replayed graph has, 0 where the step ran without one.
        """
        if rows not in self._graphs and rows in self._sizes and rows not in self._without:
            try:
                step(rows)
            except torch.OutOfMemoryError:
                # Nothing has happened yet: the kernel that advances the rows is the last one, and needs no memory.
                self._give_up(rows)
                if not any(size > rows for size in self._graphs):
                    raise
            else:
                with torch.cuda.device(self._device):
                    self._capture(rows, step)
                return 0
        size = min((size for size in self._graphs if size >= rows), default=None)
        if size is None:
            step(rows)
            return 0
        self._graphs[size].replay()
        return size

    def _capture(self, rows: int, step: Callable[[int], None]) -> bool:
        """Capture the step of ``rows`` rows, which has run before; whether there is a graph of it now."""
        for last in (False, True):
            graph = torch.cuda.CUDAGraph()
            try:
                # Memory that another thread asks for meanwhile is none of this capture's business: thread_local. What
                # Python's collector would let go of meanwhile is: a dying graph or stream calls the device.
                with torch.cuda.stream(self._stream), one_graph(), _without_collector():
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    try:
                        step(rows)
                    finally:
                        graph.capture_end()
            except BaseException as error:
                self._forget(graph)
                if not isinstance(error, RuntimeError):
                    raise
                torch.cuda.synchronize()  # raises where the device itself is at fault
                if not _out_of_memory(error):
                    self._stop(error)
                    return False
                torch.cuda.empty_cache()
                if last:
                    self._give_up(rows)
            else:
                self._graphs[rows] = graph
                return True
        return False

    def _forget(self, graph: torch.cuda.CUDAGraph) -> None:
        """After a failed capture, make torch's allocator stop believing that it is under way: it would send no memory
        back to the device, and ask a graph that may be gone by then."""
        with suppress(RuntimeError):
            graph.pool()
            self._spoilt.append(graph)
            return  # the capture came to its end, however it went: torch has done all of this
        _failed.append(graph)
        with suppress(RuntimeError):  # it never began
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)

    def _give_up(self, rows: int) -> None:
        self._without.add(rows)
        instead = "they run in a larger one" if self._graphs else "fewer run at once"
        self._warn(
            f"no memory is left for a CUDA graph of {rows} rows: {instead}. A smaller kv_memory= or max_rows= leaves "
            f"more"
        )

    def _stop(self, error: RuntimeError) -> None:
        self._graphs.clear()
        self._spoilt.clear()
        self._sizes.clear()
        _clear_cublas_workspaces()
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        self._warn(
            f"a decode step could not be captured as a CUDA graph ({first}): steps run without graphs, slower and with "
            f"the same results. cuda_graphs=False does so from the start, without this warning"
        )

    def _warn(self, text: str) -> None:
        self.given_up.append(text)
        warnings.warn(text, stacklevel=5)


@contextmanager
def _without_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _clear_cublas_workspaces() -> None:
    """Of all streams: each is made anew when it is needed next."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # a build without CUDA has none
    if clear is not None:
        clear()


def _out_of_memory(error: BaseException | None) -> bool:
    """Is it that, or was it while that was handled? A capture that ends early has an error of its own to report."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None
