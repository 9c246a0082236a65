"""A model's chat template: the one place where chats become text, with the variables and the date it is to show."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

# apply_chat_template's own arguments, and what it hands to the template itself: no variables of a template.
_RESERVED = frozenset(
    {
        "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
        "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now", "raise_exception",
    }
)  # fmt: skip
_LITERAL_FORMAT = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", re.DOTALL)


class ChatTemplate:
    """Renders chats by a tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer.
        variables: what the template reads besides the messages, such as ``enable_thinking`` or ``date_string``.
        clock: what ``strftime_now`` gives, by its format; None: the time of each rendering.

    Raises:
        ValueError: a variable that the template does not read, or that is none of its variables.
    """

    def __init__(
        self, tokenizer: Any, variables: Mapping[str, Any] | None = None, clock: Mapping[str, str] | None = None
    ):
        self.tokenizer = tokenizer
        self.variables = copy.deepcopy(dict(variables or {}))
        self.clock = dict(clock) if clock is not None else None
        if self.variables:
            self._check_variables()

    def with_variables(self, variables: Mapping[str, Any] | None) -> ChatTemplate:
        """The same template with these variables too; they win over its own."""
        if not variables:
            return self
        if not isinstance(variables, Mapping):
            raise TypeError(f"a chat template's variables are a dict of names and values, not {variables!r:.60}")
        return ChatTemplate(self.tokenizer, {**self.variables, **variables}, self.clock)

    def frozen(self, clock: Mapping[str, str] | None = None) -> ChatTemplate:
        """The same template with a clock that stands still: at ``clock``, or at the present time.

        A template that does not read the clock is returned as it is.
        """
        if "strftime_now" not in self._source():
            return self
        if clock is None:
            now = datetime.now()
            clock = {format: now.strftime(format) for format in self._clock_formats()}
        return ChatTemplate(self.tokenizer, self.variables, clock)

    def render(self, chat: Sequence[Mapping[str, str]], *, generation_prompt: bool = True) -> str:
        """A chat as text.

        With ``generation_prompt`` the text ends where the answer begins: behind the assistant's header or, where the
        chat ends with a message of the assistant, behind that message, which is left open to be continued. Without it
        every message is closed.

        Raises:
            ValueError: the template raises, does not parse, or shows the last message in a form that cannot be
                continued.
        """
        continued = generation_prompt and bool(chat) and chat[-1].get("role") == "assistant"
        options: dict[str, Any] = dict(self.variables)
        try:
            if self.clock is not None:
                options["chat_template"] = _frozen_clock(self.clock) + self._source()
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in chat],
                    tokenize=False,
                    add_generation_prompt=generation_prompt and not continued,
                    continue_final_message=continued,
                    **options,
                )
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise ValueError(f"the chat template refuses this chat: {str(error) or type(error).__name__}") from error

    def encode(self, chat: Sequence[Mapping[str, str]], *, generation_prompt: bool = True) -> list[int]:
        """The token ids of a chat; the template itself writes the BOS where the model wants one."""
        text = self.render(chat, generation_prompt=generation_prompt)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _source(self) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            return ""
        return str(self.tokenizer.get_chat_template(tools=self.variables.get("tools")))

    def _check_variables(self) -> None:
        source = self._source()
        if not source:
            raise ValueError("this tokenizer has no chat template, so there is nothing that variables of one could set")
        for name in self.variables:
            if not isinstance(name, str) or name in _RESERVED:
                raise ValueError(f"{name!r} is no variable of a chat template that can be set")
            if re.search(rf"\b{re.escape(name)}\b", source) is None:
                known = sorted({*re.findall(r"[A-Za-z_]\w+", source)})
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(f"this model's chat template does not read the variable {name!r}{hint}")

    def _clock_formats(self) -> list[str]:
        """The formats that the template asks the clock for: written out in it, or asked for while it renders."""
        source = self._source()
        found = [match[2] for match in _LITERAL_FORMAT.finditer(source)]
        probe = ChatTemplate(self.tokenizer, self.variables)
        macro = "{%- macro strftime_now(format) -%}\u27e6{{ format }}\u27e7{%- endmacro %}\n"
        user = {"role": "user", "content": "a"}
        for chat in ([user], [{"role": "system", "content": "b"}, user]):
            try:
                text = probe.tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=True, chat_template=macro + source, **self.variables
                )
            except Exception:  # it may refuse a system turn; what is written out in it is known already
                continue
            found += re.findall("\u27e6(.*?)\u27e7", text, re.DOTALL)
        return list(dict.fromkeys(found))


def _frozen_clock(clock: Mapping[str, str]) -> str:
    """A macro in front of a template that stands for ``strftime_now``.

    Its last newline belongs to the block, so that the template begins at the beginning of a line as before.
    """
    table = json.dumps(dict(clock))
    return (
        "{%- macro strftime_now(format) -%}{%- set known = " + table + " -%}"
        "{%- if format in known -%}{{ known[format] }}{%- else -%}"
        "{{ raise_exception('the date was not frozen in the form ' ~ format) }}{%- endif -%}{%- endmacro %}\n"
    )
