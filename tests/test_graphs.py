"""Captured steps: which are captured and when, and what is left after a capture that fails."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch

from icon2_rt.engine import graphs as engine_graphs
from icon2_rt.engine.graphs import StepGraphs, buckets
from tests.fake_cuda import POOL, FakeCuda, cuda

__all__ = ["cuda"]
DEVICE = torch.device("cuda")
OOM = torch.OutOfMemoryError


def failing(cuda: FakeCuda, error: BaseException, rows: int, times: int = 99, when: str = "captured"):
    """A step that fails at a size, in the capture or in the run before it."""
    left = [times]

    def do(at: int) -> None:
        if at == rows and left[0] and (when == "captured") == (cuda.capturing is not None):
            left[0] -= 1
            raise error

    return cuda.step(do)


def test_the_largest_is_captured_at_once_and_the_others_when_they_are_needed(cuda):
    graphs = StepGraphs(step := cuda.step(), buckets(24), DEVICE)
    assert cuda.log == ["clear workspaces", "run 24", "captured 24"]
    assert graphs.largest == 24
    cuda.log.clear()
    assert not graphs.has(8)
    assert [graphs.run(rows, step) for rows in (24, 8, 8, 8, 24)] == [24, 0, 8, 8, 24]
    assert graphs.has(8)
    # The first step of a size is the step itself; a capture runs nothing, and the caches stay as they are.
    assert cuda.log == ["replay", "run 8", "captured 8", "replay", "replay", "replay"]
    assert cuda.graphs[1].replays == 2
    assert set(cuda.modes) == {"thread_local"}


def test_all_captures_of_a_batch_are_in_a_stream_of_its_own(cuda):
    first, second = (StepGraphs(cuda.step(), [2, 4], DEVICE) for _ in range(2))
    first.run(2, cuda.step())
    mine, other = cuda.streams
    assert [g.stream for g in cuda.graphs] == [mine, other, mine]
    assert (first._stream, second._stream) == (mine, other)  # kept: another's captures must not get it
    assert mine.device == other.device == DEVICE


def test_graphs_die_together_and_the_workspaces_after_them(cuda):
    graphs = StepGraphs(cuda.step(), [2, 4], DEVICE)
    cuda.log.clear()
    del graphs
    assert cuda.log == ["clear workspaces"]


def test_nothing_of_a_batch_is_kept_by_its_graphs(cuda):
    """The memory of a batch that was dropped goes to the next one at once, not when Python looks for cycles."""

    class Batch:
        def __init__(self) -> None:
            self.graphs = StepGraphs(self.run, [2, 4], DEVICE)
            self.graphs.run(2, self.run)

        def run(self, rows: int) -> None:
            pass

    gc.disable()
    try:
        batch = Batch()
        gone = weakref.ref(batch)
        del batch
        assert gone() is None
    finally:
        gc.enable()


def test_a_largest_that_does_not_fit_is_given_up_with_a_warning(cuda):
    with pytest.warns(UserWarning, match="no memory is left for a CUDA graph of 24 rows: fewer run at once"):
        graphs = StepGraphs(step := failing(cuda, OOM("no memory"), 24), buckets(24), DEVICE)
    # Once more after the caches were emptied, and then the next size.
    assert [e for e in cuda.log if e in ("captured 24", "empty_cache", "captured 16")] == [
        "captured 24",
        "empty_cache",
        "captured 24",
        "empty_cache",
        "captured 16",
    ]
    assert graphs.largest == 16
    cuda.log.clear()
    graphs.run(24, step)  # a larger group than any graph runs by itself
    assert cuda.log == ["run 24"]
    assert not cuda.under_way


def test_where_nothing_fits_steps_run_without_graphs(cuda):
    def full(rows: int) -> None:
        if not graphs:
            raise OOM("no memory")

    graphs: list[StepGraphs] = []
    with pytest.warns(UserWarning, match="of 1 rows"):
        graphs.append(StepGraphs(step := cuda.step(full), buckets(4), DEVICE))
    assert graphs[0].largest == 0
    graphs[0].run(2, step)
    assert cuda.log[-1] == "run 2"


@pytest.mark.parametrize("when", ["run", "captured"])
def test_rows_whose_graph_does_not_fit_run_in_the_next_larger_one(cuda, when):
    graphs = StepGraphs(step := failing(cuda, OOM("no memory"), 2, when=when), [2, 4, 8], DEVICE)
    graphs.run(4, step)
    cuda.log.clear()
    with pytest.warns(UserWarning, match="of 2 rows: they run in a larger one"):
        graphs.run(2, step)
    # A step that ran out of memory half way has advanced nothing, and is run in the larger graph; one that ran is not.
    assert cuda.log.count("replay") == (when == "run")
    assert len(graphs.given_up) == 1
    assert "of 2 rows: they run in a larger one" in graphs.given_up[0]
    for _ in range(3):
        assert graphs.run(2, step) == 4
    assert cuda.log.count("run 2") == 1
    assert [g.replays for g in cuda.graphs if g.ended][:2] == [0, 3 + (when == "run")]


def test_memory_that_comes_free_when_caches_are_emptied_is_enough(cuda):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert StepGraphs(failing(cuda, OOM("no memory"), 4, times=1), [2, 4], DEVICE).largest == 4


def test_memory_that_runs_out_in_a_capture_is_known_behind_the_capture_s_own_error(cuda):
    cuda.failures["end"] = RuntimeError("operation failed due to a previous error during capture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert StepGraphs(failing(cuda, OOM("no memory"), 4, times=1), [2, 4], DEVICE).largest == 4
    assert not cuda.under_way


@pytest.mark.parametrize("where", ["begin", "step", "end"])
@pytest.mark.parametrize("first", [True, False], ids=["largest", "later"])
def test_after_a_capture_that_fails_steps_run_without_graphs(cuda, where, first):
    size, error = 8 if first else 2, RuntimeError("operation not permitted when stream is capturing\nmore of it")
    step = failing(cuda, error, size) if where == "step" else cuda.step()
    if not first:
        graphs = StepGraphs(step, [2, 4, 8], DEVICE)
    if where != "step":
        cuda.failures[where] = error

    def fail() -> StepGraphs:
        if first:
            return StepGraphs(step, [2, 4, 8], DEVICE)
        graphs.run(2, step)
        return graphs

    with pytest.warns(UserWarning, match="could not be captured.*not permitted when stream is capturing\\)") as warned:
        graphs = fail()
    assert len(warned) == 1
    # As if there had been no capture: the caller's stream, and an allocator that sends memory back.
    assert [s.name for s in cuda.current] == ["the caller's stream"]
    assert not cuda.under_way
    assert cuda.uses[POOL] == sum(g.ended for g in cuda.graphs)
    assert graphs.largest == 0
    cuda.log.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (8, 2, 2):
            graphs.run(rows, step)
    assert cuda.log == ["run 8", "run 2", "run 2"]


def test_a_graph_whose_capture_failed_outlives_what_asks_for_it(cuda):
    """torch's allocator of pinned memory asks it at every allocation that follows."""
    cuda.failures["end"] = RuntimeError("invalidated")
    with pytest.warns(UserWarning, match="could not be captured"):
        graphs = StepGraphs(cuda.step(), [2], DEVICE)
    failed = cuda.graphs.pop()
    del graphs
    assert any(graph is failed for graph in engine_graphs._failed)


def test_a_fault_of_the_device_is_an_error(cuda):
    cuda.failures["synchronize"] = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        StepGraphs(failing(cuda, RuntimeError("unspecified launch failure"), 2), [2], DEVICE)
    assert not cuda.under_way


def test_a_step_that_cannot_run_is_an_error_too(cuda):
    with pytest.raises(RuntimeError, match="does not compile"):
        StepGraphs(failing(cuda, RuntimeError("does not compile"), 2, when="run"), [2], DEVICE)


def test_a_capture_that_is_interrupted_leaves_nothing_behind(cuda):
    with pytest.raises(KeyboardInterrupt):
        StepGraphs(failing(cuda, KeyboardInterrupt(), 2), [2], DEVICE)
    assert [s.name for s in cuda.current] == ["the caller's stream"]
    assert not cuda.under_way
    assert cuda.capturing is None


def test_python_collects_nothing_during_a_capture(cuda):
    found: list[tuple[bool, bool]] = []
    StepGraphs(lambda rows: found.append((cuda.capturing is not None, gc.isenabled())), [2], DEVICE)
    assert found == [(False, True), (True, False)]
    assert gc.isenabled()


def test_the_double_is_as_strict_as_torch():
    graph = FakeCuda().make_graph()
    graph.cuda.failures["begin"] = RuntimeError("busy")
    with pytest.raises(RuntimeError, match="busy"):
        graph.capture_begin(pool=POOL, capture_error_mode="global")
    assert graph.cuda.under_way == [POOL]
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.pool()
