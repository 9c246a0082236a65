"""Prompts in, token ids out: text, chats and ids, checked before any work starts, each error naming the prompt."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import index
from typing import Any

from transformers import PreTrainedTokenizerBase

from icon2_rt.chat_template import ChatTemplate
from icon2_rt.outputs import Message, Prompt

# A response is decoded behind so many tokens of its prompt: text depends on what stands right before it.
_CONTEXT = 32


class Encoder:
    """Turns prompts into ids for one model, and ids into text. ``tokenizer`` None: prompts must be ids.

    ``template`` renders chats; ``variables`` of a call are set in it for that call.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, max_length: int):
        self.tokenizer, self.vocab_size, self.max_length = tokenizer, vocab_size, max_length
        self.template = ChatTemplate(tokenizer)
        self._told_about_chats = self._told_about_bos = False
        # Of what stands before a text: it is asked for again with every token of a row that has stop strings.
        self._text_of = lru_cache(maxsize=1024)(self._decode)

    def template_for(self, variables: Mapping[str, Any] | None) -> ChatTemplate:
        """The template with a call's own variables.

        Raises:
            TypeError, ValueError: they are no dict, or the template does not read one of them.
        """
        try:
            return self.template.with_variables(variables)
        except (TypeError, ValueError) as error:
            raise named(error, "chat_template_kwargs") from None

    def encode_all(
        self, prompts: Sequence[Prompt], what: str = "prompts", *, variables: Mapping[str, Any] | None = None
    ) -> list[list[int]]:
        """All prompts of a call.

        Raises:
            TypeError: ``prompts`` is one prompt, not a list of them. ValueError: a bad prompt, named by its index.
        """
        check_is_list(prompts, what)
        template = self.template_for(variables)
        encoded = []
        for n, prompt in enumerate(prompts):
            try:
                encoded.append(self.encode(prompt, template=template))
            except (TypeError, ValueError) as error:
                raise named(error, f"{what}[{n}]") from None
        return encoded

    def encode(
        self, prompt: Prompt, *, generation_prompt: bool = True, template: ChatTemplate | None = None
    ) -> list[int]:
        """One prompt: ``str`` (raw text), chat messages (the model's template), or ids.

        A chat that ends with a message of the assistant is left open there, to be continued; any other chat ends with
        the header of an assistant's turn. Without ``generation_prompt`` every message is closed.

        Raises:
            TypeError, ValueError: none of these, empty, not in the vocabulary, or longer than the model.
        """
        if isinstance(prompt, str):
            ids = self._text(prompt)
        elif is_chat(prompt):
            ids = self._chat(prompt, generation_prompt, template or self.template)  # type: ignore[arg-type]
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

    def completion(self, completion: Any, prompt_ids: Sequence[int] = ()) -> list[int]:
        """A completion to score: text (no special tokens added), ids, or anything with ``token_ids``. May be empty.

        Many tokenizers begin every text with a space of their own. Where a text begins with a space, that one is meant:
        the ids are those that read as the text behind ``prompt_ids``.
        """
        ids = getattr(completion, "token_ids", completion)
        if not isinstance(ids, str):
            return _as_ids(ids)
        tokenizer = self._need_tokenizer("a text completion")
        check_text(ids)
        found = list(tokenizer.encode(ids, add_special_tokens=False))
        if ids.startswith(" ") and self.decode_behind(prompt_ids, found) != ids:
            shorter = list(tokenizer.encode(ids[1:], add_special_tokens=False))
            if self.decode_behind(prompt_ids, shorter) == ids:
                return shorter
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return self._decode(ids, special=False)

    def decode_behind(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """:func:`decode_behind` with this tokenizer."""
        return self._decode_behind(prompt_ids, ids, special=False)

    def _decode_behind(self, prompt_ids: Sequence[int], ids: Sequence[int], special: bool) -> str:
        def text_before(end: Sequence[int]) -> str:
            return self._text_of(tuple(end), special)

        return decode_behind(self._need_tokenizer("text"), prompt_ids, ids, special=special, text_before=text_before)

    def _decode(self, ids: Sequence[int], special: bool) -> str:
        return str(self._need_tokenizer("text").decode(list(ids), skip_special_tokens=not special))

    def decode_for(self, stop_strings: Sequence[str]) -> Callable[[Sequence[int], Sequence[int]], str]:
        """:meth:`decode_behind`, with the text of those special tokens that ``stop_strings`` hold."""
        tokenizer = self._need_tokenizer("stop_strings")
        added = tokenizer.added_tokens_decoder.items()
        special = {i: str(token) for i, token in added if token.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        silent = {i for i, text in special.items() if not any(text in stop for stop in stop_strings)}
        if len(silent) == len(special):
            return self.decode_behind

        def decode(prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
            before, behind = ([i for i in part if i not in silent] for part in (prompt_ids[-4 * _CONTEXT :], ids))
            return self._decode_behind(before, behind, special=True)

        return decode

    def message(
        self,
        chat: Sequence[Message],
        prompt_ids: Sequence[int],
        ids: Sequence[int],
        template: ChatTemplate | None = None,
    ) -> str:
        """The content of the assistant's message that a response to ``chat`` makes.

        It begins with what a last message of the assistant had begun. Where the template brings a space of its own, or
        trims one, the content is the one that it renders as the text that was written.
        """
        text = self.decode_behind(prompt_ids, ids)
        texts = [text, text[1:]] if text.startswith(" ") and self.decode(ids) == text[1:] else [text]
        begun, before = "", [dict(message) for message in chat]
        if before and before[-1].get("role") == "assistant":
            begun, texts = before.pop()["content"], [text]
        contents = list(dict.fromkeys(start + end for start in (begun, begun.rstrip()) for end in texts))
        for content in contents if len(contents) > 1 else ():
            answered = [*before, {"role": "assistant", "content": content}]
            try:
                rendered = (template or self.template).encode(answered, generation_prompt=False)
            except ValueError:
                continue
            follows = rendered[: len(prompt_ids)] == list(prompt_ids)
            if follows and self.decode_behind(prompt_ids, rendered[len(prompt_ids) :]).startswith(text):
                return content
        return contents[0]

    def _text(self, text: str) -> list[int]:
        tokenizer = self._need_tokenizer("a text prompt")
        if tokenizer.chat_template and not self._told_about_chats:
            self._told_about_chats = True
            warnings.warn(
                "this is a chat model and the prompt is raw text, passed as it is; for a chat, pass messages: "
                '[{"role": "user", "content": "..."}]',
                stacklevel=5,
            )
        check_text(text)
        ids, bos = list(tokenizer.encode(text)), tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(str(tokenizer.bos_token)):
            if not self._told_about_bos:
                self._told_about_bos = True
                warnings.warn(
                    f"the text begins with {tokenizer.bos_token}, which the tokenizer would put in front again: one "
                    f"is kept. For two pass token ids",
                    stacklevel=5,
                )
            del ids[0]
        return ids

    def beginning(self, text: str) -> list[int]:
        """A text that others continue: without the eos that some tokenizers put behind every text."""
        ids, plain = self._text(text), self._need_tokenizer("a text").encode(text, add_special_tokens=False)
        eos = self._need_tokenizer("a text").eos_token_id
        added = ids[-1:] == [eos] and ids.count(eos) > plain.count(eos)
        return self.check(ids[:-1] if added else ids)

    def _chat(
        self, messages: Sequence[Mapping[str, str]], generation_prompt: bool, template: ChatTemplate
    ) -> list[int]:
        tokenizer = self._need_tokenizer("a chat prompt")
        if not tokenizer.chat_template:
            raise ValueError("this tokenizer has no chat template: pass raw text, or set tokenizer.chat_template")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise ValueError(f'a chat message is {{"role": ..., "content": ...}}, not {message!r}')
            if not all(isinstance(message[key], str) for key in ("role", "content")):
                raise ValueError(f"role and content of a chat message are strings, not {message!r}")
            check_text(message["content"])
            _check_role(message["role"], tokenizer.chat_template)
        return template.encode(messages, generation_prompt=generation_prompt)

    def _need_tokenizer(self, what: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and this runtime was made without one: pass token ids")
        return self.tokenizer


def named(error: Exception, where: str) -> Exception:
    """The same error with its place in front."""
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}: {error}")


def decode_behind(
    tokenizer: Any,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    *,
    special: bool = False,
    text_before: Callable[[Sequence[int]], str] | None = None,
) -> str:
    """The text of ``ids`` where they follow ``prompt_ids``: the decoding of all of them less the prompt's own. Special
    tokens have none, unless ``special``. ``text_before`` decodes the prompt's own, where that is remembered.

    Decoded alone, a response loses its first space with tokenizers that keep it in their first token.
    """

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=not special))

    text_before = text_before or decode
    length = _CONTEXT
    before = text_before(prompt_ids[-length:])
    while not before and length < len(prompt_ids):  # special tokens have no text
        length *= 2
        before = text_before(prompt_ids[-length:])
    whole = decode([*prompt_ids[-length:], *ids])
    # A prompt that ends inside a character has another text without the response.
    return whole[len(before) :] if whole.startswith(before) else decode(ids)


def check_text(text: str) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        ValueError: it holds half of a surrogate pair, as broken JSON escapes do.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has {text[error.start]!r} at character {error.start}: half of a surrogate pair, which is no "
            f"character"
        ) from None


_ROLES = ("system", "user", "assistant", "tool", "developer")


def _check_role(role: str, chat_template: object) -> None:
    """Refuse a misspelt role: most templates would render it as a turn of somebody the model has never met. A role that
    the template itself names, or that is far from the usual ones, is the caller's own.

    Raises:
        ValueError: it is nearly one of the usual roles.
    """
    if role in _ROLES or f"'{role}'" in str(chat_template) or f'"{role}"' in str(chat_template):
        return
    close = difflib.get_close_matches(role.lower(), _ROLES, 1, 0.8)
    if close:
        raise ValueError(f"role {role!r} of a chat message: did you mean {close[0]!r}?")


def is_chat(prompt: object) -> bool:
    """Is this one chat (a list of messages)?"""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and any(isinstance(m, Mapping) and "input_ids" not in m for m in prompt)
    )


def _as_ids(prompt: Any) -> list[int]:
    encoded = isinstance(prompt, Mapping) and "input_ids" in prompt  # what a tokenizer's call returns
    if encoded:
        prompt = prompt["input_ids"]
    if hasattr(prompt, "tolist"):  # a tensor or an array
        prompt = prompt.tolist()
    if encoded and len(prompt) == 1 and isinstance(prompt[0], list):  # with return_tensors it is a batch, here of one
        [prompt] = prompt
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
