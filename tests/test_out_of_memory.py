"""A device that runs out of memory costs speed and a warning, not the run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from icon2_rt import Direction, Runtime
from icon2_rt.engine import Engine, EngineOptions, prefill
from icon2_rt.engine.graphs import StepGraphs, buckets
from icon2_rt.ops import Ops
from tests.models import random_prompts, random_vectors, tiny_llama

A = Direction("a", random_vectors(4, 48, seed=0))
PROMPTS = random_prompts([70, 3, 33, 9, 50], seed=1)


def runtime() -> Runtime:
    return Runtime(tiny_llama(), device="cpu", page_size=8, split_pages=2, prefill_chunk=64)


def of_at_most(tokens: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Let a prefill pass of more tokens than that fail half way; returns the sizes that were tried."""
    run, tried = prefill._run_pack, []

    def limited(model: Any, kv: Any, bank: Any, jobs: Any, pieces: Any, *rest: Any) -> Any:
        tried.append(sum(end - start for _, start, end in pieces))
        if tried[-1] > tokens:
            run(model, kv, bank, jobs, pieces, rest[0], rest[1], False)  # pages are written, states are shown
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(model, kv, bank, jobs, pieces, *rest)

    patch.setattr(prefill, "_run_pack", limited)
    return tried


CALLS = {
    "generate": lambda rt: [
        [b.token_ids for b in o.branches]
        for o in rt.generate_branches(
            PROMPTS, [None, (2.0 * A[1:]).with_scope("all")], do_sample=False, max_new_tokens=6
        )
    ],
    "hidden_states": lambda rt: rt.hidden_states(PROMPTS),
    "score": lambda rt: [s.logprobs for s in rt.score(PROMPTS, [[1, 2, 3, 4] * 9] * 5)],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_prefill_pass_that_does_not_fit_is_repeated_in_smaller_ones(name, monkeypatch):
    expected = CALLS[name](runtime())
    tried = of_at_most(20, monkeypatch)
    with pytest.warns(UserWarning, match="passes of 16 are tried.*prefill_chunk="):
        got = CALLS[name](runtime())
    assert max(tried) > 32
    assert tried[-1] <= 16
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    elif name == "score":
        for one, two in zip(got, expected, strict=True):
            assert one == pytest.approx(two, abs=1e-4)
    else:
        assert got == expected


@pytest.mark.filterwarnings("ignore:no memory for a prefill pass")
def test_what_fits_in_no_pass_is_an_error_that_gives_every_page_back(monkeypatch):
    rt = runtime()
    pages = rt.free_kv_pages
    of_at_most(4, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        rt.generate(PROMPTS, do_sample=False, max_new_tokens=4)
    assert rt.free_kv_pages == pages


class FakeGraph:
    """What torch.cuda.CUDAGraph is to StepGraphs."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


def captured(monkeypatch: pytest.MonkeyPatch, seats: int, fits: int) -> tuple[StepGraphs, list[int]]:
    calls: list[int] = []

    def step(rows: int) -> None:
        calls.append(rows)
        if rows > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for name, double in {
        "CUDAGraph": FakeGraph,
        "graph": lambda graph, pool, stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "Stream": lambda: "a stream",
        "graph_pool_handle": lambda: (0, 1),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, double)
    return StepGraphs(step, buckets(seats), torch.device("cuda")), calls


def test_graphs_are_captured_largest_first_and_replayed_by_bucket(monkeypatch):
    graphs, calls = captured(monkeypatch, seats=24, fits=24)
    assert calls == [n for n in reversed(buckets(24)) for _ in range(2)]  # once to warm up, once captured
    assert graphs.largest == 24
    assert graphs.replay(8)
    assert not graphs.replay(3)
    assert [g.replays for n, g in sorted(graphs._graphs.items()) if n == 8] == [1]


def test_a_bucket_that_does_not_fit_is_given_up_with_a_warning(monkeypatch):
    with pytest.warns(UserWarning, match="no memory is left for a CUDA graph of 24 rows"):
        graphs, _ = captured(monkeypatch, seats=24, fits=16)
    assert graphs.largest == 16
    assert not graphs.replay(24)
    with pytest.warns(UserWarning, match="of 1 rows"):
        nothing, _ = captured(monkeypatch, seats=4, fits=0)
    assert nothing.largest == 0


def test_memory_that_runs_out_during_the_capture_is_known_behind_the_capture_s_own_error(monkeypatch):
    class Capture:
        def __enter__(self) -> None:
            pass

        def __exit__(self, kind: type | None, *rest: object) -> None:
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    calls: list[int] = []

    def step(rows: int) -> None:
        calls.append(rows)
        if rows == 4 and calls.count(4) == 2:  # the warm-up fitted
            raise torch.OutOfMemoryError("CUDA out of memory")
        if rows == 1 and calls.count(1) == 2:
            raise RuntimeError("an illegal memory access")

    captured(monkeypatch, seats=1, fits=1)  # the doubles
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: Capture())
    with pytest.warns(UserWarning, match="of 4 rows"):
        assert StepGraphs(step, [2, 4], torch.device("cuda")).largest == 2
    with pytest.raises(RuntimeError, match="previous error"):
        StepGraphs(step, [1], torch.device("cuda"))


def test_a_model_with_more_heads_than_the_kernels_tile_is_refused_before_it_runs():
    rt = Runtime(tiny_llama(num_attention_heads=24, num_key_value_heads=1, head_dim=8), device="cpu")
    model = replace(rt._engine.model, ops=Ops("triton", fixed=True))
    with pytest.raises(ValueError, match=r"24 query heads for each KV head.*backend='reference'"):
        Engine(model, EngineOptions())
