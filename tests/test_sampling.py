"""Sampling: transformers' processors say who survives, the design's noise says who wins, and the engine must agree.

For every generated token the oracle takes transformers' logits (the whole sequence recomputed), transformers' own
LogitsProcessors in the order of its ``generate``, and an independent Philox. No tolerance on tokens: a choice that
rounding could decide (winner and runner-up within 1e-4) is counted, and there may hardly be any.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from icon2_rt import Completion, Direction, Runtime, Steering
from icon2_rt.ops.sample import RowSampling, process, sample, warp
from icon2_rt.ops.state import RowState
from tests import hooks, noise
from tests.models import VOCAB, random_prompts, random_vectors, tiny_llama, tiny_qwen2, tiny_tokenizer

PROMPTS = random_prompts([6, 1, 19, 8])
NEUTRAL: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def oracle():
    return tiny_llama()


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return Runtime(tiny_llama(), page_size=8, device="cpu")


@pytest.fixture(scope="module")
def chat() -> Runtime:
    return Runtime(tiny_llama(), tiny_tokenizer(), page_size=8, device="cpu")


@pytest.fixture(scope="module")
def steering() -> Steering:
    return 5.0 * Direction("a", random_vectors(4, 48, seed=0), torch.ones(4))


def processors(prompt_length: int, options: dict[str, Any]) -> LogitsProcessorList:
    """What transformers' generate builds from these options, in its order."""
    chain = LogitsProcessorList()
    if options.get("repetition_penalty", 1.0) != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if options.get("min_new_tokens") and options.get("eos_token_id") is not None:
        eos = torch.tensor(options["eos_token_id"]).reshape(-1)
        chain.append(MinNewTokensLengthLogitsProcessor(prompt_length, options["min_new_tokens"], eos, device="cpu"))
    if options.get("temperature", 1.0) != 1.0:
        chain.append(TemperatureLogitsWarper(options["temperature"]))
    if options.get("top_k"):
        chain.append(TopKLogitsWarper(options["top_k"]))
    if options.get("top_p", 1.0) < 1.0:
        chain.append(TopPLogitsWarper(options["top_p"]))
    if options.get("min_p"):
        chain.append(MinPLogitsWarper(options["min_p"]))
    return chain


def check(oracle, prompt: list[int], completion: Completion, options: dict[str, Any], steering=None) -> int:
    """Assert that every token is the one the oracle draws; returns how many choices were too close to call."""
    rows = hooks.response_logits(oracle, prompt, completion.token_ids, steering)
    chain = processors(len(prompt), options)
    close = 0
    for index, token in enumerate(completion.token_ids):
        ids = torch.tensor([[*prompt, *completion.token_ids[:index]]])
        scores = chain(ids, rows[index : index + 1].clone())[0]
        drawn, margin = noise.choose(scores.numpy(), completion.seed, index)
        close += margin < 1e-4
        assert drawn == token or margin < 1e-4, f"token {index}: {token}, the oracle draws {drawn} (margin {margin:g})"
    expected = rows.double().log_softmax(dim=-1)[range(len(rows)), completion.token_ids]
    torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-4, rtol=0)
    return close


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.6": {"temperature": 1.6},
    "top_k 5": {"top_k": 5},
    "top_k beyond the vocabulary": {"top_k": 10_000},
    "top_p 0.8": {"top_p": 0.8},
    "top_p tiny": {"top_p": 0.01},
    "min_p 0.1": {"min_p": 0.1},
    "repetition_penalty 1.5": {"repetition_penalty": 1.5},
    "repetition_penalty 0.8": {"repetition_penalty": 0.8},
    "all of them": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    "eos": {"eos_token_id": [3, 9, 40, 77, 101], "temperature": 1.5},
    "min_new_tokens": {"eos_token_id": list(range(60)), "min_new_tokens": 9, "temperature": 1.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_token_is_the_one_the_oracle_draws(rt, oracle, steering, name):
    options = {**NEUTRAL, **OPTIONS[name]}
    close = 0
    for given in (None, steering, steering.with_scope("generated")):
        for prompt, completion in zip(
            PROMPTS, rt.generate(PROMPTS, given, max_new_tokens=24, seed=11, **options), strict=True
        ):
            close += check(oracle, prompt, completion, options, given)
    assert close <= 2


def test_greedy_with_penalty_and_minimum_length(rt, oracle):
    options = {"repetition_penalty": 1.4, "min_new_tokens": 6, "eos_token_id": list(range(0, 128, 2))}
    completions = rt.generate(PROMPTS, do_sample=False, max_new_tokens=24, **options)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        rows = hooks.response_logits(oracle, prompt, completion.token_ids, None)
        chain = processors(len(prompt), options)
        for index, token in enumerate(completion.token_ids):
            ids = torch.tensor([[*prompt, *completion.token_ids[:index]]])
            assert int(chain(ids, rows[index : index + 1].clone()).argmax()) == token
        assert completion.seed is None
        assert len(completion.token_ids) >= 7 or completion.finish_reason == "length"


# --- who survives: the op against transformers' warpers --------------------------------------------------------------


def neutral(rows: int, vocab: int, **changed: Any) -> RowSampling:
    fields: dict[str, Any] = dict.fromkeys(
        ("sampled", "seeds", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seen", "min_tokens")
    )
    fields |= {"eos": torch.full((rows, 1), -1), "budget": torch.full((rows,), 100)}
    return RowSampling(**{**fields, **changed})


def fresh(rows: int) -> RowState:
    counts = [torch.zeros(rows, dtype=torch.int32) for _ in range(2)]
    return RowState(torch.zeros(rows, dtype=torch.int64), *counts, torch.ones(rows).bool(), torch.zeros(rows))


def tied(scores: torch.Tensor) -> torch.Tensor:
    """Rounded so that many entries are exactly equal: bf16 logits are like this."""
    return (scores * 2).round() / 2


@pytest.mark.parametrize("shape", [lambda s: s, tied], ids=["distinct", "tied"])
@pytest.mark.parametrize("scale", [0.3, 3.0, 20.0])
def test_survivors_are_transformers_survivors(shape, scale):
    rows, vocab = 40, 97
    generator = torch.Generator().manual_seed(0)
    logits = shape(scale * torch.randn(rows, vocab, generator=generator))
    ids = torch.randint(vocab, (rows, 12), generator=generator)
    seen = torch.zeros(rows, vocab, dtype=torch.bool).scatter_(1, ids, True)
    draw = torch.rand(5, rows, generator=generator)
    how = neutral(
        rows,
        vocab,
        temperature=0.3 + 1.5 * draw[0],
        top_k=(1 + draw[1] * 60).long(),
        top_p=(0.05 + draw[2]).clamp(max=1.0),
        min_p=0.3 * draw[3] ** 2,
        repetition_penalty=0.7 + draw[4],
        seen=seen,
    )
    processed = process(logits, how, fresh(rows))
    got = warp(processed, how)
    for row in range(rows):
        options = {
            name: float(getattr(how, name)[row]) for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        }
        options["top_k"] = int(how.top_k[row])
        expected = processors(0, options)(ids[row : row + 1], logits[row : row + 1].clone())[0]
        kept = torch.isfinite(expected)
        if shape is tied:  # transformers' top_p cuts through equal scores; here they share their fate
            kept = processed[row] >= processed[row][kept].min()
            expected = processed[row] / how.temperature[row]
        assert torch.equal(torch.isfinite(got[row]), kept), options
        torch.testing.assert_close(got[row][kept], expected[kept], atol=1e-5, rtol=1e-5)
        assert int(kept.sum()) >= 1


def test_a_greedy_row_takes_the_first_maximum_and_ignores_the_noise():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 2.0, 5.0]])
    state = fresh(2)
    sample(logits, neutral(2, 4), state)
    assert state.tokens.tolist() == [1, 0]
    torch.testing.assert_close(state.logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


def test_a_row_advances_until_an_eos_token_or_its_budget_and_then_stays():
    """Row 0 runs into its budget, row 1 draws its eos once it may, row 2 is an empty seat."""
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 1.0, 2.0], [9.0, 1.0, 1.0]])
    state = fresh(3)
    state.positions.copy_(torch.tensor([7, 8, 9]))
    state.running[2] = False
    how = neutral(
        3, 3, eos=torch.tensor([[0, -1], [0, 2], [0, 1]]), min_tokens=torch.tensor([0, 2, 0]),
        budget=torch.tensor([2, 9, 9]),
    )  # fmt: skip
    written = []
    for _ in range(4):
        sample(logits, how, state)
        written.append((state.tokens.tolist(), state.positions.tolist(), state.running.tolist()))
    assert written == [
        ([1, 1, 0], [8, 9, 9], [True, True, False]),
        ([1, 1, 0], [9, 10, 9], [False, True, False]),
        ([1, 2, 0], [9, 11, 9], [False, False, False]),
        ([1, 2, 0], [9, 11, 9], [False, False, False]),
    ]
    assert state.generated.tolist() == [2, 3, 0]
    assert state.logprobs[2] == 0


def test_frequencies_follow_the_softmax(rt, oracle):
    """4000 seeds of one row: chi-square with about 30 classes stays below its 99.9th percentile (fixed seeds)."""
    prompt, n = PROMPTS[0], 4000
    completions = rt.generate([prompt] * n, max_new_tokens=1, seed=0, **NEUTRAL)
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=VOCAB)
    p = hooks.logits(oracle, prompt)[-1].double().softmax(-1).numpy()
    common = p * n >= 10
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * n
    assert len(observed) > 20
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = len(observed) - 1
    assert statistic < degrees + 3.1 * np.sqrt(2 * degrees) + 7  # Laurent and Massart, above the 99.9th percentile


# --- seeds and noise -------------------------------------------------------------------------------------------------


def test_row_seeds_are_those_of_the_design(rt):
    completions = rt.generate(PROMPTS, max_new_tokens=2, seed=1234567890123, **NEUTRAL)
    assert [c.seed for c in completions] == [noise.row_seed(1234567890123, i, 0) for i in range(len(PROMPTS))]
    ids = [7, 2**33, 0, 5]
    completions = rt.generate(PROMPTS, max_new_tokens=2, seed=3, sample_ids=ids, **NEUTRAL)
    assert [c.seed for c in completions] == [noise.row_seed(3, i, 0) for i in ids]
    branched = rt.generate_branches(PROMPTS, [None, None, None], max_new_tokens=2, seed=3, **NEUTRAL)
    for i, output in enumerate(branched):
        assert [c.seed for c in output.branches] == [noise.row_seed(3, i, b) for b in range(3)]
        assert len({tuple(c.token_ids) for c in output.branches}) > 1
    common = rt.generate_branches(PROMPTS, [None] * 3, max_new_tokens=2, seed=3, noise="common", **NEUTRAL)
    for i, output in enumerate(common):
        assert [c.seed for c in output.branches] == [noise.row_seed(3, i, None)] * 3


def test_common_noise_differs_only_where_the_steering_made_it_differ(rt, steering):
    options = {**NEUTRAL, "max_new_tokens": 20, "seed": 2, "noise": "common"}
    for output in rt.generate_branches(PROMPTS, [None, None, steering, steering], **options):
        one, two, three, four = output.branches
        assert one.token_ids == two.token_ids
        assert three.token_ids == four.token_ids
        assert one.token_ids != three.token_ids


def test_a_completions_seed_reproduces_the_row_alone(rt, steering):
    options = {**NEUTRAL, "max_new_tokens": 16, "temperature": 0.9}
    batch = rt.generate_branches(PROMPTS, [steering, None], seed=9, **options)
    for output in batch:
        for given, branch in zip((steering, None), output.branches, strict=True):
            alone = rt.generate([output.prompt], given, seed=[branch.seed], **options)[0]
            assert alone.token_ids == branch.token_ids
            assert alone.seed == branch.seed


def test_a_list_of_seeds_is_used_directly_prompt_major(rt):
    seeds = [2**64 - 1, 5, 0, 2**32, 17, 4]
    outputs = rt.generate_branches(PROMPTS[:3], [None, None], seed=seeds, max_new_tokens=3, **NEUTRAL)
    assert [c.seed for o in outputs for c in o.branches] == seeds


def test_the_same_seed_is_the_same_and_another_is_not(rt):
    def draw(seed):
        return [c.token_ids for c in rt.generate(PROMPTS, seed=seed, max_new_tokens=16, **NEUTRAL)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    unseeded = rt.generate(PROMPTS, max_new_tokens=16, **NEUTRAL)
    again = rt.generate(PROMPTS, seed=[c.seed for c in unseeded], max_new_tokens=16, **NEUTRAL)
    assert [c.token_ids for c in again] == [c.token_ids for c in unseeded]


def test_sample_ids_make_a_row_independent_of_its_place(rt):
    order = [2, 0, 3, 1]
    options = {**NEUTRAL, "seed": 4, "max_new_tokens": 12}
    straight = rt.generate(PROMPTS, sample_ids=[10, 11, 12, 13], **options)
    shuffled = rt.generate([PROMPTS[i] for i in order], sample_ids=[10 + i for i in order], **options)
    assert [c.token_ids for c in shuffled] == [straight[i].token_ids for i in order]


# --- where a response ends -------------------------------------------------------------------------------------------


def test_eos_ends_a_row_and_is_kept(rt):
    free = rt.generate(PROMPTS, do_sample=False, max_new_tokens=24)
    eos = [free[0].token_ids[5], free[2].token_ids[9]]
    for one in (eos, eos[0]):
        wanted = [one] if isinstance(one, int) else one
        for before, after in zip(
            free, rt.generate(PROMPTS, do_sample=False, max_new_tokens=24, eos_token_id=one), strict=True
        ):
            ends = [i for i, t in enumerate(before.token_ids) if t in wanted]
            stop = ends[0] + 1 if ends else 24
            assert after.token_ids == before.token_ids[:stop]
            torch.testing.assert_close(
                torch.tensor(after.logprobs), torch.tensor(before.logprobs[:stop]), atol=1e-4, rtol=0
            )
            assert after.finish_reason == ("eos" if ends else "length")


def test_eos_at_the_last_allowed_token_is_eos(rt):
    free = rt.generate(PROMPTS[:1], do_sample=False, max_new_tokens=8)[0]
    last = free.token_ids.index(free.token_ids[7]) + 1
    stopped = rt.generate(PROMPTS[:1], do_sample=False, max_new_tokens=last, eos_token_id=free.token_ids[7])[0]
    assert stopped.finish_reason == "eos"
    assert len(stopped.token_ids) == last


def test_the_models_generation_config_is_the_default():
    model, oracle = tiny_qwen2(), tiny_qwen2()
    free = hooks.greedy(oracle, PROMPTS[0], 24).token_ids
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=12,
        top_p=0.9,
        repetition_penalty=1.1,
        eos_token_id=[free[6]],
        max_new_tokens=10,
    )
    rt = Runtime(model, device="cpu")
    options = {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.1}
    drawn = rt.generate(PROMPTS, seed=0)
    for prompt, completion in zip(PROMPTS, drawn, strict=True):
        assert check(oracle, prompt, completion, {**options, "eos_token_id": [free[6]]}) == 0
        assert len(completion.token_ids) == 10 or completion.finish_reason == "eos"
    greedy = rt.generate(PROMPTS[:1], do_sample=False, repetition_penalty=1.0, max_new_tokens=24)[0]
    assert greedy.token_ids == free[: free.index(free[6]) + 1]  # keywords override, the rest stays
    base = GenerationConfig(do_sample=False, repetition_penalty=1.0, max_new_tokens=5)
    assert rt.generate(PROMPTS[:1], generation_config=base)[0].token_ids == free[:5]
    assert rt.generate(PROMPTS[:1], generation_config=base, max_new_tokens=4)[0].token_ids == free[:4]


@pytest.mark.parametrize("option", [{"temperature": 0.9}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_a_sampling_option_means_sampling(rt, option):
    assert rt.generate(PROMPTS[:1], max_new_tokens=2, **option)[0].seed is not None
    assert rt.generate(PROMPTS[:1], max_new_tokens=2, do_sample=False, **option)[0].seed is None


TEXTS = ["the thing is", "in", "on another line", "<|user|>what"]


def test_stop_strings_also_across_tokens(chat):
    """Any piece of what a row writes ends it at the token that completes the piece; the others go on."""
    options = {"max_new_tokens": 40, "seed": 1, "eos_token_id": 127, **NEUTRAL}  # 127: a token without text
    free = chat.generate(TEXTS, **options)
    decode = chat.tokenizer.decode
    longest = max((f.token_ids for f in free), key=len)
    cuts = [(6, 1), (10, 2), (20, 3), (25, 9)]
    pieces = {decode(longest[i : i + n], skip_special_tokens=True) for i, n in cuts}
    pieces |= {decode(longest[12:14])[1:], decode(free[3].token_ids[3:6])[:-1]}
    stopped = 0
    for piece in sorted(p for p in pieces if p.strip()):
        for before, after in zip(free, chat.generate(TEXTS, stop_strings=[piece, "\x00never"], **options), strict=True):
            whole = before.token_ids
            stops = [n for n in range(1, len(whole) + 1) if piece in decode(whole[:n], skip_special_tokens=True)]
            if stops:
                assert after.token_ids == whole[: stops[0]]
                assert after.finish_reason == "stop_string"
            else:
                assert (after.token_ids, after.finish_reason) == (whole, before.finish_reason)
            assert after.text == decode(after.token_ids, skip_special_tokens=True)
            stopped += bool(stops)
    assert stopped >= 5


def test_a_stop_string_is_found_across_tokens_without_text(chat):
    """Special and unknown tokens add nothing to the text, however many stand between the string's halves."""
    from icon2_rt.engine import batch

    model_choice = [*chat.tokenizer.encode("on", add_special_tokens=False), *[3, 120] * 20]
    script = iter([*model_choice, *chat.tokenizer.encode("er", add_special_tokens=False), *[9] * 20])
    with pytest.MonkeyPatch.context() as patch:
        results = batch.Batch.results
        patch.setattr(batch.Batch, "results", lambda self: [(row, next(script), 0.0) for row, *_ in results(self)])
        completion = chat.generate(["x"], do_sample=False, max_new_tokens=50, stop_strings=["oner"])[0]
    assert completion.finish_reason == "stop_string"
    assert completion.text.endswith("oner")


def test_a_stop_string_may_be_given_alone(chat):
    free = chat.generate(TEXTS[:1], do_sample=False, max_new_tokens=20)[0]
    piece = chat.tokenizer.decode(free.token_ids[5:8])
    stopped = chat.generate(TEXTS[:1], do_sample=False, max_new_tokens=20, stop_strings=piece)[0]
    assert stopped.finish_reason == "stop_string"
    assert len(stopped.token_ids) <= 8


def test_a_stop_string_in_the_prompt_does_not_stop(chat):
    free = chat.generate(["thing"], do_sample=False, max_new_tokens=10)[0]
    assert "thing" not in free.text
    assert chat.generate(["thing"], do_sample=False, max_new_tokens=10, stop_strings=["thing"])[0] == free


def test_logprobs_are_of_the_raw_logits_whatever_the_options(rt, oracle):
    options = {"temperature": 0.3, "top_k": 3, "repetition_penalty": 2.0}
    for prompt, completion in zip(PROMPTS, rt.generate(PROMPTS, max_new_tokens=12, seed=0, **options), strict=True):
        expected = hooks.teacher_forced(oracle, prompt, completion.token_ids).logprobs
        torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(expected), atol=1e-4, rtol=0)


def test_score_gives_back_the_logprobs_of_generate(rt, steering):
    for given in (None, steering, steering.with_scope("generated"), steering.with_scope("all")):
        completions = rt.generate(PROMPTS, given, max_new_tokens=12, seed=0, **NEUTRAL)
        for scores in (
            rt.score(PROMPTS, completions, given),
            rt.score(PROMPTS, [c.token_ids for c in completions], given),
        ):
            for completion, scored in zip(completions, scores, strict=True):
                assert scored.token_ids == completion.token_ids
                torch.testing.assert_close(
                    torch.tensor(scored.logprobs), torch.tensor(completion.logprobs), atol=1e-4, rtol=0
                )


# --- what a config leaves out, and the ends of responses -------------------------------------------------------------


def by_transformers(model, prompt, config: GenerationConfig, **options) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("given", [{"max_new_tokens": 24}, {"max_new_tokens": 24, "repetition_penalty": 1.0}])
def test_what_a_config_leaves_out_is_the_models_own(given):
    """Two ending tokens, a penalty and a least length of the model's; the config names none, one, or a limit alone."""
    free = hooks.greedy(tiny_llama(), PROMPTS[0], 24).token_ids
    own = {"eos_token_id": [VOCAB - 1, free[9]], "repetition_penalty": 1.2, "min_new_tokens": 3, "max_new_tokens": 7}

    def build():
        model = tiny_llama()
        model.generation_config = GenerationConfig(**own)
        return model

    rt, right = Runtime(build()), by_transformers(build(), PROMPTS[0], GenerationConfig(**given))
    assert rt.generate(PROMPTS[:1], generation_config=GenerationConfig(**given))[0].token_ids == right
    assert right != by_transformers(tiny_llama(), PROMPTS[0], GenerationConfig(**given))  # the model's own is seen


def test_a_limit_in_a_config_replaces_the_models_of_either_kind():
    model = tiny_llama()
    model.generation_config = GenerationConfig(max_new_tokens=3)
    config = GenerationConfig(max_length=len(PROMPTS[0]) + 9)
    assert len(Runtime(model).generate(PROMPTS[:1], generation_config=config)[0].token_ids) == 9


def test_a_least_length_counts_the_prompt(rt):
    """Prompts of 6, 1, 19 and 8 tokens: they may end after 10, 15, no and 8 tokens of their own."""
    ending = {"eos_token_id": list(range(0, VOCAB, 2)), "max_new_tokens": 24}
    got = rt.generate(PROMPTS, do_sample=False, min_length=16, **ending)
    for prompt, completion in zip(PROMPTS, got, strict=True):
        right = by_transformers(tiny_llama(), prompt, GenerationConfig(min_length=16, **ending))
        assert completion.token_ids == right
    free = rt.generate(PROMPTS, do_sample=False, **ending)
    assert [len(a.token_ids) > len(b.token_ids) for a, b in zip(got, free, strict=True)] == [True, True, False, True]


def test_a_limit_in_the_call_replaces_the_configs_of_either_kind(rt):
    n = len(PROMPTS[0])
    right = by_transformers(tiny_llama(), PROMPTS[0], GenerationConfig(max_length=n + 9))
    assert len(right) == 9
    for config in (GenerationConfig(max_new_tokens=3), GenerationConfig(max_length=n + 20)):
        assert rt.generate(PROMPTS[:1], generation_config=config, max_length=n + 9)[0].token_ids == right
        assert rt.generate(PROMPTS[:1], generation_config=config, max_new_tokens=9)[0].token_ids == right


@pytest.mark.parametrize("limit", [{"max_new_tokens": 1000}, {"max_length": 1000}], ids=str)
def test_a_limit_in_a_config_is_cut_to_the_room_left(limit):
    """A config is written for many prompts, and for other models: the call's own number is refused instead."""
    rt = Runtime(tiny_llama(max_position_embeddings=32), page_size=8, device="cpu")
    oracle = tiny_llama(max_position_embeddings=32)
    got = rt.generate(PROMPTS, do_sample=False, generation_config=GenerationConfig(**limit))
    for prompt, completion in zip(PROMPTS, got, strict=True):
        right = by_transformers(oracle, prompt, GenerationConfig(max_length=32))
        assert len(prompt) + len(completion.token_ids) == 32
        assert completion.token_ids == right
    if "max_new_tokens" in limit:
        with pytest.raises(ValueError, match="can be at most 26"):
            rt.generate(PROMPTS[:1], do_sample=False, **limit)


def test_the_pipelines_settings_owe_nothing_to_the_models():
    from icon2_rt.pipeline.sampling import neutral

    model = tiny_llama()
    model.generation_config = GenerationConfig(num_beams=4, min_p=0.3, min_new_tokens=9, eos_token_id=[5])
    config = neutral(temperature=0, top_p=1, max_new_tokens=12, eos_token_id=[])
    [completion] = Runtime(model).generate(PROMPTS[:1], generation_config=config)
    assert completion.token_ids == hooks.greedy(tiny_llama(), PROMPTS[0], 12).token_ids


@pytest.mark.parametrize("eos", [VOCAB, [VOCAB + 5, 40], [-1]])
def test_ending_tokens_outside_the_vocabulary_end_nothing(eos):
    """A warning in place of an error in every call: transformers waits for such a token in vain."""
    right = by_transformers(tiny_llama(), PROMPTS[0], GenerationConfig(max_new_tokens=12, eos_token_id=eos))
    model = tiny_llama()
    model.generation_config.eos_token_id = eos
    with pytest.warns(UserWarning, match="outside the vocabulary .0 to 127. and ends nothing"):
        rt = Runtime(model)
    assert rt.generate(PROMPTS[:1], max_new_tokens=12)[0].token_ids == right
    with pytest.raises(ValueError, match="eos_token_id 128 is not a token of this model"):
        rt.generate(PROMPTS[:1], eos_token_id=VOCAB)


@pytest.mark.parametrize("stop", ["<|user|>", "<|user|>t", "n<|user|>", "<|end|><|user|>"])
def test_a_stop_string_may_be_or_hold_a_special_token(chat, stop):
    """The rows' tokens are a script; where it ends is transformers' StopStringCriteria to say."""
    from transformers.generation.stopping_criteria import StopStringCriteria

    from icon2_rt.engine import batch

    text = "one two<|system|>in<|user|>the<|end|><|user|>on<|assistant|>"
    script = chat.tokenizer.encode(text, add_special_tokens=False)
    criterion = StopStringCriteria(chat.tokenizer, [stop])
    ends = [n for n in range(1, len(script)) if criterion(torch.tensor([script[:n]]), None).item()]
    tokens = iter(script)
    with pytest.MonkeyPatch.context() as patch:
        results = batch.Batch.results
        patch.setattr(batch.Batch, "results", lambda self: [(row, next(tokens), 0.0) for row, *_ in results(self)])
        [completion] = chat.generate(["x"], max_new_tokens=len(script), stop_strings=[stop], eos_token_id=127)
    assert ends and (completion.token_ids, completion.finish_reason) == (script[: ends[0]], "stop_string")
    assert "<|" not in completion.text
