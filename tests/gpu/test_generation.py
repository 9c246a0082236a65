"""Whole calls on the GPU: transformers' tokens in fp32, and the reference backend's results for everything else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from icon2_rt import Direction, Runtime, Steering
from icon2_rt.steering import Scope
from tests import hooks
from tests.gpu.lane import PAGE, needs_graphs, runtime
from tests.models import FAMILIES, random_prompts, random_vectors, tiny_llama, tiny_qwen2, tiny_tokenizer

LENGTHS = [1, 2, PAGE, PAGE + 1, 3 * PAGE + 2, 100]
CHOSEN = ["llama", "llama3-rope-tied", "mistral-head16", "qwen2-bias", "qwen3-qknorm-tied"]


def direction(seed: int) -> Direction:
    return Direction(f"d{seed}", random_vectors(4, 48, seed=seed), torch.ones(4))


def steerings() -> list[Steering]:
    """One for each prompt, about a tenth of the residual stream's norm (40 to 80)."""
    a, b = direction(0), direction(1)
    return [
        4.0 * a,
        -4.0 * a[1:3],
        a[1:].ablated() + b.ablated(),
        (5.0 * a - 3.0 * b[2:]).with_keep_norm(),
        a[:2].clamped(6.0) + b.amplified(0.8),
        3.0 * b[-1] + 2.0 * a[0],
    ]


@pytest.fixture(autouse=True)
def fp32_is_fp32() -> None:
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("family", CHOSEN)
def test_64_greedy_tokens_are_those_of_transformers(family):
    build = FAMILIES[family]
    oracle, rt = build(), runtime(build(), max_rows=8)
    prompts = random_prompts(LENGTHS)
    for steered in (None, *("response", "generated", "all")):
        given = [None] * len(prompts) if steered is None else [s.with_scope(steered) for s in steerings()]
        for prompt, steering, ours in zip(
            prompts, given, rt.generate(prompts, given, do_sample=False, max_new_tokens=64), strict=True
        ):
            expected = hooks.greedy(oracle, prompt, 64, steering, draft=ours.token_ids)
            assert ours.token_ids == expected.token_ids
            torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(expected.logprobs), atol=1e-3, rtol=0)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("scope", ["response", "generated", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
        {"temperature": 1.5, "top_k": 0, "eos_token_id": list(range(12)), "min_new_tokens": 4},
        {"temperature": 1.5, "top_k": 0, "stop_strings": ["e", "on", " "]},
    ],
    ids=["filters", "eos", "stop-strings"],
)
def test_branches_are_the_reference_backends(build: Callable[[], PreTrainedModel], scope: Scope, options):
    """More rows than seats, which join and leave while the device runs ahead. A draw whose two best candidates are
    closer than rounding may fall otherwise: of 28 rows one may."""
    prompts = random_prompts([1, 2, 40, 5, 17, 33, 3 * PAGE + 2], seed=1)
    branches = [None, *(s.with_scope(scope) for s in steerings()[:3])]
    how = {"seed": 4, "max_new_tokens": 23, **options}
    expected = Runtime(build(), tiny_tokenizer(), device="cpu", backend="reference").generate_branches(
        prompts, branches, **how
    )
    got = runtime(build(), tokenizer=tiny_tokenizer(), max_rows=8).generate_branches(prompts, branches, **how)
    differ = 0
    for one, two in zip(got, expected, strict=True):
        for ours, theirs in zip(one.branches, two.branches, strict=True):
            assert ours.seed == theirs.seed
            if ours.token_ids != theirs.token_ids:
                differ += 1
                continue
            assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
            torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-3, rtol=0)
    assert differ <= 1


def test_reading_is_the_reference_backends():
    """Prefill in all its uses: states, projections, scores, a pinned prefix."""
    prompts, a = random_prompts([4, 33, 70]), direction(0)
    ours, theirs = runtime(tiny_qwen2()), Runtime(tiny_qwen2(), device="cpu", backend="reference")
    torch.testing.assert_close(ours.hidden_states(prompts).cpu(), theirs.hidden_states(prompts), atol=1e-3, rtol=1e-4)
    completions = random_prompts([3, 20, 9], seed=2)
    for one, two in zip(
        ours.score(prompts, completions, 2.0 * a), theirs.score(prompts, completions, 2.0 * a), strict=True
    ):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(two.logprobs), atol=1e-3, rtol=0)
    shared = random_prompts([37], seed=5)[0]
    found = []
    for rt in (ours, theirs):
        with rt.prefix(shared) as prefix:
            found.append(rt.generate(prompts, 2.0 * a, prefix=prefix, do_sample=False, max_new_tokens=9))
    assert [c.token_ids for c in found[0]] == [c.token_ids for c in found[1]]


@needs_graphs
def test_without_graphs_the_tokens_are_the_same():
    prompts, a = random_prompts(LENGTHS), direction(0)
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 2, "max_new_tokens": 20}
    graphed, plain = runtime(tiny_llama()), runtime(tiny_llama(), cuda_graphs=False)
    expected = graphed.generate_pairs(prompts, positive=2.0 * a, negative=-2.0 * a, **options)
    got = plain.generate_pairs(prompts, positive=2.0 * a, negative=-2.0 * a, **options)
    assert [(p.positive, p.negative) for p in got] == [(p.positive, p.negative) for p in expected]
