"""Mistakes that were found once, each with the smallest call that shows it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from icon2_rt import Direction, Runtime, Steering, Term
from icon2_rt.engine import resolve_sampling
from icon2_rt.ops import native
from icon2_rt.steering import compile_steering
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_tokenizer

PROMPTS = random_prompts([5, 9, 17, 3, 4])
HEAD = random_prompts([20], seed=7)[0]
BACKENDS = ["reference", *(["native"] if native.why_not is None else [])]
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def runtime(tokenizer=None, **options) -> Runtime:
    return Runtime(tiny_llama(), tokenizer, **{"device": "cpu", "page_size": 8, "kv_memory": "2MiB", **options})


def direction(seed: int = 0) -> Direction:
    return Direction(f"d{seed}", random_vectors(4, 48, seed=seed))


# --- pages -----------------------------------------------------------------------------------------------------------


def test_pages_of_a_row_that_ended_in_the_step_that_failed_come_back(monkeypatch):
    tokenizer = tiny_tokenizer()
    rt = runtime(tokenizer)
    free, calls = rt.free_kv_pages, [0]

    def decode(ids, **kwargs) -> str:
        calls[0] += 1
        if calls[0] == 2:  # the first row of the step has ended by then
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(tokenizer, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        rt.generate(PROMPTS, stop_strings=["x"], do_sample=False, max_new_tokens=1)
    assert rt.free_kv_pages == free


def test_a_stream_outlives_the_prefix_that_it_began_in():
    rt = runtime(max_rows=2)
    expected = rt.generate([HEAD + p for p in PROMPTS], **GREEDY)
    free = rt.free_kv_pages
    with rt.prefix(HEAD) as prefix:
        stream = rt.stream_pairs(PROMPTS, positive=None, negative=None, prefix=prefix, **GREEDY)
        pairs = [next(stream)]
    rt.generate(random_prompts([30, 31], seed=3), **GREEDY)  # takes and writes whatever pages are free
    pairs += list(stream)
    assert [pair.positive.token_ids for pair in pairs] == [c.token_ids for c in expected]
    assert rt.free_kv_pages == free


def test_a_stream_cannot_begin_after_its_prefix_was_left():
    rt = runtime()
    free = rt.free_kv_pages
    with rt.prefix(HEAD) as prefix:
        stream = rt.stream_pairs(PROMPTS, positive=None, negative=None, prefix=prefix, **GREEDY)
    with rt.prefix(HEAD), pytest.raises(RuntimeError, match="prefix"):
        next(stream)
    assert rt.free_kv_pages == free


def test_a_prefix_is_entered_once_at_a_time():
    rt = runtime()
    free = rt.free_kv_pages
    with rt.prefix(HEAD) as prefix, pytest.raises(RuntimeError, match="already"):
        prefix.__enter__()
    with prefix:  # but again later
        assert rt.free_kv_pages == free - 3
    assert rt.free_kv_pages == free


def test_a_prefix_works_only_where_it_was_made():
    rt, other = runtime(), runtime()
    with other.prefix(HEAD) as prefix:
        for call in (rt.generate, rt.hidden_states):
            with pytest.raises(ValueError, match="another runtime"):
                call(PROMPTS, prefix=prefix)
    with pytest.raises(TypeError, match="prefix"):
        rt.generate(PROMPTS, prefix=HEAD)


def test_one_text_after_a_prefix_is_not_a_prompt_per_character():
    rt = runtime(tiny_tokenizer())
    with rt.prefix("the") as prefix, pytest.raises(TypeError, match="list"):
        rt.generate("thing", prefix=prefix, **GREEDY)


# --- steering as a value ---------------------------------------------------------------------------------------------


def test_an_array_from_the_left_is_one_strength_per_block():
    steering = np.array([0.0, 1.0, 2.0, 0.0]) * direction()
    assert isinstance(steering, Steering)
    assert steering.layers == [1, 2]


@pytest.mark.parametrize(
    "half", [0.5, np.float32(0.5), torch.tensor(0.5), Fraction(1, 2)], ids=lambda v: type(v).__name__
)
def test_every_kind_of_number_scales_a_direction_and_a_steering(half):
    d = direction()
    for steering in (half * d, d * half, half * (1.0 * d), (1.0 * d) * half):
        assert torch.equal(steering.terms[0].alpha, 0.5 * d.scale)


@pytest.mark.parametrize("mask", [True, [True, False, True, False], np.array([True, False, True, False])], ids=str)
def test_a_mask_is_not_a_list_of_blocks(mask):
    with pytest.raises(IndexError, match="True"):
        direction()[mask]


def test_arrays_and_tensors_select_blocks():
    assert direction()[np.array([1, -1])].layers == direction()[torch.tensor([1, 3])].layers == [1, 3]


def test_a_bare_direction_takes_the_scope_of_the_sum_that_it_joins():
    a, b = direction(0), direction(1)
    whole = (1.0 * a).with_scope("all").with_keep_norm()
    for steering in (whole + b, whole - b, b + whole, b - whole):
        assert (steering.scope, steering.keep_norm) == ("all", True)
    signs = [float((t.alpha / t.direction.scale)[0]) for t in (b - whole).terms]
    assert signs == [1.0, -1.0]


def test_a_direction_is_not_a_list_of_directions():
    with pytest.raises(TypeError):
        list(direction())
    with pytest.raises(TypeError, match="direction"):
        runtime().project(PROMPTS, direction())


def test_coefficients_that_overflow_or_have_another_shape_raise():
    with pytest.raises(ValueError, match="infinity"):
        (1e30 * direction()) * 1e30
    with pytest.raises(ValueError, match="per block"):
        Term(direction(), torch.zeros(3), torch.zeros(4))


def test_vectors_that_were_written_to_are_not_taken_for_what_they_were():
    d = direction()
    compile_steering(1.0 * d, 4, 48)
    d.vectors.copy_(direction(1).vectors)
    [written] = compile_steering(1.0 * d, 4, 48).keys
    [other] = compile_steering(1.0 * direction(1), 4, 48).keys
    assert written == other


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_model_is_taken_over_once():
    model = tiny_llama()
    Runtime(model, device="cpu", kv_memory="1MiB")
    with pytest.raises(ValueError, match="keep_model"):
        Runtime(model, device="cpu", kv_memory="1MiB")


def test_weights_of_several_dtypes_are_refused():
    model = tiny_llama().to(torch.bfloat16)
    model.lm_head.float()
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        Runtime(model, device="cpu")


class Adapter(torch.nn.Module):
    """What a LoRA library puts in a projection's place: the weight looks like the original's."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base_layer, self.lora_A = base, torch.nn.Linear(48, 4)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight


def test_an_adapter_or_a_bias_is_not_left_out_silently():
    adapted, biased = tiny_llama(), tiny_llama()
    adapted.model.layers[1].self_attn.q_proj = Adapter(adapted.model.layers[1].self_attn.q_proj)
    biased.model.layers[2].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(48))
    for model, says in ((adapted, "merge_and_unload"), (biased, r"layers\.2\.mlp\.down_proj\.bias")):
        with pytest.raises(ValueError, match=says):
            Runtime(model, device="cpu")


# --- sampling options ------------------------------------------------------------------------------------------------


def test_fields_that_transformers_does_not_know_are_no_reason_to_refuse():
    config = GenerationConfig(chat_format="chatml", max_window_size=6144)
    assert resolve_sampling(config, {}, vocab_size=128) == resolve_sampling(None, {}, vocab_size=128)


def test_an_option_of_none_is_not_given():
    assert resolve_sampling(None, {"temperature": 0.5, "do_sample": None}, vocab_size=128).do_sample


def test_numpy_numbers_are_options():
    options = {"temperature": np.float32(0.5), "max_new_tokens": np.int64(3), "eos_token_id": np.array([3, 4])}
    resolved = resolve_sampling(None, options, vocab_size=128)
    assert (resolved.temperature, resolved.max_new_tokens, resolved.eos_token_ids) == (0.5, 3, (3, 4))


def test_the_coldest_temperature_is_greedy_and_colder_is_refused():
    rt = runtime()
    cold = rt.generate(PROMPTS, temperature=1e-30, seed=0, max_new_tokens=4)
    assert [c.token_ids for c in cold] == [c.token_ids for c in rt.generate(PROMPTS, do_sample=False, max_new_tokens=4)]
    for colder in (0, 1e-38, 1e-46):
        with pytest.raises(ValueError, match="temperature"):
            rt.generate(PROMPTS, temperature=colder)


def test_top_k_may_be_any_whole_number():
    assert resolve_sampling(None, {"top_k": 10**20}, vocab_size=128).top_k == 128


# --- what surrounds a call -------------------------------------------------------------------------------------------


def every_call(rt: Runtime, d: Direction) -> list:
    pair = rt.generate_pairs(PROMPTS, positive=(2.0 * d).with_scope("all"), negative=None, **GREEDY)
    sampled = rt.generate(PROMPTS, temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=3, max_new_tokens=4)
    scored = rt.score(PROMPTS, PROMPTS, 1.0 * d[1:3])
    states, dots = rt.hidden_states(PROMPTS), rt.project(PROMPTS, [d[1:3]])
    extracted = rt.extract_direction(PROMPTS[:2], PROMPTS[2:4], "x").vectors
    return [pair, sampled, scored, states.tolist(), dots.tolist(), extracted.tolist()]


@contextmanager
def default(setting) -> Iterator[None]:
    """torch's default dtype or device, for a while."""
    if isinstance(setting, torch.dtype):
        torch.set_default_dtype(setting)
    else:
        torch.set_default_device(setting)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "surroundings",
    [
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: default(torch.float64),
        lambda: default(torch.bfloat16),
        lambda: default("meta"),  # stands for a GPU that is the default while the model is elsewhere
    ],
    ids=["inference_mode", "enable_grad", "autocast", "float64", "bfloat16", "device"],
)
def test_what_the_caller_has_set_in_torch_does_not_matter(surroundings):
    rt, d = runtime(), direction()
    expected = every_call(rt, d)
    with surroundings():
        assert every_call(rt, d) == expected
        assert (0.5 * d[1:]).terms[0].alpha.dtype == d.ablated().terms[0].alpha.dtype == torch.float32
    with torch.inference_mode():
        made_inside = runtime()
    assert every_call(made_inside, d) == expected


# --- arguments -------------------------------------------------------------------------------------------------------


def test_numpy_and_torch_whole_numbers_are_tokens_seeds_and_sample_ids():
    rt = runtime()
    options = {"temperature": 1.0, "max_new_tokens": 4}
    [expected] = rt.generate(PROMPTS[:1], seed=[7], **options)
    for prompt in ([np.int64(t) for t in PROMPTS[0]], np.array(PROMPTS[0]), torch.tensor(PROMPTS[0])):
        for seed in ([np.uint64(7)], np.array([7]), torch.tensor([7])):
            assert rt.generate([prompt], seed=seed, **options) == [expected]
    assert rt.generate(PROMPTS, seed=np.int64(5), sample_ids=np.arange(5), **options) == rt.generate(
        PROMPTS, seed=5, **options
    )


@pytest.mark.parametrize("call", ["generate", "hidden_states"])
def test_no_list_of_prompts_is_refused_by_name(call):
    for bad in (None, 3, (p for p in PROMPTS)):
        with pytest.raises(TypeError, match="prompts"):
            getattr(runtime(), call)(bad)


def test_a_chat_that_the_template_refuses_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"prompts\[0\].*roles must alternate"):
        runtime(tokenizer).generate([[{"role": "user", "content": "the"}]])


def test_prompts_may_change_while_a_stream_is_open():
    rt, prompts = runtime(max_rows=2), [list(p) for p in PROMPTS]
    stream = rt.stream_pairs(prompts, positive=None, negative=None, **GREEDY)
    next(stream)
    prompts.clear()
    assert [pair.prompt for pair in stream] == PROMPTS[1:]


@pytest.mark.parametrize("device", ["cuda:99", "meta", "mps", "banana"])
def test_a_device_that_is_not_there_leaves_the_model_alone(device):
    model = tiny_llama()
    with pytest.raises(ValueError, match="device"):
        Runtime(model, device=device)
    assert all(parameter.numel() for parameter in model.parameters())


def test_what_is_missing_is_told_before_the_weights_are_read(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights read"))
    with pytest.raises(ValueError, match=r"Runtime\(model\)"):
        Runtime.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_rows"):
        Runtime.from_pretrained(tmp_path, tokenizer=tiny_tokenizer(), max_rows=0)


def test_an_error_names_the_argument_of_the_call():
    rt, bad = runtime(), direction()
    for name, call in {
        "steering": lambda: rt.generate(PROMPTS, bad),
        "positive": lambda: rt.generate_pairs(PROMPTS, positive=bad, negative=None),
        "negative": lambda: rt.stream_pairs(PROMPTS, positive=None, negative=[None]),
        r"branches\[1\]": lambda: rt.generate_branches(PROMPTS, [None, bad]),
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["response", "generated", "all"])
def test_a_row_whose_logits_are_not_finite_ends_alone(backend, scope):
    """Its neighbours give what they give without it, then and in later calls on the same pages."""
    rt = Runtime(tiny_llama().to(torch.float16), device="cpu", backend=backend, page_size=8, kv_memory="64KiB")
    free, strong = rt.free_kv_pages, (1e6 * direction()).with_scope(scope)
    alone = [c.token_ids for c in rt.generate(PROMPTS, **GREEDY)]
    with pytest.warns(RuntimeWarning, match=r"prompts\[2\], branch 1: the logits of token \d+ .* too strong"):
        outputs = rt.generate_branches(PROMPTS, [None, [None, None, strong, None, None]], **GREEDY)
    rows = [completion for output in outputs for completion in output.branches]
    bad = rows.pop(5)
    assert bad.finish_reason == "error" and bad.token_ids == alone[2][: scope == "generated"]
    assert len(bad.logprobs) == len(bad.token_ids) and not any(map(math.isnan, bad.logprobs))
    assert [row.token_ids for row in rows] == [ids for n, ids in enumerate(alone) for _ in range(1 + (n != 2))]
    assert {row.finish_reason for row in rows} == {"length"}
    assert rt.free_kv_pages == free
    with pytest.warns(RuntimeWarning, match="not finite"):
        pair = next(rt.stream_pairs(PROMPTS[2:3], positive=None, negative=strong, **GREEDY))
    assert (pair.positive.finish_reason, pair.negative.finish_reason) == ("length", "error")
    with pytest.raises(ValueError, match="the negative branch of pair 0 ended with an error"):
        dataclasses.replace(pair, prompt="x", positive=dataclasses.replace(pair.positive, text="a")).to_preference()
    [scored] = rt.score(PROMPTS[:1], [alone[0]], strong)
    assert math.isnan(scored.logprobs[-1])
    for _ in range(3):  # as many tokens as there are places: on every page
        assert [c.token_ids for c in rt.generate(PROMPTS, **GREEDY)] == alone


def test_a_pool_larger_than_the_machine_is_refused_while_the_model_is_whole():
    model = tiny_llama()
    with pytest.raises(ValueError, match="more than cpu has in all"):
        Runtime(model, device="cpu", kv_memory=10**18)
    assert all(p.numel() for p in model.parameters())
