"""Calls from several threads: each gets what it would get alone, whichever runtime it is made on."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from icon2_rt import Direction, Runtime
from icon2_rt.engine.turns import Stream, Turns
from icon2_rt.ops import native
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_qwen2, tiny_tokenizer

BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(native.why_not is not None, reason="no C++"))]
STEERED = Direction("d", random_vectors(4, 48, seed=0), torch.ones(4))


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that begin together, each in a thread of its own."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=300) for future in [pool.submit(begin, call) for call in calls]]


def greedy_by_transformers(model: Any, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0
        )
        out.append(whole[0, len(prompt) :].tolist())
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_runtimes_of_several_threads_do_not_meet(backend):
    """Different models, prompts and lengths, many short calls: the answers are transformers'."""
    build = [tiny_llama, tiny_qwen2, lambda: tiny_llama(seed=3, num_hidden_layers=2)]
    prompts = [random_prompts(lengths, seed=k) for k, lengths in enumerate([[3, 9], [17, 1, 4], [6]])]
    tokens = [12, 7, 19]
    right = [greedy_by_transformers(make(), p, n) for make, p, n in zip(build, prompts, tokens, strict=True)]
    runtimes = [Runtime(make(), backend=backend, page_size=8, kv_memory="4MiB") for make in build]

    def calls(k: int) -> list[list[list[int]]]:
        return [
            [c.token_ids for c in runtimes[k].generate(prompts[k], max_new_tokens=tokens[k], do_sample=False)]
            for _ in range(40)
        ]

    for k, answers in enumerate(at_once(*(lambda k=k: calls(k) for k in range(3)))):
        assert answers == [right[k]] * 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_of_several_threads_on_one_runtime_wait_for_each_other(backend):
    """Memory for one call at a time, so that two at once would be refused."""
    rt = Runtime(tiny_llama(), tiny_tokenizer(), backend=backend, page_size=8, kv_memory=11 * 8 * 4 * 2 * 2 * 8 * 4)
    assert rt.kv_pages == 11
    prompts = random_prompts([5, 12, 30], seed=1)
    [completion] = random_prompts([9], seed=2)
    options = {"max_new_tokens": 9, "temperature": 1.1, "seed": 5}
    work: list[Callable[[], Any]] = [
        lambda: rt.generate(prompts, 0.5 * STEERED, **options),
        lambda: rt.generate_pairs(prompts, positive=0.5 * STEERED, negative=-0.5 * STEERED, **options),
        lambda: rt.score(prompts, [completion] * 3, 0.3 * STEERED),
        lambda: rt.hidden_states(prompts).tolist(),
    ]
    alone = [call() for call in work]
    repeated = at_once(*(lambda call=call: [call() for _ in range(12)] for call in work))
    for right, answers in zip(alone, repeated, strict=True):
        assert answers == [right] * 12
    assert rt.free_kv_pages == rt.kv_pages


def test_a_stream_lets_other_threads_call_between_its_outputs():
    rt = Runtime(tiny_llama(), page_size=8, kv_memory="4MiB", max_rows=1)
    prompts = random_prompts([4, 7, 11], seed=3)
    right = rt.generate(prompts, max_new_tokens=5)
    stream = rt.stream_branches(prompts, [None], max_new_tokens=5)
    seen = [next(stream)]
    [[other]] = at_once(lambda: rt.generate(prompts[:1], max_new_tokens=5))  # would wait for ever for a turn held open
    [rest] = at_once(lambda: list(stream))  # and the thread that began it need not be the one that goes on
    assert other == right[0] and [o.branches[0] for o in [*seen, *rest]] == right


def test_threads_may_share_a_stream():
    rt = Runtime(tiny_llama(), page_size=8, kv_memory="4MiB", max_rows=2)
    prompts = random_prompts([3] * 24, seed=4)
    stream = rt.stream_pairs(prompts, positive=0.2 * STEERED, negative=None, max_new_tokens=4)
    taken = at_once(*[lambda: list(stream)] * 3)
    assert sorted(pair.index for part in taken for pair in part) == list(range(24))


def test_a_stream_that_is_let_go_of_gives_its_pages_back_without_waiting():
    """A garbage collector may come in any thread while another one works: it waits for nobody."""
    rt, prompts = Runtime(tiny_llama(), page_size=8, kv_memory="4MiB"), random_prompts([20, 20], seed=5)
    first, second = (c.token_ids for c in rt.generate(prompts, max_new_tokens=4))
    assert first[0] not in second
    stream = rt.stream_branches(prompts, [None], max_new_tokens=4, eos_token_id=first[0])
    next(stream)  # the second one is in the middle of its own
    assert rt.free_kv_pages < rt.kv_pages
    with rt._engine.turns:  # somebody's turn; without it the line below would give the pages back at once

        def let_go() -> None:
            nonlocal stream
            del stream
            gc.collect()

        at_once(let_go)
        assert rt.free_kv_pages < rt.kv_pages  # nothing is taken from under the one whose turn it is
    assert rt.free_kv_pages == rt.kv_pages


def test_what_is_left_for_later_waits_for_the_end_of_the_outermost_turn():
    turns, done = Turns(), []
    turns.later(lambda: done.append("free"))
    with turns:
        with turns:
            turns.later(lambda: done.append("in a turn"))
            turns.later(lambda: turns.later(lambda: done.append("by what was left")))
        assert done == ["free"]
    assert done == ["free", "in a turn", "by what was left"]


def test_an_error_of_what_was_left_for_later_ends_the_turn_that_it_comes_up_in():
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns:
        turns.later(lambda: 1 / 0)
        turns.later(lambda: [][0])
    with pytest.raises(IndexError), turns:  # what the first error left
        pass
    assert at_once(lambda: turns._lock.acquire(blocking=False)) == [True]


def test_an_error_in_a_turn_ends_it():
    rt = Runtime(tiny_llama(), page_size=8, kv_memory="4MiB")

    def fail() -> None:
        with pytest.raises(ValueError, match="outside the vocabulary"):
            rt.generate([[999]])
        with pytest.raises(FloatingPointError):
            broken = Stream(rt._engine.turns, (1 / 0 if n else n for n in range(2)))
            try:
                list(broken)
            except ZeroDivisionError as error:
                raise FloatingPointError from error

    at_once(fail)
    assert at_once(lambda: len(rt.generate([[1, 2]], max_new_tokens=2)[0].token_ids)) == [2]


@pytest.mark.skipif(native.why_not is not None, reason="no C++")
def test_a_capture_holds_what_its_own_thread_runs():
    x, weight = torch.randn(2, 8), torch.randn(3, 4)
    inside, go_on = threading.Event(), threading.Event()
    made: list[Tensor] = []

    def step() -> None:
        half = native.silu_mul(x)
        inside.set()
        assert go_on.wait(60)
        made.append(native.linear(half, weight))

    def others() -> Any:
        assert inside.wait(60)
        native.silu_mul(x)  # no part of either
        repeat = native.capture(lambda: native.silu_mul(x))
        assert native.capture(lambda: native.linear(torch.randn(native.FEW_ROWS + 1, 4), weight)) is None
        go_on.set()
        return repeat

    one, other = at_once(lambda: native.capture(step), others)
    assert (len(one.__self__), len(other.__self__)) == (2, 1)
    right = made[0].clone()
    made[0].fill_(torch.nan)
    one()
    assert torch.equal(made[0], right)


@pytest.mark.skipif(native.why_not is not None, reason="no C++")
def test_a_program_is_captured_once_by_one_thread():
    program = native.extension.Program()
    with pytest.raises(RuntimeError, match="holds no whole step"):
        program.repeat()
    program.begin()
    with pytest.raises(RuntimeError, match="is capturing a step already"):
        native.capture(lambda: None)
    with pytest.raises(RuntimeError, match="is not capturing this program"):
        at_once(program.end)
    assert program.end()
    with pytest.raises(RuntimeError, match="has been captured"):
        program.begin()
    abandoned = native.extension.Program()
    abandoned.begin()
    del abandoned
    assert native.capture(lambda: native.silu_mul(torch.randn(1, 2))) is not None


@pytest.mark.skipif(native.why_not is not None, reason="no C++")
def test_a_new_thread_works_with_torchs_number_of_threads(monkeypatch):
    """OpenMP has a number for each thread, and gives a new one its own default."""
    rt, used = Runtime(tiny_llama(), backend="native", page_size=8, kv_memory="4MiB"), []
    step = rt._engine.model.ops.begin_step
    spy = lambda *a: (used.append(native.extension.max_threads()), step(*a))[1]  # noqa: E731
    monkeypatch.setattr(type(rt._engine.model.ops), "__setattr__", object.__setattr__)
    rt._engine.model.ops.begin_step = spy
    before = torch.get_num_threads()
    try:
        for n in (3, 1):
            torch.set_num_threads(n)
            at_once(lambda: rt.generate([[1, 2, 3]], max_new_tokens=1))
    finally:
        torch.set_num_threads(before)
    assert used == [3, 1]
