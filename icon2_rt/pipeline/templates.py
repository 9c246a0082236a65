"""What a chat template puts around a user's text, found by rendering it; no table of model names.

The *pre-query* is the template up to where the user's text begins: given that, a chat model writes an instruction. It
is found by rendering short conversations whose user texts begin differently and taking the tokens that all share.
Comparing tokens, not characters, matters: where the template ends in a space, that space belongs to the first
token of the text for many tokenizers, and a pre-query that ends in a lone space token would be text that the model
never saw.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from icon2_rt.chat_template import ChatTemplate

if TYPE_CHECKING:
    from icon2_rt import Completion

Chat = list[dict[str, str]]

# Texts that no template would contain or trim, to see where the user's text goes.
_PROBES = ("Quibble7", "zest9", "4Xylo", "Ünder5", "火8")
# Common beginnings, which tokenizers have merged with a space in front of them.
_OPENINGS = ("What", "the", "The", "a", "I", "in", "Write", "How", "please", "1")
_SYSTEM = "Sphinx6Brief"
_ANSWER = "Vexil3Reply"


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
            in it.
        template: what renders the chats of this run, with its variables and, where it reads the clock, a frozen one.
        end_token_ids: the tokens that end a response: the model's own, and the one that ends an assistant's turn.
        end_mark: the text that ends an assistant's turn where that is plain text, with the space in front of it.
        special_ids: the tokens that mark turns or are special otherwise; none of them belongs into a text.
        marks: pieces of plain text that the template puts around messages, where they look like marks.
    """

    pre_query: tuple[int, ...]
    pre_query_text: str
    stop_token_ids: tuple[int, ...]
    stop_string: str | None
    system: str
    default_system: str | None
    rendered: str
    template: ChatTemplate = field(repr=False, compare=False)
    end_token_ids: tuple[int, ...] = ()
    end_mark: str | None = None
    special_ids: frozenset[int] = frozenset()
    marks: tuple[str, ...] = ()

    @property
    def end_string(self) -> str | None:
        """The stop string of a response."""
        return self.end_mark.strip() if self.end_mark is not None else None

    def length(self, chat: Chat) -> int:
        """How many tokens a chat has with its generation prompt."""
        return len(self.template.encode(chat))

    def said(self, completion: Completion) -> str:
        """The response in a completion, as the content of the assistant's message: without the mark that ended it."""
        text = completion.message if completion.message is not None else completion.text or ""
        if completion.finish_reason == "stop_string" and self.end_mark is not None:
            before, mark, _ = text.partition(self.end_mark.strip())
            return before.removesuffix(self.end_mark[: -len(self.end_mark.lstrip())]) if mark else text
        if completion.finish_reason == "eos" and completion.token_ids[-1] in self.special_ids:
            # A token may mark turns without being special, and has a text then.
            last = self.template.tokenizer.decode(completion.token_ids[-1:], skip_special_tokens=True)
            return text.removesuffix(last)
        return text

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
            **({"clock": self.template.clock} if self.template.clock is not None else {}),
            **({"response_ends_with": self.end_mark} if self.end_mark is not None else {}),
        }


def chat_frame(
    tokenizer: Any,
    eos_token_ids: Sequence[int] = (),
    *,
    variables: Mapping[str, Any] | None = None,
    clock: Mapping[str, str] | None = None,
) -> ChatFrame:
    """Take a tokenizer's chat template apart.

    Args:
        tokenizer: a transformers tokenizer.
        eos_token_ids: the model's own end tokens.
        variables: of the template; see :class:`~icon2_rt.chat_template.ChatTemplate`.
        clock: what the template's clock gave when it was frozen; None: it is frozen now.

    Raises:
        ValueError: no chat template, one that does not show the user's text as given, exactly once, or one that raises
            on a chat of one message.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError("model: its tokenizer has no chat template, so it is not a chat model; the method needs one")
    try:
        template = ChatTemplate(tokenizer, variables).frozen(clock)
    except ValueError as error:
        raise ValueError(f"template: {error}") from error
    try:
        texts = {probe: _render(template, [_user(probe)]) for probe in _PROBES}
        openings = [_render(template, [_user(text)]) for text in _OPENINGS]
        rendered = _render(template, [_user(_PROBES[0])], generation=True)
    except ValueError as error:
        raise ValueError(
            f"model: its chat template cannot show a chat of one user message, which is what the method asks: {error}"
        ) from error
    for probe, text in texts.items():
        if text.count(probe) != 1:
            raise ValueError(
                f"model: its chat template shows the user's text {text.count(probe)} times instead of once, so where "
                f"the user's turn begins cannot be told: {text[:200]!r}"
            )
    before, after = texts[_PROBES[0]].split(_PROBES[0])
    ids = [_encode(tokenizer, text) for text in [*texts.values(), *openings]]
    shared = (len(set(column)) == 1 for column in zip(*ids, strict=False))
    pre_query = ids[0][: sum(itertools.takewhile(bool, shared))]
    if not pre_query:
        raise ValueError(f"model: its chat template puts no token before the user's text: {texts[_PROBES[0]]!r}")
    stop_token, stop_string = _end_of_turn(tokenizer, after if after.strip() else rendered.split(_PROBES[0])[1])
    stops = dict.fromkeys([*([stop_token] if stop_token is not None else []), *eos_token_ids])
    end_token, end_mark = _end_of_response(template)
    ends = dict.fromkeys([*eos_token_ids, *([end_token] if end_token is not None else [])])
    special, marks = _marks(template)
    return ChatFrame(
        pre_query=tuple(pre_query),
        pre_query_text=before,
        stop_token_ids=tuple(stops),
        stop_string=stop_string,
        system=_system_place(template),
        default_system=_default_system(template, before),
        rendered=rendered,
        template=template,
        end_token_ids=tuple(ends),
        end_mark=end_mark,
        special_ids=special,
        marks=marks,
    )


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _end_of_turn(tokenizer: Any, after: str) -> tuple[int | None, str | None]:
    """The special token that ends a turn, or else the text that does."""
    ids = _encode(tokenizer, after.lstrip()) if after.strip() else []
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    for i, token in enumerate(ids):
        if token in special:
            # White space in front of the mark is the template's; any other text there is what ends the turn.
            text = tokenizer.decode(ids[:i]).strip()
            return (None, text) if text else (token, None)
    return None, after.strip() or None


def _end_of_response(template: ChatTemplate) -> tuple[int | None, str | None]:
    """What ends an assistant's turn: a token, or text with the white space in front of it; neither: nothing marks it.

    A template may mark it only where another turn follows. A token counts there too; text there is the next header.
    """
    turns = [_user(_PROBES[0]), {"role": "assistant", "content": _ANSWER}]
    for chat, end in ((turns, None), ([*turns, _user(_PROBES[1])], _PROBES[1])):
        try:
            text = _render(template, chat)
        except ValueError:
            continue
        if text.count(_ANSWER) != 1 or (end is not None and end not in text.partition(_ANSWER)[2]):
            continue
        after = text.partition(_ANSWER)[2].partition(end)[0] if end is not None else text.partition(_ANSWER)[2]
        token, mark = _end_of_turn(template.tokenizer, after)
        if token is not None:
            return token, None
        if mark is not None and end is None:
            return None, after[: len(after) - len(after.lstrip())] + mark
    return None, None


def _marks(template: ChatTemplate) -> tuple[frozenset[int], tuple[str, ...]]:
    """The tokens that are special or mark turns, and the plain text that does."""
    tokenizer = template.tokenizer
    added = dict(getattr(tokenizer, "added_tokens_decoder", {}))
    contents = [_PROBES[0], _ANSWER, _PROBES[1], _SYSTEM]
    turns = [_user(_PROBES[0]), {"role": "assistant", "content": _ANSWER}, _user(_PROBES[1])]
    rendered = []
    for chat in ([_user(_PROBES[0])], turns[:2], turns, [{"role": "system", "content": _SYSTEM}, *turns]):
        for generation in (False, True):
            try:
                rendered.append(_render(template, chat, generation and chat[-1]["role"] == "user"))
            except ValueError:
                continue
    in_template = {token for text in rendered for token in _encode(tokenizer, text)}
    special = {i for i, token in added.items() if token.special or (i in in_template and token.content.strip())}
    special |= set(tokenizer.all_special_ids)
    names = sorted({tokenizer.convert_ids_to_tokens(i) for i in special} - {None, ""}, key=len, reverse=True)
    cut = re.compile("|".join(map(re.escape, [*contents, *names, "\n"])))
    pieces = {piece.strip() for text in rendered for piece in cut.split(text)}
    marks = {piece for piece in pieces if len(piece) >= 3 and re.search(r"\w", piece) and re.search(r"[^\w\s]", piece)}
    return frozenset(special), tuple(sorted(marks))


def _system_place(template: ChatTemplate) -> str:
    """A template that raises on a system turn, or silently drops it, gets the prompt in front of the user's text."""
    try:
        text = _render(template, [{"role": "system", "content": _SYSTEM}, _user(_PROBES[0])])
    except ValueError:
        return "user"
    return "system" if _SYSTEM in text else "user"


def _default_system(template: ChatTemplate, before: str) -> str | None:
    """What stands where a system prompt would stand when none is given."""
    try:
        text = _render(template, [{"role": "system", "content": _SYSTEM}, _user(_PROBES[0])])
    except ValueError:
        return None
    if text.count(_SYSTEM) != 1 or _PROBES[0] not in text:
        return None
    head, tail = text.split(_SYSTEM)
    tail = tail.split(_PROBES[0])[0]
    if not (before.startswith(head) and before.endswith(tail) and len(before) >= len(head) + len(tail)):
        return None
    return before[len(head) : len(before) - len(tail)].strip() or None


def _render(template: ChatTemplate, chat: Sequence[Mapping[str, str]], generation: bool = False) -> str:
    return template.render(chat, generation_prompt=generation)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
