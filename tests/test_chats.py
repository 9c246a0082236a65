"""Chats as the model's own template renders them: begun answers, template variables, first spaces. The oracle is
transformers: ``apply_chat_template`` and the tokenizer's decoding of prompt and response together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from icon2_rt import Direction, Runtime
from tests.models import CHAT_TEMPLATE, random_vectors, tiny_llama, tiny_tokenizer
from tests.sentencepiece import BARE_TEMPLATE, INST_TEMPLATE, UNTRIMMED, space_tokenizer

USER = {"role": "user", "content": "the thing"}
BEGUN = [USER, {"role": "assistant", "content": "the other"}]
PUSH = 4.0 * Direction("a", random_vectors(4, 48, seed=0))
THINKING = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "(no thought){% endif %}{{ mood }}{% endif %}"
)


def runtime(tokenizer: Any) -> Runtime:
    return Runtime(tiny_llama(eos_token_id=1), tokenizer, device="cpu")


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return runtime(tiny_tokenizer())


# --- a chat that ends with a message of the assistant ----------------------------------------------------------------


TRIMMING = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
CLOSING_LAST = CHAT_TEMPLATE.replace(
    "<|end|>{% endfor %}", "{{ '<|end|>' if not loop.last else '<|end|>\\n' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TRIMMING, CLOSING_LAST])
@pytest.mark.parametrize("begun", ["the other", "the other ", "", "(", " the"])
def test_a_begun_answer_is_continued_as_in_transformers(template: str, begun: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    chat = [USER, {"role": "assistant", "content": begun}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert runtime(tokenizer).encode(chat) == tokenizer.encode(text, add_special_tokens=False)


def test_whatever_reads_a_chat_continues_it(rt: Runtime) -> None:
    ids = rt.tokenizer.apply_chat_template(BEGUN, continue_final_message=True, return_dict=False)  # type: ignore[union-attr]
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert rt.generate([BEGUN], **greedy)[0].token_ids == rt.generate([ids], **greedy)[0].token_ids
    assert torch.equal(rt.hidden_states([BEGUN]), rt.hidden_states([ids]))
    assert rt.score([BEGUN], [[40, 41]]) == rt.score([ids], [[40, 41]])
    with rt.prefix([USER]) as prefix:
        [joined] = prefix.join_all([BEGUN[1:]])
    assert joined == ids


def test_a_begun_answer_is_the_beginning_of_both_responses_in_the_record(rt: Runtime) -> None:
    [pair] = rt.generate_pairs([BEGUN], positive=PUSH, negative=None, max_new_tokens=5, seed=0, top_k=0)
    record = pair.to_preference()
    assert record["prompt"] == [USER]
    for side, completion in (("chosen", pair.positive), ("rejected", pair.negative)):
        assert record[side] == [{"role": "assistant", "content": "the other" + completion.text}]
        whole = rt.tokenizer.apply_chat_template([*record["prompt"], *record[side]], return_dict=False)  # type: ignore[union-attr]
        written = rt.tokenizer.decode([*rt.encode(BEGUN), *completion.token_ids])  # type: ignore[union-attr]
        assert rt.tokenizer.decode(whole).startswith(written.removesuffix("<|end|>"))  # type: ignore[union-attr]


def test_a_begun_answer_whose_last_space_is_trimmed_is_continued_where_the_tokens_were() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TRIMMING
    chat = [USER, {"role": "assistant", "content": "the other "}]
    rt = runtime(tokenizer)
    ids = tokenizer.encode(" the", add_special_tokens=False)
    assert rt.message(chat, ids) == "the other the"


def test_a_template_that_drops_the_begun_answer_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("for m in messages", "for m in messages if m.role != 'assistant'")
    with pytest.raises(ValueError, match=r"prompts\[0\]: the chat template refuses this chat"):
        runtime(tokenizer).generate([BEGUN], max_new_tokens=1)


# --- template variables ----------------------------------------------------------------------------------------------


def test_variables_of_the_template_reach_it_wherever_a_chat_is_rendered() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    rt = runtime(tokenizer)
    variables = {"enable_thinking": False, "mood": "glad"}
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, **variables)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert text.endswith("(no thought)glad") and rt.encode([USER]) != ids
    assert rt.encode([USER], chat_template_kwargs=variables) == ids
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    [expected] = rt.generate([ids], PUSH, **options)
    assert rt.generate([[USER]], PUSH, chat_template_kwargs=variables, **options)[0].token_ids == expected.token_ids
    [branched] = rt.generate_branches([[USER]], [PUSH], chat_template_kwargs=variables, **options)
    [pair] = rt.generate_pairs([[USER]], positive=PUSH, negative=None, chat_template_kwargs=variables, **options)
    assert branched.branches[0].token_ids == pair.positive.token_ids == expected.token_ids
    assert pair.to_preference()["chat_template_kwargs"] == variables  # where TRL's trainers look for them
    assert torch.equal(rt.hidden_states([[USER]], chat_template_kwargs=variables), rt.hidden_states([ids]))
    directions = [Direction("a", random_vectors(4, 48, seed=0))]
    assert torch.equal(rt.project([[USER]], directions, chat_template_kwargs=variables), rt.project([ids], directions))
    assert rt.score([[USER]], ["the"], chat_template_kwargs=variables) == rt.score([ids], ["the"])
    with rt.prefix([USER], chat_template_kwargs={"mood": "glad"}) as prefix:
        [joined] = prefix.join_all([[USER]], {"enable_thinking": False})
    rendered = tokenizer.apply_chat_template([USER, USER], tokenize=False, add_generation_prompt=True, **variables)
    assert joined == tokenizer.encode(rendered, add_special_tokens=False)
    pairs = [[[USER], [{"role": "user", "content": "that"}]], [[{"role": "user", "content": c}] for c in "xy"]]
    made = rt.extract_direction(*pairs, name="a", chat_template_kwargs=variables)
    by_ids = rt.extract_direction(
        *[[rt.encode(chat, chat_template_kwargs=variables) for chat in side] for side in pairs], name="a"
    )
    assert torch.equal(made.vectors, by_ids.vectors)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"enable_thinkin": False}, r"chat_template_kwargs: .* does not read .*did you mean 'enable_thinking'"),
        ({"tokenize": True}, "'tokenize' is no variable of a chat template"),
        ({"add_generation_prompt": True}, "no variable of a chat template"),
        ([1], "chat_template_kwargs: .* are a dict"),
    ],
)
def test_variables_that_the_template_does_not_read_are_refused(variables: Any, message: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    with pytest.raises((ValueError, TypeError), match=message):
        runtime(tokenizer).generate([[USER]], chat_template_kwargs=variables, max_new_tokens=1)


# --- the first space of a response -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["metaspace", "legacy"])
def spaced(request: pytest.FixtureRequest) -> Runtime:
    return runtime(space_tokenizer(request.param))


def _ids(rt: Runtime, *tokens: str) -> list[int]:
    return rt.tokenizer.convert_tokens_to_ids(list(tokens))  # type: ignore[union-attr,return-value]


@pytest.mark.parametrize("tokens", [("▁the", "n"), ("t", "h"), ("▁", "x"), ("\n", "▁the"), ("▁a", "<|end|>")])
def test_a_response_reads_as_it_does_behind_its_prompt(spaced: Runtime, tokens: tuple[str, ...]) -> None:
    decode = spaced.tokenizer.decode  # type: ignore[union-attr]
    response = _ids(spaced, *tokens)
    for prompt in ("what is", [7, 40, 41], [USER], BEGUN, "x" * 100):
        ids = spaced.encode(prompt)
        whole = decode([*ids, *response], skip_special_tokens=True)
        assert decode(ids, skip_special_tokens=True) + spaced.decode(response, prompt) == whole


def test_completions_and_records_of_text_prompts_keep_the_first_space(spaced: Runtime) -> None:
    decode = spaced.tokenizer.decode  # type: ignore[union-attr]
    prompts = [f"the {a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": 4.0, "top_k": 0, "seed": 1}
    pairs = spaced.generate_pairs(prompts, positive=PUSH, negative=None, **options)
    spaces = 0
    for pair in pairs:
        ids, record = spaced.encode(pair.prompt), pair.to_preference()
        for side, completion in (("chosen", pair.positive), ("rejected", pair.negative)):
            assert record["prompt"] + record[side] == decode([*ids, *completion.token_ids], skip_special_tokens=True)
            assert record[side] == completion.text
            spaces += completion.text.startswith(" ")  # type: ignore[union-attr]
    assert spaces  # else nothing was tried


def test_a_stop_string_may_begin_with_the_first_space(spaced: Runtime) -> None:
    options: dict[str, Any] = {"temperature": 4.0, "top_k": 0, "seed": 1}
    prompts = [f"the {a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    free = spaced.generate(prompts, max_new_tokens=6, **options)
    n = next(n for n, c in enumerate(free) if (c.text or "").startswith(" ") and len(c.text or "") > 1)
    stop = (free[n].text or "")[:2]  # the space and a letter, which are one token or two
    stopped = spaced.generate(prompts, max_new_tokens=6, stop_strings=[stop], **options)[n]
    assert stopped.finish_reason == "stop_string" and len(stopped.token_ids) <= 2
    # The end of the prompt is no part of the response, whatever it would make of it.
    across = prompts[n][-1] + stop
    options["seed"] = [free[n].seed]
    [plain] = spaced.generate([prompts[n]], max_new_tokens=len(stopped.token_ids), stop_strings=[across], **options)
    assert plain.token_ids == stopped.token_ids and plain.finish_reason == "length"


def test_a_scored_text_is_read_as_it_was_written(spaced: Runtime) -> None:
    tokens = _ids(spaced, "▁the", "n", "▁a")
    text = spaced.decode(tokens, "what is")
    assert text == " then a"
    assert spaced.score(["what is"], [text])[0].token_ids == tokens


@pytest.mark.parametrize("kind", ["metaspace", "legacy"])
@pytest.mark.parametrize(
    ("template", "content"), [(INST_TEMPLATE, " the x"), (BARE_TEMPLATE, " the x"), (UNTRIMMED, "the x")]
)
def test_a_message_holds_what_the_template_turns_into_the_tokens_written(
    kind: str, template: str, content: str
) -> None:
    rt = runtime(space_tokenizer(kind, template))
    written = _ids(rt, "▁the", "▁", "x")
    assert rt.message([USER], written) == content
    answered = [USER, {"role": "assistant", "content": content}]
    ids = rt.tokenizer.apply_chat_template(answered, return_dict=False)  # type: ignore[union-attr]
    assert ids[: len(rt.encode([USER])) + len(written)] == [*rt.encode([USER]), *written]


# --- text that is none -----------------------------------------------------------------------------------------------


def test_half_a_surrogate_pair_is_refused_by_its_prompt(rt: Runtime) -> None:
    for bad in ("a\ud800b", [{"role": "user", "content": "a\ud800b"}]):
        with pytest.raises(ValueError, match=r"prompts\[1\]: the text has '\\ud800' at character 1"):
            rt.generate(["fine", bad], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"completions\[0\]: the text has '\\udfff'"):
        rt.score(["fine"], ["\udfff"])
