"""The engine against transformers in fp32: every family, unsteered and steered in all scopes.

The oracle (tests/hooks.py) has no cache and no batch: plain forward passes over whole sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from icon2_rt import Completion, Direction, Runtime, Steering
from icon2_rt.engine import step
from icon2_rt.engine.batch import Batch
from icon2_rt.engine.kv import SCORED_ROWS
from tests import hooks
from tests.models import (
    FAMILIES,
    LLAMA3_ROPE,
    random_prompts,
    random_vectors,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
    tiny_tokenizer,
)

ATOL = 1e-4
# Logits under the strongest of these steerings: transformers in fp32 is itself up to 1.1e-4 from fp64, ours 5e-5.
LOGIT_ATOL = 2e-4
PAGE = 16
LENGTHS = [1, 2, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 2]
GREEDY = {"do_sample": False, "max_new_tokens": 64}
SCOPES = ["response", "generated", "all"]


@dataclass
class Case:
    name: str
    oracle: PreTrainedModel
    rt: Runtime

    @property
    def steerings(self) -> list[Steering]:
        """One per prompt of LENGTHS, as strong as a tenth of the residual stream (norms are 40 to 80)."""
        n, hidden = self.rt.spec.n_layers, self.rt.spec.hidden_size
        a, b = (Direction(f"d{i}", random_vectors(n, hidden, seed=i), torch.ones(n)) for i in range(2))
        return [
            4.0 * a,
            -4.0 * a[1:3],
            a[1:].ablated() + b.ablated(),
            (5.0 * a - 3.0 * b[2:]).with_keep_norm(),
            a[:2].clamped(6.0) + b.amplified(0.8),
            3.0 * b[-1] + 2.0 * a[0],
        ]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request) -> Case:
    build = FAMILIES[request.param]
    return Case(request.param, build(), Runtime(build(), page_size=PAGE, split_pages=2, prefill_chunk=32, device="cpu"))


def assert_close(got: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), atol=ATOL, rtol=0
    )


def decode(rt: Runtime, prompts: list[list[int]], steerings: list[Steering | None]) -> tuple[list[Completion], Tensor]:
    """64 greedy tokens, and the logits that they were taken from: ``[64, prompts, vocab]``."""
    last: list[Tensor] = []  # a step that is repeated writes the same memory
    steps = []

    def recording(*args: Any) -> Tensor:
        last[:] = [logits(*args)]
        return last[0]

    def stepping(*args: Any) -> None:
        one_step(*args)
        steps.append(last[0].clone())

    logits, one_step = step.logits, Batch.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "logits", recording)
        patch.setattr(Batch, "step", stepping)
        completions = rt.generate(prompts, steerings, do_sample=False, max_new_tokens=64)
    return completions, torch.stack(steps)


@pytest.mark.parametrize("scope", [None, *SCOPES])
def test_logits_and_64_greedy_tokens(case, scope):
    """Prefill and decode, all prompts in one batch, each with a steering of its own."""
    prompts = random_prompts(LENGTHS)
    steerings = [None if scope is None else s.with_scope(scope) for s in case.steerings]
    completions, logits = decode(case.rt, prompts, steerings)
    changed = 0
    for n, (prompt, steering, completion) in enumerate(zip(prompts, steerings, completions, strict=True)):
        expected = hooks.greedy(case.oracle, prompt, 64, steering, completion.token_ids)
        assert completion.token_ids == expected.token_ids
        torch.testing.assert_close(logits[:, n], expected.logits, atol=LOGIT_ATOL, rtol=0)
        assert_close(completion.logprobs, expected.logprobs)
        assert (completion.finish_reason, completion.seed, completion.text) == ("length", None, None)
        unsteered = hooks.response_logits(case.oracle, prompt, completion.token_ids, None)
        changed += unsteered.argmax(dim=-1).tolist() != completion.token_ids
    # A constant loop would prove little, and so would steerings too weak to change what is written.
    assert min(len(set(c.token_ids)) for c in completions) > 5
    assert changed == 0 if scope is None else changed >= 5


@pytest.mark.parametrize("scope", [None, *SCOPES])
def test_scores_of_given_completions(case, scope):
    prompts = random_prompts(LENGTHS)
    completions = random_prompts([1, 5, 16, 17, 33, 2], seed=3)
    steerings = [None if scope is None else s.with_scope(scope) for s in case.steerings]
    for prompt, completion, steering, scored in zip(
        prompts, completions, steerings, case.rt.score(prompts, completions, steerings), strict=True
    ):
        expected = hooks.teacher_forced(case.oracle, prompt, completion, steering)
        p = expected.logits.double().softmax(dim=-1)
        assert scored.token_ids == completion
        assert_close(scored.logprobs, expected.logprobs)
        assert_close(scored.entropies, torch.special.entr(p).sum(dim=-1).tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_backend_by_itself(family):
    """Where the native extension is built, "auto" takes it: the definition of all others is held to the oracle too."""
    oracle = FAMILIES[family]()
    rt = Runtime(FAMILIES[family](), backend="reference", page_size=PAGE, split_pages=2, prefill_chunk=32, device="cpu")
    assert rt.backend == "reference"
    prompts = random_prompts(LENGTHS)
    given = [s.with_scope(SCOPES[n % 3]) for n, s in enumerate(Case(family, oracle, rt).steerings)]
    outputs = rt.generate_branches(prompts, [None, given], do_sample=False, max_new_tokens=24)
    changed = 0
    for prompt, steering, output in zip(prompts, given, outputs, strict=True):
        for branch, how in zip(output.branches, (None, steering), strict=True):
            expected = hooks.greedy(oracle, prompt, 24, how, branch.token_ids)
            assert branch.token_ids == expected.token_ids
            assert_close(branch.logprobs, expected.logprobs)
        changed += output.branches[0].token_ids != output.branches[1].token_ids
    assert changed >= 5
    completions = random_prompts([1, 5, 16, 17, 33, 2], seed=3)
    for prompt, completion, steering, scored in zip(
        prompts, completions, given, rt.score(prompts, completions, given), strict=True
    ):
        assert_close(scored.logprobs, hooks.teacher_forced(oracle, prompt, completion, steering).logprobs)


def test_scores_of_a_completion_that_takes_several_turns():
    """Logits are made for some rows at a time: a long completion's figures are put together from several turns."""
    prompt, completion = random_prompts([5])[0], random_prompts([SCORED_ROWS + 44], seed=3)[0]
    [scored] = Runtime(tiny_llama(), device="cpu").score([prompt], [completion])
    expected = hooks.teacher_forced(tiny_llama(), prompt, completion)
    assert_close(scored.logprobs, expected.logprobs)
    p = expected.logits.double().softmax(dim=-1)
    assert_close(scored.entropies, torch.special.entr(p).sum(dim=-1).tolist())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_loaded_with_either_attention_gives_the_same(implementation):
    prompt = random_prompts([20])[0]
    rt = Runtime(tiny_llama(attn_implementation=implementation), device="cpu")
    assert rt.generate([prompt], **GREEDY)[0].token_ids == hooks.greedy(tiny_llama(), prompt, 64).token_ids


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, {"rope_type": "default", "rope_theta": 5e5}], ids=["llama3", "theta5e5"])
def test_a_prompt_many_times_longer_than_the_rope_was_scaled_from(rope):
    """Positions up to 700: an error in the low frequencies shows only there."""
    overrides = {"rope_parameters": rope, "max_position_embeddings": 1024, "num_hidden_layers": 2}
    oracle, rt = tiny_llama(**overrides), Runtime(tiny_llama(**overrides), device="cpu", prefill_chunk=256)
    prompt = random_prompts([690])[0]
    steering = 4.0 * Direction("d", random_vectors(2, 48, seed=0), torch.ones(2))
    for s in (None, steering, steering.with_scope("all")):
        completion = rt.generate([prompt], s, do_sample=False, max_new_tokens=12)[0]
        expected = hooks.greedy(oracle, prompt, 12, s, completion.token_ids)
        assert completion.token_ids == expected.token_ids
        assert_close(completion.logprobs, expected.logprobs)


@pytest.mark.parametrize("page_size", [4, 64])
@pytest.mark.parametrize("prefill_chunk", [8, 1024])
def test_page_and_chunk_sizes_do_not_matter(page_size, prefill_chunk):
    oracle = tiny_llama()
    rt = Runtime(tiny_llama(), page_size=page_size, split_pages=1, prefill_chunk=prefill_chunk, device="cpu")
    a = Direction("a", random_vectors(4, 48, seed=0), torch.ones(4))
    lengths = [1, page_size - 1, page_size, page_size + 1, 3 * page_size + 2]
    prompts = random_prompts(lengths)
    for scope in SCOPES:
        steering = (4.0 * a[1:]).with_scope(scope)
        for prompt, completion in zip(
            prompts, rt.generate(prompts, steering, do_sample=False, max_new_tokens=24), strict=True
        ):
            assert completion.token_ids == hooks.greedy(oracle, prompt, 24, steering, completion.token_ids).token_ids


def test_keep_model_leaves_the_original_usable():
    model, prompt = tiny_qwen2(), random_prompts([9])[0]
    before = hooks.logits(model, prompt)
    rt = Runtime(model, keep_model=True, device="cpu")
    assert torch.equal(hooks.logits(model, prompt), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    expected = hooks.greedy(tiny_qwen2(), prompt, 16).token_ids
    assert rt.generate([prompt], do_sample=False, max_new_tokens=16)[0].token_ids == expected


def test_the_models_memory_is_taken_over():
    model = tiny_llama()
    Runtime(model, device="cpu")
    assert sum(p.numel() for p in model.model.layers.parameters()) == 0


def test_within_a_sliding_window_mistral_is_itself_and_beyond_it_is_refused():
    build = {"sliding_window": 40}
    oracle, rt = tiny_mistral(**build), Runtime(tiny_mistral(**build), device="cpu")
    prompt = random_prompts([20])[0]
    completion = rt.generate([prompt], do_sample=False, max_new_tokens=20)[0]
    assert completion.token_ids == hooks.greedy(oracle, prompt, 20).token_ids
    with pytest.raises(ValueError, match="40"):
        rt.generate([prompt], do_sample=False, max_new_tokens=30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_transformers_is(dtype):
    """Root mean square error of log-probabilities under the same (rounded) weights, against transformers' own."""
    prompts, completions = random_prompts([5, 40, 17, 1]), random_prompts([50] * 4, seed=1)
    half, exact, rt = (
        tiny_llama().to(dtype),
        tiny_llama().to(dtype).float(),
        Runtime(tiny_llama().to(dtype), device="cpu"),
    )
    assert rt.dtype == dtype
    for steering in (None, 6.0 * Direction("a", random_vectors(4, 48, seed=0), torch.ones(4))):
        ours, theirs = [], []
        for prompt, completion, scored in zip(
            prompts, completions, rt.score(prompts, completions, steering), strict=True
        ):
            expected = torch.tensor(hooks.teacher_forced(exact, prompt, completion, steering).logprobs)
            ours.append(torch.tensor(scored.logprobs) - expected)
            theirs.append(torch.tensor(hooks.teacher_forced(half, prompt, completion, steering).logprobs) - expected)
        assert 0 < torch.cat(ours).square().mean().sqrt() < 1.3 * torch.cat(theirs).square().mean().sqrt()
    generated = rt.generate(prompts, do_sample=False, max_new_tokens=8)
    assert [len(g.token_ids) for g in generated] == [8] * 4


def test_the_same_weights_have_the_same_fingerprint_in_any_dtype():
    fp32 = Runtime(tiny_llama(), device="cpu").fingerprint
    assert Runtime(tiny_llama().bfloat16(), device="cpu").fingerprint == fp32
    assert Runtime(tiny_llama(seed=1), device="cpu").fingerprint != fp32
    assert Runtime(tiny_llama(num_hidden_layers=3), device="cpu").fingerprint != fp32


def test_from_pretrained_is_the_model_in_memory(tmp_path):
    tiny_qwen2().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()  # a folder whose config says qwen2 would give Qwen's own kind of tokenizer
    rt = Runtime.from_pretrained(str(tmp_path), tokenizer=tokenizer, device="cpu", page_size=8, dtype=torch.float32)
    memory = Runtime(tiny_qwen2(), tiny_tokenizer(), device="cpu")
    assert (rt.name, rt.page_size, rt.dtype) == (str(tmp_path), 8, torch.float32)
    assert rt.fingerprint == memory.fingerprint
    chat = [[{"role": "user", "content": "what is the thing"}]]
    options = {"do_sample": False, "max_new_tokens": 16}
    assert rt.generate(chat, **options)[0].token_ids == memory.generate(chat, **options)[0].token_ids
    written = rt.generate(chat, **options)[0].token_ids
    assert written == hooks.greedy(tiny_qwen2(), rt.encode(chat[0]), len(written)).token_ids
    half = Runtime.from_pretrained(tmp_path, tokenizer=tokenizer, device="cpu", dtype=torch.bfloat16)
    assert (half.dtype, half.fingerprint) == (torch.bfloat16, memory.fingerprint)
