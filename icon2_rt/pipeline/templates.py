"""What a chat template puts around a user's text, found by rendering it; no table of model names.

The *pre-query* is the template up to where the user's text begins: given that, a chat model writes an instruction. It
is found by rendering short conversations whose user texts begin differently and taking the tokens that all share.
Comparing tokens, not characters, matters: where the template ends in a space, that space belongs to the first
token of the text for many tokenizers, and a pre-query that ends in a lone space token would be text that the model
never saw.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Chat = list[dict[str, str]]

# Texts that no template would contain or trim, to see where the user's text goes.
_PROBES = ("Quibble7", "zest9", "4Xylo", "Ünder5", "火8")
# Common beginnings, which tokenizers have merged with a space in front of them.
_OPENINGS = ("What", "the", "The", "a", "I", "in", "Write", "How", "please", "1")
_SYSTEM = "Sphinx6Brief"


@dataclass(frozen=True)
class ChatFrame:
    """How one model's chat template frames a single user turn.

    Args:
        pre_query: token ids up to where the user's text begins.
        pre_query_text: the same as text, for people (it may end in a space that the ids leave to the text).
        stop_token_ids: the tokens that end a user turn, the model's own end-of-sequence tokens included.
        stop_string: the text that ends a user turn where the template marks it by plain text, else None.
        system: how a system prompt is given: "system" as a turn of its own role, "user" in front of the user's text,
            because the template has no system role or drops it.
        default_system: the system prompt that the template puts in when none is given; None if it puts in none.
        rendered: a whole single-turn chat with its generation prompt, for the record: two runs of one folder must agree
            in it (some templates print today's date).
    """

    pre_query: tuple[int, ...]
    pre_query_text: str
    stop_token_ids: tuple[int, ...]
    stop_string: str | None
    system: str
    default_system: str | None
    rendered: str

    def messages(self, user: str, system: str | None = None) -> Chat:
        """The chat for one user text, with a system prompt where one is given."""
        if system is None:
            return [{"role": "user", "content": user}]
        if self.system == "user":
            return [{"role": "user", "content": f"{system}\n\n{user}"}]
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "pre_query": self.pre_query_text,
            "stop_token_ids": list(self.stop_token_ids),
            "stop_string": self.stop_string,
            "system_prompt_goes": "into a system turn" if self.system == "system" else "in front of the user's text",
            "default_system": self.default_system,
            "rendered": self.rendered,
        }


def chat_frame(tokenizer: Any, eos_token_ids: Sequence[int] = ()) -> ChatFrame:
    """Take a tokenizer's chat template apart.

    Args:
        tokenizer: a transformers tokenizer.
        eos_token_ids: the model's own end tokens.

    Raises:
        ValueError: no chat template, or one that does not show the user's text as given, exactly once.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError("model: its tokenizer has no chat template, so it is not a chat model; the method needs one")
    texts = {probe: _render(tokenizer, [{"role": "user", "content": probe}]) for probe in _PROBES}
    for probe, text in texts.items():
        if text.count(probe) != 1:
            raise ValueError(
                f"model: its chat template shows the user's text {text.count(probe)} times instead of once, so where "
                f"the user's turn begins cannot be told: {text[:200]!r}"
            )
    before, after = texts[_PROBES[0]].split(_PROBES[0])
    openings = [_render(tokenizer, [{"role": "user", "content": text}]) for text in _OPENINGS]
    ids = [_encode(tokenizer, text) for text in [*texts.values(), *openings]]
    shared = (len(set(column)) == 1 for column in zip(*ids, strict=False))
    pre_query = ids[0][: sum(itertools.takewhile(bool, shared))]
    if not pre_query:
        raise ValueError(f"model: its chat template puts no token before the user's text: {texts[_PROBES[0]]!r}")
    rendered = _render(tokenizer, [{"role": "user", "content": _PROBES[0]}], generation=True)
    stop_token, stop_string = _end_of_turn(tokenizer, after if after.strip() else rendered.split(_PROBES[0])[1])
    stops = dict.fromkeys([*([stop_token] if stop_token is not None else []), *eos_token_ids])
    return ChatFrame(
        pre_query=tuple(pre_query),
        pre_query_text=before,
        stop_token_ids=tuple(stops),
        stop_string=stop_string,
        system=_system_place(tokenizer),
        default_system=_default_system(tokenizer, before),
        rendered=rendered,
    )


def chat_length(tokenizer: Any, chat: Chat) -> int:
    """How many tokens a chat has with its generation prompt."""
    return len(_encode(tokenizer, _render(tokenizer, chat, generation=True)))


def _end_of_turn(tokenizer: Any, after: str) -> tuple[int | None, str | None]:
    """The special token that ends a user turn, or else the text that does."""
    ids = _encode(tokenizer, after.lstrip()) if after.strip() else []
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    for i, token in enumerate(ids):
        if token in special:
            # White space in front of the mark is the template's; any other text there is what ends the turn.
            text = tokenizer.decode(ids[:i]).strip()
            return (None, text) if text else (token, None)
    return None, after.strip() or None


def _system_place(tokenizer: Any) -> str:
    """A template that raises on a system turn, or silently drops it, gets the prompt in front of the user's text."""
    try:
        text = _render(tokenizer, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _PROBES[0]}])
    except Exception:  # jinja's TemplateError, or whatever a custom template raises
        return "user"
    return "system" if _SYSTEM in text else "user"


def _default_system(tokenizer: Any, before: str) -> str | None:
    """What stands where a system prompt would stand when none is given."""
    try:
        text = _render(tokenizer, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _PROBES[0]}])
    except Exception:
        return None
    if text.count(_SYSTEM) != 1 or _PROBES[0] not in text:
        return None
    head, tail = text.split(_SYSTEM)
    tail = tail.split(_PROBES[0])[0]
    if not (before.startswith(head) and before.endswith(tail) and len(before) >= len(head) + len(tail)):
        return None
    return before[len(head) : len(before) - len(tail)].strip() or None


def _render(tokenizer: Any, chat: Sequence[Mapping[str, str]], generation: bool = False) -> str:
    return tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=generation)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
