"""The engine's stream: it begins after the caller's, the caller's goes on after it, whatever streams a caller uses."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import pytest
import torch

from icon2_rt import Runtime
from icon2_rt.engine import Engine, engine
from icon2_rt.engine.stream import EngineStream, in_stream, steps_in_stream
from tests.fake_cuda import FakeCuda, cuda
from tests.models import random_prompts, tiny_llama

__all__ = ["cuda"]
CALLER, OURS = "the caller's stream", "stream 0"
IN, OUT = f"{OURS} waits for {CALLER}", f"{CALLER} waits for {OURS}"


class Worker:
    """Something with entry points, each of which says in which stream it ran."""

    def __init__(self, cuda: FakeCuda):
        self.cuda = cuda
        self.stream = EngineStream(torch.device("cuda", 0))

    def work(self, name: str) -> None:
        self.cuda.log.append(f"{name} in {self.cuda.current[-1].name}")

    @in_stream
    def whole(self, name: str, *, fail: bool = False) -> str:
        self.work(name)
        if fail:
            raise ValueError(name)
        return name

    @steps_in_stream
    def steps(self, n: int, fail: bool = False):
        try:
            for k in range(n):
                self.work(f"step {k}")
                yield k
            if fail:
                raise ValueError("at the end")
        finally:
            self.work("end")


def test_a_call_waits_for_the_caller_and_the_caller_for_it(cuda):
    assert Worker(cuda).whole("a") == "a"
    assert cuda.log == [IN, f"a in {OURS}", OUT]


def test_so_does_a_call_that_raises(cuda):
    with pytest.raises(ValueError, match="a"):
        Worker(cuda).whole("a", fail=True)
    assert cuda.log == [IN, f"a in {OURS}", OUT]
    assert cuda.current[-1].name == CALLER


def test_every_step_of_a_generator_waits_for_the_stream_that_is_current_then(cuda):
    worker = Worker(cuda)
    other = cuda.make_stream()
    steps = worker.steps(2)
    assert cuda.log == []  # nothing before the first step
    next(steps)
    assert cuda.current[-1].name == CALLER
    with cuda.stream(other):
        next(steps)
    assert list(steps) == []
    assert cuda.log[:3] == [IN, f"step 0 in {OURS}", OUT]
    assert cuda.log[3:6] == [
        f"{OURS} waits for {other.name}",
        f"step 1 in {OURS}",
        f"{other.name} waits for {OURS}",
    ]
    assert cuda.log[6:9] == [IN, f"end in {OURS}", OUT]


def test_a_generator_that_is_closed_ends_in_the_engines_stream(cuda):
    steps = Worker(cuda).steps(5)
    next(steps)
    cuda.log.clear()
    steps.close()
    assert cuda.log == [IN, f"end in {OURS}", OUT]


def test_a_generator_that_nobody_began_does_nothing(cuda):
    Worker(cuda).steps(5).close()
    assert cuda.log == []


def test_what_a_generator_raises_arrives(cuda):
    with pytest.raises(ValueError, match="at the end"):
        list(Worker(cuda).steps(1, fail=True))
    assert cuda.current[-1].name == CALLER


def test_calls_may_nest(cuda):
    """A call of the engine inside another one's step finds the engine's own stream: it waits for itself."""
    worker = Worker(cuda)
    for _ in worker.steps(1):
        worker.whole("between")
    with worker.stream():
        worker.whole("inside")
    assert f"between in {OURS}" in cuda.log
    assert cuda.log[-4:] == [f"{OURS} waits for {OURS}", f"inside in {OURS}", f"{OURS} waits for {OURS}", OUT]


def test_on_a_cpu_there_is_no_stream(cuda):
    with EngineStream(torch.device("cpu"))():
        pass
    assert cuda.log == []
    assert cuda.streams == []


def test_an_engine_makes_its_memory_in_its_own_stream(monkeypatch):
    """Zeros that another stream writes could come after what a call has put there."""
    inside, made = [False], []

    class Watched(EngineStream):
        @contextmanager
        def __call__(self):
            inside[0] = True
            yield
            inside[0] = False

    monkeypatch.setattr(engine, "EngineStream", Watched)
    for name in ("KVPages", "DirectionBank", "Staging"):
        make = getattr(engine, name)
        monkeypatch.setattr(engine, name, lambda *a, make=make: made.append(inside[0]) or make(*a))
    Runtime(tiny_llama(), device="cpu", page_size=8, kv_memory="1MiB")
    assert made == [True] * 3


ENTRY_POINTS = {"decode", "read", "score", "pin", "unpin"}


def test_every_entry_point_of_the_engine_that_touches_the_device_runs_in_its_stream(monkeypatch):
    public = {name for name, _ in inspect.getmembers(Engine, inspect.isfunction) if not name.startswith("_")}
    assert public >= ENTRY_POINTS
    rt = Runtime(tiny_llama(), device="cpu", page_size=8)
    inside: list[bool] = []
    depth = [0]

    class Counting:
        def __call__(self):
            return self

        def __enter__(self) -> None:
            depth[0] += 1

        def __exit__(self, *exc: object) -> None:
            depth[0] -= 1

    rt._engine.stream = Counting()
    embed = rt._engine.model.ops.embed
    kv, bank = rt._engine.kv, rt._engine.bank

    def seen(function):
        def call(*args, **kwargs):
            inside.append(depth[0] > 0)
            return function(*args, **kwargs)

        return call

    object.__setattr__(rt._engine.model.ops, "embed", seen(embed))
    kv.copy, kv.release, bank.unpin = seen(kv.copy), seen(kv.release), seen(bank.unpin)
    prompts = random_prompts([9, 20], seed=3)
    counted: dict[str, int] = {}

    def count(name: str, call) -> None:
        before = len(inside)
        call()
        counted[name] = len(inside) - before

    count("decode", lambda: rt.generate(prompts, max_new_tokens=3, do_sample=False))
    stream = rt.stream_branches(prompts, [None], max_new_tokens=3, do_sample=False)
    count("first step", lambda: next(stream))
    assert depth == [0]
    count("close", stream.close)
    count("read", lambda: rt.hidden_states(prompts))
    count("score", lambda: rt.score(prompts, [[1, 2], [3]]))
    prefix = rt.prefix(prompts[0])
    count("pin", prefix.__enter__)
    count("unpin", lambda: prefix.__exit__(None, None, None))
    assert all(inside)
    assert all(n > 0 for n in counted.values()), counted
    assert depth == [0]
