"""Prompts in, token ids out: text, chats and ids, checked before any work starts, each error naming the prompt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

from transformers import PreTrainedTokenizerBase

from icon2_rt.outputs import Prompt


class Encoder:
    """Turns prompts into ids for one model. ``tokenizer`` None: prompts must be ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, max_length: int):
        self.tokenizer, self.vocab_size, self.max_length = tokenizer, vocab_size, max_length
        self._told_about_chats = False

    def encode_all(self, prompts: Sequence[Prompt], what: str = "prompts") -> list[list[int]]:
        """All prompts of a call.

        Raises:
            TypeError: ``prompts`` is one prompt, not a list of them. ValueError: a bad prompt, named by its index.
        """
        check_is_list(prompts, what)
        encoded = []
        for n, prompt in enumerate(prompts):
            try:
                encoded.append(self.encode(prompt))
            except (TypeError, ValueError) as error:
                raise named(error, f"{what}[{n}]") from None
        return encoded

    def encode(self, prompt: Prompt, *, generation_prompt: bool = True) -> list[int]:
        """One prompt: ``str`` (raw text), chat messages (the model's template), or ids.

        Raises:
            TypeError, ValueError: none of these, empty, not in the vocabulary, or longer than the model.
        """
        if isinstance(prompt, str):
            ids = self._text(prompt)
        elif is_chat(prompt):
            ids = self._chat(prompt, generation_prompt)  # type: ignore[arg-type]
        else:
            ids = _as_ids(prompt)
        return self.check(ids)

    def check(self, ids: list[int]) -> list[int]:
        """The ids themselves, if the model can take them."""
        if not ids:
            raise ValueError("the prompt is empty: it needs at least one token")
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside the vocabulary (0 to {self.vocab_size - 1})")
        if len(ids) > self.max_length:
            raise ValueError(f"{len(ids)} tokens are more than the model's {self.max_length} positions")
        return ids

    def completion(self, completion: Any) -> list[int]:
        """A completion to score: text (no special tokens added), ids, or anything with ``token_ids``. May be empty."""
        ids = getattr(completion, "token_ids", completion)
        if isinstance(ids, str):
            ids = self._need_tokenizer("a text completion").encode(ids, add_special_tokens=False)
        return _as_ids(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._need_tokenizer("text").decode(list(ids), skip_special_tokens=True))

    def _text(self, text: str) -> list[int]:
        tokenizer = self._need_tokenizer("a text prompt")
        if tokenizer.chat_template and not self._told_about_chats:
            self._told_about_chats = True
            warnings.warn(
                "this is a chat model and the prompt is raw text, passed as it is; for a chat, pass messages: "
                '[{"role": "user", "content": "..."}]',
                stacklevel=5,
            )
        return list(tokenizer.encode(text))

    def _chat(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> list[int]:
        tokenizer = self._need_tokenizer("a chat prompt")
        if not tokenizer.chat_template:
            raise ValueError("this tokenizer has no chat template: pass raw text, or set tokenizer.chat_template")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise ValueError(f'a chat message is {{"role": ..., "content": ...}}, not {message!r}')
            if not all(isinstance(message[key], str) for key in ("role", "content")):
                raise ValueError(f"role and content of a chat message are strings, not {message!r}")
        chat = [dict(message) for message in messages]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation_prompt)
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(f"the chat template refuses this chat: {error}") from error
        # The template writes the BOS itself where the model wants one.
        return list(tokenizer.encode(text, add_special_tokens=False))

    def _need_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and this runtime was made without one: pass token ids")
        return self.tokenizer


def named(error: Exception, where: str) -> Exception:
    """The same error with its place in front."""
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}: {error}")


def is_chat(prompt: object) -> bool:
    """Is this one chat (a list of messages)?"""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(isinstance(m, Mapping) for m in prompt)


def _as_ids(prompt: Any) -> list[int]:
    if hasattr(prompt, "tolist"):  # a tensor or an array
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise TypeError(
            f"a prompt is a str, a list of chat messages or a list of token ids, not {type(prompt).__name__}"
        )
    for token in prompt:
        if not hasattr(token, "__index__") or isinstance(token, bool):
            raise TypeError(f"token ids are whole numbers, not {token!r} ({type(token).__name__})")
    return [index(token) for token in prompt]


def check_is_list(prompts: Any, what: str = "prompts") -> None:
    """Refuse one prompt where a list of prompts belongs, with the corrected call."""
    if isinstance(prompts, str):
        raise TypeError(f"{what} is always a list: [{_short(prompts)}], not {_short(prompts)}")
    if isinstance(prompts, Mapping):
        raise TypeError(
            f'{what} is a list of chats, and a chat a list of messages: [[{{"role": ..., "content": ...}}]]'
        )
    if is_chat(prompts):
        raise TypeError(f"{what} is a list of chats, and this is one chat: pass [messages], not messages")
    if hasattr(prompts, "tolist") or not isinstance(prompts, Sequence):
        raise TypeError(f"{what} is always a list (of str, chats or lists of ids), not {type(prompts).__name__}")
    if prompts and all(isinstance(p, int) for p in prompts):
        raise TypeError(f"{what} is a list of prompts, and this is one list of token ids: pass [ids], not ids")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
