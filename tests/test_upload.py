"""What goes up and comes down: through memory that is allocated once, in few copies, and never over a row that runs."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from bench import host
from icon2_rt import Direction, Runtime
from icon2_rt.engine import upload
from icon2_rt.engine.batch import Batch, Manner
from icon2_rt.engine.upload import Arena, Field, Landing, Staging
from tests.models import random_prompts, random_vectors, tiny_llama

CPU = torch.device("cpu")
A = Direction("a", random_vectors(4, 48, seed=0))


class Done:
    """A CUDA event that is done when it is waited for."""

    waited = 0

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True
        Done.waited += 1


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, torch.Tensor, torch.Tensor]]:
    """A device whose copies happen when their event is waited for: what overwrites staging memory early is found."""
    copies: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
    copy = torch.Tensor.copy_

    class Event(Done):
        def synchronize(self) -> None:
            super().synchronize()
            while copies and copies[0][0] is not None:
                event, target, source = copies.pop(0)
                copy(target, source)
                event.done = True
                if event is self:
                    break

    def later(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return copy(target, source)
        copies.append((None, target, source))
        return target

    def event(device: torch.device) -> Event:
        made = Event()
        copies[-1] = (made, *copies[-1][1:])
        return made

    monkeypatch.setattr(torch.Tensor, "copy_", later)
    monkeypatch.setattr(upload, "end_of_work", event)
    monkeypatch.setattr(Done, "waited", 0)
    return copies


@pytest.mark.parametrize("seed", range(5))
def test_staging_memory_is_written_again_only_after_its_copies(slow, seed):
    draw = Random(seed)
    staging, sent = Staging(CPU, 100), []
    for n in range(60):
        source = np.full(draw.choice([1, 7, 30, 60, 100, 250]), n + 1, dtype=np.uint8)
        target = torch.zeros(len(source), dtype=torch.uint8)
        staging.send([(source, target)])
        source[:] = 0  # the caller's own again
        sent.append((n + 1, target))
    assert slow
    while slow:
        slow[0][0].synchronize()
    assert all(bool((target == n).all()) for n, target in sent)


def test_staging_does_not_wait_while_there_is_room(slow):
    staging = Staging(CPU, 1000)
    for _ in range(10):
        staging.send([(np.ones(100, dtype=np.uint8), torch.zeros(100, dtype=torch.uint8))])
    assert Done.waited == 0
    staging.send([(np.ones(100, dtype=np.uint8), torch.zeros(100, dtype=torch.uint8))])
    assert Done.waited == 1


def test_an_upload_is_one_copy(slow):
    arrays = {"a": np.arange(5), "b": np.ones((3, 2), dtype=np.float32), "c": np.array([True, False])}
    got = Staging(CPU).upload(arrays)
    assert len(slow) == 1
    slow[0][0].synchronize()
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name].numpy(), array)
        assert got[name].storage_offset() * got[name].element_size() % upload.ALIGNMENT == 0


def test_an_arena_is_what_its_host_side_says():
    draw = Random(1)
    fields = {
        "a": Field((7,), np.int64, 3),
        "b": Field((50000, 4), np.int32, -1),
        "c": Field((9, 2), np.float32, 0.5),
        "d": Field((11,), np.bool_),
    }
    arena, staging = Arena(fields, CPU), Staging(CPU, 70000)
    addresses = {name: t.data_ptr() for name, t in arena.device.items()}
    sends: list[int] = []
    send = staging.send
    staging.send = lambda parts: (sends.append(len(parts)), send(parts))[1]  # type: ignore[method-assign]
    for _ in range(30):
        for name, array in arena.host.items():
            if draw.random() < 0.6:
                flat = array.reshape(-1)
                begin = draw.randrange(len(flat))
                end = min(len(flat), begin + draw.choice([1, 5, 100000]))
                flat[begin:end] = np.random.default_rng(draw.randrange(99)).integers(0, 2, end - begin)
                arena.touch(name, begin, end)
        arena.flush(staging)
        for name, array in arena.host.items():
            np.testing.assert_array_equal(arena.device[name].numpy(), array)
    assert max(sends) <= 3
    assert {name: t.data_ptr() for name, t in arena.device.items()} == addresses
    arena.put("a", np.array([8, 9]))
    arena.put("d", np.array([True]))
    arena.flush(staging)
    assert sends[-1] == 2  # the field of 800 kB between them is no part of either
    arena.put("c", np.array([[1.0, 2.0]], dtype=np.float32))
    arena.put("d", np.array([True]))
    arena.flush(staging)
    assert sends[-1] == 1


def test_results_come_down_in_slots_that_are_used_again():
    source = torch.arange(6, dtype=torch.uint8)
    landing = Landing(source, 2)
    first, _ = landing.fetch()
    source += 1
    second, _ = landing.fetch()
    assert (first.tolist(), second.tolist()) == ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])
    landing.release(first)
    third, _ = landing.fetch()
    assert third.data_ptr() == first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("behind", [0, 3])
def test_no_pinned_memory_is_allocated_once_a_batch_is_made(monkeypatch, behind):
    rt = Runtime(tiny_llama(), device="cpu", backend="reference", page_size=8, split_pages=2, max_rows=8)
    rt._engine._manner = Manner(fixed=True, behind=behind)
    rt.generate(random_prompts([5]), do_sample=False, max_new_tokens=2)
    asked: list[int] = []
    monkeypatch.setattr(upload, "pinned", lambda n, device: asked.append(n) or torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append(self.nbytes) or self)
    prompts = random_prompts([3 + n for n in range(20)], seed=1)
    options = {"max_new_tokens": 80, "repetition_penalty": 1.3, "seed": 0}
    rt.generate_branches(prompts, [None, (1.0 * A).with_scope("all"), -1.0 * A], **options)
    rt.hidden_states(prompts)
    rt.score(prompts, prompts)
    assert len(rt._engine._batches) == 1
    assert asked == []


def test_what_is_under_way_when_a_call_ends_gives_its_memory_back(monkeypatch):
    rt = Runtime(tiny_llama(), device="cpu", backend="reference", page_size=8, max_rows=8)
    rt._engine._manner = Manner(fixed=True, behind=3)
    rt.generate(random_prompts([5]), do_sample=False, max_new_tokens=2)
    asked: list[int] = []
    monkeypatch.setattr(upload, "pinned", lambda n, device: asked.append(n) or torch.empty(n, dtype=torch.uint8))
    for _ in range(3):
        # The second pair ends first; steps of the other are under way then.
        options = {"do_sample": False, "max_length": 60}
        stream = rt.stream_pairs(random_prompts([5, 50]), positive=1.0 * A, negative=None, **options)
        assert next(stream).index == 1
        stream.close()
    assert asked == []


# --- how many copies there are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 8, 32])
def test_rows_take_their_seats_in_a_few_copies(pairs):
    assert host.seating_copies(pairs)["count"]["up"] <= 10


def test_a_step_in_steady_state_is_one_copy_down():
    found = host.step_copies(8, 140)
    assert found["steady"]["count"] == {"down": 1}
    assert found["layout"]["count"]["up"] <= 5
    assert found["mean"]["down"] == 1.0


@pytest.mark.parametrize("scope", ["response", "all"])
@pytest.mark.parametrize("prompts", [1, 32])
def test_a_prefill_pass_is_one_copy_and_reads_nothing_back(prompts, scope):
    assert host.prefill_copies(prompts, scope)["count"] == {"up": 1}


def test_what_the_host_knows_of_steerings_goes_up_through_pinned_memory_too(monkeypatch):
    """Where the rows are run exactly: the reference ops, on a CUDA device as well."""
    exact, counts = Batch._exact, []

    def watched(*args: Any) -> Any:
        with host.Crossings() as crossings:
            inputs = exact(*args)
        counts.append(dict(crossings.count))
        return inputs

    monkeypatch.setattr(Batch, "_exact", watched)
    rt = Runtime(tiny_llama(), device="cpu", backend="reference", page_size=8)
    rt.generate_branches(random_prompts([5]), [None, 1.0 * A, A[1:].ablated()], max_new_tokens=3, do_sample=False)
    assert counts
    assert counts[0] == {"up": 1}
    assert all("blocking" not in count for count in counts)


def test_rows_join_all_at_once_and_leave_those_that_run_alone(monkeypatch):
    """A state that the device is still advancing is never written from the host's older copy."""
    rt = Runtime(tiny_llama(), device="cpu", backend="reference", page_size=8, max_rows=8)
    rt._engine._manner = Manner(fixed=True, behind=3)
    bring_up, seen = Batch._bring_up, []

    def watched(batch: Batch) -> None:
        state = {name: x.clone() for name, x in vars(batch.buffers.state).items()}
        joining = list(batch._joining)
        bring_up(batch)
        others = [n for n in range(8) if n not in joining]
        for name, before in state.items():
            assert torch.equal(getattr(batch.buffers.state, name)[others], before[others]), name
        assert bool(batch.buffers.state.running[joining].all())
        seen.append((len(joining), bool(state["running"].any())))

    monkeypatch.setattr(Batch, "_bring_up", watched)
    prompts = random_prompts([3 + n % 5 for n in range(24)], seed=2)
    rt.generate_branches(
        prompts, [None, 1.0 * A], temperature=1.5, top_k=0, seed=2, max_new_tokens=30, eos_token_id=list(range(9))
    )
    assert any(n and runs for n, runs in seen)
