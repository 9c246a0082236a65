"""Several samples of one prompt: branches of one group, each with random numbers of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from icon2_rt import Direction, Runtime
from tests import noise
from tests.models import random_prompts, random_vectors, tiny_llama

PROMPTS = random_prompts([6, 1, 19])
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "max_new_tokens": 12}
PUSH = 5.0 * Direction("a", random_vectors(4, 48, seed=0), torch.ones(4))


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return Runtime(tiny_llama(), page_size=8, device="cpu")


def test_generate_gives_a_flat_list_prompt_by_prompt_and_samples_differ(rt):
    several = rt.generate(PROMPTS, PUSH, n=4, seed=3, **SAMPLED)
    assert [c.seed for c in several] == [noise.row_seed(3, i, 0, s) for i in range(3) for s in range(4)]
    assert len({tuple(c.token_ids) for c in several}) == 12
    once = rt.generate(PROMPTS, PUSH, seed=3, **SAMPLED)
    assert [c.token_ids for c in several[::4]] == [c.token_ids for c in once]
    for place, completion in enumerate(several):
        [alone] = rt.generate([PROMPTS[place // 4]], PUSH, seed=[completion.seed], **SAMPLED)
        assert alone.token_ids == completion.token_ids


def test_branches_and_pairs_come_once_per_sample(rt):
    outputs = rt.generate_branches(PROMPTS, [PUSH, None], n=3, seed=5, **SAMPLED)
    assert [(o.index, o.sample) for o in outputs] == [(i, s) for i in range(3) for s in range(3)]
    assert [o.prompt for o in outputs] == [p for p in PROMPTS for _ in range(3)]
    assert [[c.seed for c in o.branches] for o in outputs] == [
        [noise.row_seed(5, i, k, s) for k in range(2)] for i in range(3) for s in range(3)
    ]
    pairs = rt.generate_pairs(PROMPTS, positive=PUSH, negative=None, n=3, seed=5, **SAMPLED)
    assert [(p.index, p.sample) for p in pairs] == [(o.index, o.sample) for o in outputs]
    assert [[p.positive, p.negative] for p in pairs] == [o.branches for o in outputs]
    streamed = list(rt.stream_pairs(PROMPTS, positive=PUSH, negative=None, n=3, seed=5, **SAMPLED))
    assert sorted(streamed, key=lambda p: (p.index, p.sample)) == pairs


def test_the_branches_have_their_steering_in_every_sample(rt):
    outputs = rt.generate_branches(PROMPTS, [PUSH, [None, PUSH, None]], n=2, seed=5, **SAMPLED)
    for output in outputs:
        for branch, steering in zip(output.branches, (PUSH, PUSH if output.index == 1 else None), strict=True):
            [alone] = rt.generate([output.prompt], steering, seed=[branch.seed], **SAMPLED)
            assert alone.token_ids == branch.token_ids
    rt.generate_branches(PROMPTS, [PUSH, [None, PUSH, None]], n=2, seed=5, **SAMPLED)
    assert {f.branch: f.rows for f in rt.last_run.steering} == {"branches[0]": 6, "branches[1]": 2}
    assert rt.last_run.rows == 12
    assert rt.last_run.complete


def test_common_noise_is_common_to_a_samples_branches_only(rt):
    outputs = rt.generate_branches(PROMPTS, [None, None], n=3, seed=5, noise="common", **SAMPLED)
    for output in outputs:
        one, other = output.branches
        assert one.token_ids == other.token_ids
        assert one.seed == other.seed == noise.row_seed(5, output.index, None, output.sample)
    assert len({o.branches[0].seed for o in outputs}) == 9


def test_samples_share_the_prompts_kv(rt):
    rt.generate([PROMPTS[2] * 4], n=4, seed=0, **SAMPLED)
    assert rt.last_run.paths.prefill_passes == 1
    assert rt.last_run.paths.sharing_rows == 4
    assert rt.free_kv_pages == rt.kv_pages


def test_a_list_of_seeds_has_one_per_row(rt):
    seeds = [11, 12, 13, 14, 15, 16]
    outputs = rt.generate(PROMPTS, n=2, seed=seeds, **SAMPLED)
    assert [c.seed for c in outputs] == seeds
    with pytest.raises(ValueError, match="3 prompts × 2 samples × 1 branches = 6, not 3"):
        rt.generate(PROMPTS, n=2, seed=[1, 2, 3], **SAMPLED)


def test_samples_that_would_all_be_equal_are_refused(rt):
    with pytest.raises(ValueError, match="n=3 with greedy decoding would give 3 equal completions"):
        rt.generate(PROMPTS, n=3, do_sample=False)
    for bad in (0, -1, 1.5, True, "2", None):
        with pytest.raises(ValueError, match="n, the samples of a prompt"):
            rt.generate(PROMPTS, n=bad, **SAMPLED)
    for asked in (
        {"num_return_sequences": 4},
        {"generation_config": GenerationConfig(do_sample=True, num_return_sequences=4)},
    ):
        with pytest.raises(ValueError, match="n=4 gives that many samples"):
            rt.generate(PROMPTS, **SAMPLED, **asked)
    assert len(rt.generate(PROMPTS, n=1, do_sample=False, max_new_tokens=2)) == 3
