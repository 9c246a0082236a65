"""Pairs as TRL's preference records: messages for a chat, strings for a text, an error where there is no text."""

from __future__ import annotations

import pytest

from icon2_rt import Completion, Direction, PairedOutput, Runtime
from tests.models import random_vectors, tiny_llama, tiny_tokenizer

CHAT = [{"role": "system", "content": "the thing"}, {"role": "user", "content": "what?"}]


def pair(prompt, text: str | None = "x") -> PairedOutput:
    chosen, rejected = (Completion(t, [5], [-1.0], "eos", 3) for t in (text, text and text + "y"))
    return PairedOutput(0, prompt, chosen, rejected)


def test_a_text_gives_strings():
    assert pair("what?").to_preference() == {"prompt": "what?", "chosen": "x", "rejected": "xy"}


def test_a_chat_gives_messages():
    record = pair(CHAT).to_preference()
    assert record["prompt"] == CHAT
    assert record["chosen"] == [{"role": "assistant", "content": "x"}]
    assert record["rejected"] == [{"role": "assistant", "content": "xy"}]
    record["prompt"][0]["content"] = "changed"
    assert CHAT[0]["content"] == "the thing"


def test_without_text_there_is_no_record():
    with pytest.raises(ValueError, match="token ids"):
        pair([1, 2]).to_preference()
    with pytest.raises(ValueError, match="tokenizer"):
        pair("what?", None).to_preference()


def test_the_runtimes_pairs_carry_the_prompt_as_it_was_given():
    rt = Runtime(tiny_llama(), tiny_tokenizer(), device="cpu")
    steering = 4.0 * Direction("a", random_vectors(4, 48, seed=0))
    chat, text = rt.generate_pairs([CHAT, "what?"], positive=steering, negative=None, max_new_tokens=4, seed=0, top_k=0)
    assert chat.to_preference()["prompt"] == CHAT
    assert text.to_preference() == {"prompt": "what?", "chosen": text.positive.text, "rejected": text.negative.text}
