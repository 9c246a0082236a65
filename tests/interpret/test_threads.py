"""The interpreter keeps the place of a launch in variables of the process: runtimes of several threads take turns."""

from __future__ import annotations

from icon2_rt import Runtime
from tests.models import random_prompts, tiny_llama, tiny_qwen2
from tests.test_threads import at_once


def test_runtimes_of_several_threads_take_turns():
    runtimes = [Runtime(make(), backend="triton", page_size=16, kv_memory="4MiB") for make in (tiny_llama, tiny_qwen2)]
    prompts = [random_prompts([5], seed=1), random_prompts([3, 9], seed=2)]
    alone = [rt.generate(p, max_new_tokens=2) for rt, p in zip(runtimes, prompts, strict=True)]
    calls = [
        lambda rt=rt, p=p: [rt.generate(p, max_new_tokens=2) for _ in range(2)]
        for rt, p in zip(runtimes, prompts, strict=True)
    ]
    assert at_once(*calls) == [[right, right] for right in alone]
