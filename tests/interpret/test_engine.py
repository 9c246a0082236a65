"""The whole engine through the Triton kernels: tokens equal to those of the reference backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from icon2_rt import Direction, Runtime, Steering, tiny
from icon2_rt.engine.batch import Manner
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_qwen3

PAGE = 16


def both(model: Any, **options: Any) -> list[Runtime]:
    runtimes = [Runtime(model(), backend=name, device="cpu", **options) for name in ("reference", "triton")]
    assert [rt.backend for rt in runtimes] == ["reference", "triton"]
    runtimes[1]._engine._manner = Manner(fixed=True, behind=2)  # as on a GPU, but for the graphs
    return runtimes


def same(got: list, expected: list) -> None:
    for one, two in zip(got, expected, strict=True):
        for a, b in zip(one.branches, two.branches, strict=True):
            assert (a.token_ids, a.finish_reason, a.seed) == (b.token_ids, b.finish_reason, b.seed)
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=2e-4, rtol=0)


def test_the_shipped_model_writes_the_same_greedy_tokens():
    """Three branches of a question: unsteered, pushed from the first generated token on, ablated and pushed."""
    runtimes = [
        Runtime.from_pretrained(tiny.path(), backend=name, device="cpu", max_rows=8) for name in ("reference", "triton")
    ]
    vectors = random_vectors(6, 128, seed=0)
    d = Direction("d", vectors)
    branches: list[Steering | None] = [None, (12.0 * d[1:5]).with_scope("all"), d[2:].ablated() - 9.0 * d[1]]
    questions = ["What colour is the sky?", "Please list three words that rhyme with cat, and say why you chose them."]
    chats = [[{"role": "user", "content": text}] for text in questions]
    reference, kernels = (rt.generate_branches(chats, branches, do_sample=False, max_new_tokens=10) for rt in runtimes)
    same(kernels, reference)
    assert len({tuple(b.token_ids) for o in reference for b in o.branches}) > 3


GREEDY = {"do_sample": False, "repetition_penalty": 1.3}
SAMPLED = {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "eos_token_id": list(range(6)), "seed": 5}


@pytest.mark.parametrize(
    ("model", "sampling"), [(tiny_llama, GREEDY), (tiny_qwen3, SAMPLED)], ids=["llama-greedy", "qwen3-sampled"]
)
def test_mixed_scopes_seats_and_samplings(model, sampling):
    """More rows than seats, forks, filters and penalties, ends by eos, results that are looked at late."""
    a, b = (Direction(f"d{seed}", random_vectors(4, 48, seed=seed)) for seed in range(2))
    prompts = random_prompts([1, PAGE + 1, 2 * PAGE + 5], seed=2)
    rows: list[Steering | None] = [(2.0 * a[1:]).with_scope("all"), None, (-3.0 * a).with_keep_norm()]
    branches = [rows, b.ablated() + (1.0 * a[2:])]
    reference, kernels = both(model, page_size=PAGE, split_pages=2, max_rows=4, prefill_chunk=32)
    expected = reference.generate_branches(prompts, branches, max_new_tokens=6, **sampling)
    same(kernels.generate_branches(prompts, branches, max_new_tokens=6, **sampling), expected)


def test_reading_and_scoring():
    reference, kernels = both(tiny_llama, page_size=PAGE, prefill_chunk=32)
    a = Direction("a", random_vectors(4, 48, seed=0))
    prompts = random_prompts([3, 20], seed=3)
    torch.testing.assert_close(kernels.project(prompts, [a]), reference.project(prompts, [a]), atol=1e-3, rtol=1e-4)
    for steering in (3.0 * a[1:],):
        for one, two in zip(
            kernels.score(prompts, [[5, 6, 7]] * 2, steering), reference.score(prompts, [[5, 6, 7]] * 2, steering),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(two.logprobs), atol=1e-4, rtol=0)
            torch.testing.assert_close(torch.tensor(one.entropies), torch.tensor(two.entropies), atol=1e-4, rtol=0)


def exact_gap(exact: Runtime, prompt: list[int], one: list[int], two: list[int], steering: Steering | None) -> float:
    """How far apart in fp32 are the log-probabilities of the tokens at which two completions part."""
    parts = next(n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    a, b = exact.score([prompt] * 2, [one[: parts + 1], two[: parts + 1]], steering)
    return abs(a.logprobs[-1] - b.logprobs[-1])


@pytest.mark.parametrize(
    ("model", "sampling"), [(tiny_llama, GREEDY), (tiny_qwen3, {"do_sample": False})], ids=["llama", "qwen3"]
)
def test_bf16_loses_what_the_reference_loses(model, sampling):
    """What the kernels write in bf16, judged in fp32 on the same weights: its log-probabilities are as far off as those
    of the reference in bf16, and where the two write different tokens, these are as good as equal."""

    def in_bf16():
        return model().bfloat16()

    reference, kernels = both(in_bf16, page_size=PAGE, split_pages=2, max_rows=4, prefill_chunk=32)
    exact = Runtime(in_bf16().float(), backend="reference", device="cpu")
    a = Direction("a", random_vectors(4, 48, seed=0))
    branches: list[Steering | None] = [(2.0 * a[1:]).with_scope("all"), None, (-3.0 * a).with_keep_norm(), a.ablated()]
    prompts = random_prompts([1, 2 * PAGE + 5], seed=2)
    got, expected = (
        rt.generate_branches(prompts, branches, max_new_tokens=5, **sampling) for rt in (kernels, reference)
    )
    losses: dict[str, list[float]] = {"kernels": [], "reference": []}
    parted = []
    for prompt, ours, theirs in zip(prompts, got, expected, strict=True):
        for steering, one, two in zip(branches, ours.branches, theirs.branches, strict=True):
            for name, done in (("kernels", one), ("reference", two)):
                (right,) = exact.score([prompt], [done.token_ids], steering)
                losses[name] += [a - b for a, b in zip(done.logprobs, right.logprobs, strict=True)]
            if one.token_ids != two.token_ids:
                parted.append(exact_gap(exact, prompt, one.token_ids, two.token_ids, steering))
    kernel_loss, reference_loss = (torch.tensor(losses[name]) for name in ("kernels", "reference"))
    assert float(kernel_loss.norm()) <= 1.5 * float(reference_loss.norm())
    assert 0 < float(kernel_loss.abs().max()) <= 2.0 * float(reference_loss.abs().max())
    assert all(gap <= 4.0 * float(reference_loss.abs().max()) for gap in parted)
