"""A decode step as CUDA graphs, one per bucket of rows: in steady state a step is one replay."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch


def buckets(seats: int) -> list[int]:
    """The numbers of rows for which a graph is captured, ascending: a step runs the next larger one."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max(seats, 256) + 64, 64)]
    return [*(n for n in steps if n < seats), seats]


class StepGraphs:
    """The captured steps. Captured when made, while no seat is taken: a step of empty seats writes nothing.

    Largest first, so that the smaller ones find the memory pool large enough. A bucket that does not fit the memory
    that is left is given up with a warning: fewer rows then run at once. Replays run on ``device``, whichever is
    current.
    """

    def __init__(self, step: Callable[[int], None], sizes: Sequence[int], device: torch.device):
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        with torch.cuda.device(device):
            self._capture(step, sizes)

    def _capture(self, step: Callable[[int], None], sizes: Sequence[int]) -> None:
        # A stream of our own: the one that torch would take is of the device that captured first in this process.
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        for rows in sorted(sizes, reverse=True):
            graph = torch.cuda.CUDAGraph()
            try:
                # Once outside: compilers, libraries and their workspaces come into being before the capture.
                step(rows)
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    step(rows)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                warnings.warn(
                    f"no memory is left for a CUDA graph of {rows} rows: fewer run at once. A smaller kv_memory= or "
                    f"max_rows= leaves more",
                    stacklevel=3,
                )
                torch.cuda.empty_cache()
                continue
            self._graphs[rows] = graph

    @property
    def largest(self) -> int:
        """Rows of the largest graph; 0 where none fitted."""
        return max(self._graphs, default=0)

    def replay(self, rows: int) -> bool:
        """Run the step of ``rows`` rows; False where there is no such graph."""
        graph = self._graphs.get(rows)
        if graph is not None:
            graph.replay()
        return graph is not None


def _out_of_memory(error: BaseException | None) -> bool:
    """Is it that, or was it while that was handled? A capture that ends early has an error of its own to report."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None
