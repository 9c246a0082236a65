"""The pre-query and the end of the user's turn, derived from templates of several styles by rendering them."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from icon2_rt.pipeline.templates import ChatFrame, chat_frame
from tests.models import tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|user|>system\nYou are a tool.<|end|>\n{% endif %}" + CHATML
)  # puts in a system prompt of its own
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{{ bos_token }}[INST] {{ s }}{{ messages[0].content }} [/INST]"
)  # plain text marks, and a space in front of the user's text
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
)
DEAF = "{% for m in messages if m.role != 'system' %}<|user|>{{ m.content }}<|end|>{% endfor %}"  # drops it silently
DATED = "<|system|>Today is {{ strftime_now('%d %b %Y') }}.<|end|><|user|>{{ messages[-1].content }}<|end|>"


def _frame(template: str, eos: tuple[int, ...] = ()) -> tuple[ChatFrame, PreTrainedTokenizerFast]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return chat_frame(tokenizer, eos), tokenizer


def _prompt(tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("template", [CHATML, QWEN, LLAMA2, GEMMA, DEAF, DATED, tiny_tokenizer().chat_template])
@pytest.mark.parametrize("text", ["the other thing", "Why?", "  7 days", "ünd", "in"])
def test_every_chat_begins_with_the_pre_query(template: str, text: str) -> None:
    frame, tokenizer = _frame(template)
    ids = _prompt(tokenizer, [{"role": "user", "content": text}])
    assert tuple(ids[: len(frame.pre_query)]) == frame.pre_query
    assert frame.pre_query_text.startswith(tokenizer.decode(frame.pre_query))


def test_chatml() -> None:
    frame, tokenizer = _frame(CHATML, eos=(7,))
    assert tokenizer.decode(frame.pre_query) == "<|user|>user\n"
    assert frame.stop_token_ids == (tokenizer.convert_tokens_to_ids("<|end|>"), 7)
    assert (frame.stop_string, frame.system, frame.default_system) == (None, "system", None)
    assert frame.messages("hi", system="be kind")[0] == {"role": "system", "content": "be kind"}


def test_a_default_system_prompt_is_found_and_stays_in_the_pre_query() -> None:
    frame, tokenizer = _frame(QWEN)
    assert frame.default_system == "You are a tool."
    assert "You are a tool." in tokenizer.decode(frame.pre_query)
    text = tokenizer.apply_chat_template(frame.messages("hi", system="be kind"), tokenize=False)
    assert "You are a tool." not in text


def test_plain_text_marks_end_a_turn_by_a_string() -> None:
    frame, tokenizer = _frame(LLAMA2)
    assert frame.stop_string == "[/INST]"
    assert frame.stop_token_ids == ()
    # "the" merges with the space in front of it in this tokenizer: a pre-query that ended in the space would not be a
    # prefix of that chat's tokens.
    assert _prompt(tokenizer, [{"role": "user", "content": "the"}])[len(frame.pre_query) :] == tokenizer.encode(
        frame.pre_query_text[len(tokenizer.decode(frame.pre_query)) :] + "the [/INST]", add_special_tokens=False
    )


@pytest.mark.parametrize("template", [GEMMA, DEAF])
def test_without_a_system_turn_the_prompt_goes_before_the_text(template: str) -> None:
    frame, tokenizer = _frame(template)
    assert frame.system == "user"
    text = tokenizer.apply_chat_template(frame.messages("hi", system="be kind"), tokenize=False)
    assert text.index("be kind") < text.index("hi")


def test_a_template_without_anything_behind_the_text_ends_at_the_generation_prompt() -> None:
    frame, _ = _frame(
        "{{ messages[0].content }}"[:0] + "Q: {{ messages[0].content }}{% if add_generation_prompt %} A:{% endif %}"
    )
    assert frame.stop_string == "A:"


def test_a_dated_template_shows_in_the_record() -> None:
    frame, _ = _frame(DATED)
    assert frame.to_dict()["rendered"].startswith("<|system|>Today is ")


def test_templates_that_cannot_be_taken_apart() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_frame(tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        chat_frame(None)
    with pytest.raises(ValueError, match="2 times instead of once"):
        _frame("<|user|>{{ messages[0].content }}{{ messages[0].content }}")
    with pytest.raises(ValueError, match="0 times instead of once"):
        _frame("<|user|>{{ messages[0].content | lower }}")
    with pytest.raises(ValueError, match="no token before"):
        _frame("{{ messages[0].content }}<|end|>")
