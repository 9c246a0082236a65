"""What is refused, before any work starts, in words that name the argument, the value and what would be right."""

from __future__ import annotations

import warnings

import pytest
import torch

from icon2_rt import Direction, Runtime
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_qwen2, tiny_tokenizer

PROMPTS = random_prompts([4, 6, 3])


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return Runtime(tiny_llama(max_position_embeddings=64), page_size=8, max_terms=3, max_directions=6, device="cpu")


@pytest.fixture(scope="module")
def chat() -> Runtime:
    return Runtime(tiny_llama(), tiny_tokenizer(), page_size=8, device="cpu")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(rt):
    """Whatever was refused: every page is free again and the runtime works."""
    free = rt.free_kv_pages
    yield
    assert rt.free_kv_pages == free == rt.kv_pages
    assert len(rt.generate(PROMPTS[:1], do_sample=False, max_new_tokens=2)[0].token_ids) == 2


def direction(seed: int = 0, n_layers: int = 4, hidden: int = 48) -> Direction:
    return Direction(f"d{seed}", random_vectors(n_layers, hidden, seed=seed), torch.ones(n_layers))


# --- prompts ---------------------------------------------------------------------------------------------------------


def every_call(rt: Runtime, prompts) -> list:
    """The same prompts through everything that takes prompts."""
    a = direction()
    return [
        lambda: rt.generate(prompts, max_new_tokens=2),
        lambda: rt.generate_branches(prompts, [None, 0.1 * a], max_new_tokens=2),
        lambda: rt.generate_pairs(prompts, positive=0.1 * a, negative=None, max_new_tokens=2),
        lambda: list(rt.stream_pairs(prompts, positive=0.1 * a, negative=None, max_new_tokens=2)),
        lambda: rt.hidden_states(prompts),
        lambda: rt.project(prompts, [a]),
        lambda: rt.score(prompts, [[1]] * (len(prompts) if isinstance(prompts, list) else 1)),
    ]


@pytest.mark.parametrize(
    "prompt", ["the thing", [{"role": "user", "content": "the"}], [1, 2, 3]], ids=["str", "chat", "ids"]
)
def test_one_prompt_that_is_not_in_a_list_raises_with_the_corrected_call(chat, prompt):
    for call in every_call(chat, prompt):
        with pytest.raises((TypeError, ValueError), match=r"\["):
            call()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([], "empty"),
        ([1, 128], "128"),
        ([1, -1], "-1"),
        ([1.5], "1.5"),
        ([True, 2], "True"),
        (list(range(65)), "6[45]"),
        (None, "None"),
        (7, "int"),
        ("the thing", "tokenizer"),
        ([{"role": "user", "content": "the"}], "tokenizer"),
        ([1, "the"], "the"),
        (torch.tensor([[1, 2]]), ""),
    ],
    ids=lambda v: str(v)[:20],
)
def test_a_bad_prompt_is_named_by_its_index(rt, bad, says):
    for call in every_call(rt, [PROMPTS[0], PROMPTS[1], bad]):
        with pytest.raises(
            (ValueError, TypeError), match=rf"(?s)prompts?\D{{0,3}}2.*{says}|{says}.*prompts?\D{{0,3}}2"
        ):
            call()


def test_no_prompts_give_no_results(rt):
    a = direction()
    assert rt.generate([], max_new_tokens=2) == []
    assert rt.generate_branches([], [None, 0.1 * a], max_new_tokens=2) == []
    assert rt.generate_pairs([], positive=0.1 * a, negative=None, max_new_tokens=2) == []
    assert list(rt.stream_pairs([], positive=0.1 * a, negative=None, max_new_tokens=2)) == []
    assert rt.score([], []) == []
    assert rt.hidden_states([]).shape == (0, 4, 48)
    assert rt.project([], [a, a]).shape == (0, 2, 4)


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_text(chat, text):
    """No token at all is refused; a blank is a token like any other."""
    if chat.tokenizer(text).input_ids:
        assert len(chat.generate([text], max_new_tokens=2, do_sample=False)[0].token_ids) == 2
        return
    with pytest.raises(ValueError, match="empty"):
        chat.generate([text], max_new_tokens=2)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "x"}, "y"],
        [{}],
    ],
    ids=str,
)
def test_malformed_messages_raise(chat, messages):
    with pytest.raises((ValueError, TypeError), match=r"message|prompt"):
        chat.generate([messages], max_new_tokens=2)


def test_prompt_and_response_must_fit_the_model(rt):
    prompt = random_prompts([60])[0]
    assert len(rt.generate([prompt], do_sample=False, max_new_tokens=4)[0].token_ids) == 4
    with pytest.raises(ValueError, match=r"(?s)60.*5.*64|64.*60.*5|60.*64"):
        rt.generate([prompt], do_sample=False, max_new_tokens=5)
    with pytest.raises(ValueError, match="64"):
        rt.score([prompt], [list(range(6))])
    full = random_prompts([64])[0]
    assert rt.hidden_states([full]).shape == (1, 4, 48)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"max_tokens": 5}, "max_new_tokens"),
        ({"temprature": 0.5}, "temperature"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.2}, "top_p"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 4}, "min_new_tokens"),
        ({"eos_token_id": 128}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": [3, "x"]}, "eos_token_id"),
        ({"num_beams": 4}, "num_beams"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"typical_p": 0.5, "do_sample": True}, "typical_p"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"suppress_tokens": [3]}, "suppress_tokens"),
        ({"stop_strings": ["x"]}, "tokenizer"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": [1, 2]}, "seed"),
        ({"seed": [1, 2, "x"]}, "seed"),
        ({"seed": [1, 2, -5]}, "seed"),
        ({"noise": "correlated"}, "noise"),
        ({"sample_ids": [1, 2]}, "sample_ids"),
        ({"sample_ids": [1, 2, -1]}, "sample"),
        ({"sample_ids": 3}, "sample_ids"),
        ({"generation_config": {"temperature": 0.5}}, "generation_config"),
        ({"prefix": [1, 2, 3]}, "prefix"),
        ({"steering": "honesty"}, "steering"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_a_bad_option_is_named(rt, options, names):
    with pytest.raises((ValueError, TypeError), match=names):
        rt.generate(PROMPTS, **{"max_new_tokens": 4, "do_sample": True, **options})


@pytest.mark.parametrize("stop", [[""], [3], ""])
def test_bad_stop_strings_raise(chat, stop):
    with pytest.raises((ValueError, TypeError), match="stop_strings"):
        chat.generate(["the"], stop_strings=[stop] if stop == "" else stop, max_new_tokens=4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"use_cache": True},
        {"pad_token_id": 0},
        {"typical_p": 1.0},
        {"no_repeat_ngram_size": 0},
        {"top_k": None},
        {"repetition_penalty": 1.0},
        {"num_return_sequences": 1},
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_taken(rt, options):
    plain = rt.generate(PROMPTS, do_sample=False, max_new_tokens=4)
    assert rt.generate(PROMPTS, **{"do_sample": False, "max_new_tokens": 4, **options}) == plain


# --- steerings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steering", "says"),
    [
        (direction(), "0.1"),
        (0.1, "Steering"),
        ([0.1 * direction()] * 2, "2.*3|3.*2"),
        ([0.1 * direction(), None, "honesty"], "honesty|str"),
        (0.1 * direction(n_layers=3), "blocks"),
        (0.1 * direction(hidden=32), "32"),
        ([None, None, 0.1 * direction(n_layers=5)], "blocks"),
        (sum(0.1 * direction(i) for i in range(4)), "max_terms"),
        ([0.1 * direction(i) + 0.1 * direction(i + 3) + 0.1 * direction(i + 6) for i in range(3)], "max_directions"),
    ],
    ids=["direction", "number", "two for three", "str", "blocks", "hidden", "blocks in a list", "terms", "bank"],
)
def test_a_bad_steering_is_named(rt, steering, says):
    calls = [
        lambda: rt.generate(PROMPTS, steering, max_new_tokens=2),
        lambda: rt.score(PROMPTS, [[1]] * 3, steering),
        lambda: rt.generate_pairs(PROMPTS, positive=steering, negative=None, max_new_tokens=2),
        lambda: rt.generate_branches(PROMPTS, [None, steering], max_new_tokens=2),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError), match=f"(?s){says}"):
            call()


def test_as_many_terms_and_directions_as_were_asked_for_fit(rt):
    """The bank is reused: six directions at a time, more over a life, whatever the call."""
    roomy = Runtime(tiny_llama(max_position_embeddings=64), page_size=8, max_directions=64, device="cpu")
    options = {"do_sample": False, "max_new_tokens": 4}
    steerings = [sum(4.0 * direction(i + j) for j in range(3)) for i in (0, 3)]
    for _ in range(3):
        assert rt.generate(PROMPTS[:2], steerings, **options) == roomy.generate(PROMPTS[:2], steerings, **options)
    for i in range(12):
        steering = 4.0 * direction(100 + i)
        assert rt.generate(PROMPTS[:1], steering, **options) == roomy.generate(PROMPTS[:1], steering, **options)
    unsteered = rt.score(PROMPTS[:1], [[3, 4]])
    for i in range(12):
        steering = 4.0 * direction(200 + i)
        scored = rt.score(PROMPTS[:1], [[3, 4]], steering)
        assert scored == roomy.score(PROMPTS[:1], [[3, 4]], steering) != unsteered


def test_branches_must_be_a_list_with_something_in_it(rt):
    for bad in ([], None, 0.1 * direction(), [[None, None]], [[None] * 4]):
        with pytest.raises((ValueError, TypeError), match="branch"):
            rt.generate_branches(PROMPTS, bad, max_new_tokens=2)


def test_a_direction_of_another_model_warns_once(rt):
    foreign = Direction(
        "foreign", random_vectors(4, 48, seed=0), torch.ones(4), model="0" * 16, model_name="other/model"
    )
    own = Direction("own", random_vectors(4, 48, seed=1), torch.ones(4), model=rt.fingerprint)
    with pytest.warns(UserWarning, match="foreign"):
        rt.generate(PROMPTS, 0.1 * foreign, max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rt.generate(PROMPTS, 0.1 * foreign, max_new_tokens=2)
        rt.generate(PROMPTS, 0.1 * own, max_new_tokens=2)


def test_each_direction_of_another_model_is_named_in_a_warning_of_its_own(rt):
    foreign = [
        Direction(name, random_vectors(4, 48, seed=n), torch.ones(4), model="2-" + "1" * 16, model_name="other/model")
        for n, name in enumerate(("one", "two"))
    ]
    with pytest.warns(UserWarning, match="made on another model") as told:
        rt.generate(PROMPTS[:1], 0.1 * foreign[0] + 0.1 * foreign[1], max_new_tokens=2)
    assert [str(w.message).split()[1] for w in told] == ["'one'", "'two'"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rt.project(PROMPTS[:1], foreign)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completions",
    [[[1], [2]], [[1], [2], [128]], [[1], [2], [-1]], [[1], [2], "text"], [[1], [2], None], "abc", [1, 2, 3]],
    ids=str,
)
def test_bad_completions_raise(rt, completions):
    with pytest.raises((ValueError, TypeError), match="completion"):
        rt.score(PROMPTS, completions)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"negative": PROMPTS[:2]}, "3 positive and 2 negative.*method='mean_difference' takes lists"),
        ({"negative": PROMPTS[:1], "method": "mean_difference"}, "at least 2 prompts on each side, not 3 and 1"),
        ({"negative": PROMPTS[:1] * 2, "positive": PROMPTS[:1] * 3, "method": "mean_difference"}, "are they equal"),
        ({"positive": [], "negative": []}, "empty|pair"),
        ({"positive": PROMPTS[:1], "negative": PROMPTS[1:2]}, "at least 2"),
        ({"positive": PROMPTS, "negative": PROMPTS}, "equal"),
        ({"method": "lda"}, "pca"),
        ({"name": ""}, "name"),
        ({"negative": [PROMPTS[0], [], PROMPTS[1]]}, r"negative\[1\]"),
    ],
    ids=str,
)
def test_bad_arguments_of_extract_direction_raise(rt, change, says):
    arguments = {"positive": PROMPTS, "negative": random_prompts([4, 6, 3], seed=1), "name": "x", **change}
    with pytest.raises(ValueError, match=f"(?s){says}"):
        rt.extract_direction(**arguments)


@pytest.mark.parametrize(
    "directions",
    [[direction(n_layers=3)], [direction(hidden=16)], ["honesty"], [], 3],
    ids=["blocks", "hidden", "str", "none", "int"],
)
def test_bad_directions_for_project_raise(rt, directions):
    with pytest.raises((ValueError, TypeError), match="direction"):
        rt.project(PROMPTS, directions)


# --- making a runtime ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "gpu"}, "device"),
        ({"backend": "fast"}, "backend"),
        ({"page_size": 0}, "page_size"),
        ({"page_size": 3.5}, "page_size"),
        ({"max_rows": 0}, "max_rows"),
        ({"max_terms": 0}, "max_terms"),
        ({"max_directions": 0}, "max_directions"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"kv_memory": 0}, "kv_memory"),
        ({"kv_memory": -5}, "kv_memory"),
        ({"kv_memory": "lots"}, "kv_memory"),
        ({"kv_memory": 100}, "kv_memory"),
    ],
    ids=str,
)
def test_bad_runtime_options_raise_and_leave_the_model_alone(options, says):
    model = tiny_llama()
    with pytest.raises((ValueError, TypeError), match=says):
        Runtime(model, **{"device": "cpu", **options})
    assert sum(p.numel() for p in model.parameters()) > 0


def test_what_is_not_a_supported_model_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(ValueError, match=r"(?s)GPT2LMHeadModel.*Llama"):
        Runtime(gpt2)
    with pytest.raises((TypeError, ValueError), match="model"):
        Runtime("path/to/model")
    with pytest.raises((TypeError, ValueError), match="LlamaModel"):
        Runtime(tiny_llama().model)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: tiny_llama(attention_bias=True), "attention_bias"),
        (lambda: tiny_llama(mlp_bias=True), "mlp_bias"),
        (lambda: tiny_llama(hidden_act="gelu"), "hidden_act"),
        (lambda: tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (lambda: tiny_llama().double(), "float64"),
    ],
    ids=["attention_bias", "mlp_bias", "gelu", "dynamic rope", "fp64"],
)
def test_a_config_that_would_be_computed_wrongly_is_refused(build, says):
    with pytest.raises(ValueError, match=says):
        Runtime(build(), device="cpu")


def test_a_qwen2_with_a_sliding_window_is_refused_beyond_it():
    model = tiny_qwen2(use_sliding_window=True, sliding_window=16, max_window_layers=2)
    rt = Runtime(model, device="cpu")
    with pytest.raises(ValueError, match="16"):
        rt.generate([random_prompts([20])[0]], max_new_tokens=2)


def test_a_path_without_a_model_raises(tmp_path):
    with pytest.raises((OSError, ValueError)):
        Runtime.from_pretrained(str(tmp_path))
