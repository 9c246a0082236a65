"""A run's pairs in the forms that trainers ask for.

A run folder is TRL's conversational preference format already. This is for the rest: unpaired rows for KTO, graded
lists, and plain strings for trainers that apply no chat template.

*Plain* means: the prompt is the chat as the model's template renders it, up to where the response begins, and the
response is bare text, because a trainer adds the ending token itself. A tokenizer that puts its own first token in
front would give a prompt two of them, so that one is left out of the text; where no text gives exactly the tokens that
the model was prompted with, the export is refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from icon2_rt.chat_template import ChatTemplate
from icon2_rt.pipeline.dataset import TEMPLATE_VARIABLES
from icon2_rt.pipeline.files import to_jsonl
from icon2_rt.pipeline.loading import model_path

if TYPE_CHECKING:
    from icon2_rt.pipeline.runner import RunResult

Format = Literal["dpo", "kto", "listwise"]
Style = Literal["conversational", "plain"]

_KEPT = ("id", "criterion")  # stable ids: what a row can be joined by


def convert(
    records: Iterable[Mapping[str, Any]],
    form: Format,
    style: Style = "conversational",
    tokenizer: Any = None,
    template: ChatTemplate | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of one format from a run's records. Pairs whose two responses are the same text are left out.

    - ``dpo``: ``{prompt, chosen, rejected}``.
    - ``kto``: ``{prompt, completion, label}``, two rows a record: chosen is True, rejected False.
    - ``listwise``: ``{prompt, responses, weights, strengths}`` from a ladder, best first; the weights add up to 1.

    All rows carry ``id`` and ``criterion`` too.

    Args:
        tokenizer: of the model that wrote the pairs; ``style="plain"`` needs it.
        template: how the run rendered its chats, where it set variables or its template reads the clock.

    Raises:
        ValueError: plain without a tokenizer, or prompts that no text can stand for; listwise from a run that wrote
            no ladder.
    """
    if style == "plain" and tokenizer is None:
        raise ValueError("plain text needs the model's tokenizer: its chat template is part of the prompt")
    for record in records:
        if form == "listwise" and "responses" not in record:
            raise ValueError('listwise needs K responses per prompt: a run with pairs.shape = "ladder"')
        if record["chosen"] == record["rejected"]:
            continue
        yield from _rows(record, form, style, template or ChatTemplate(tokenizer))


def _rows(record: Mapping[str, Any], form: Format, style: Style, template: ChatTemplate) -> Iterator[dict[str, Any]]:
    def said(response: list[dict[str, str]]) -> Any:
        return response if style == "conversational" else plain_response(template, record["prompt"], response)

    prompt = record["prompt"] if style == "conversational" else plain_prompt(template, record["prompt"])
    kept = {name: record[name] for name in _KEPT}
    if style == "conversational" and TEMPLATE_VARIABLES in record:
        kept[TEMPLATE_VARIABLES] = record[TEMPLATE_VARIABLES]
    if form == "dpo":
        yield {"prompt": prompt, "chosen": said(record["chosen"]), "rejected": said(record["rejected"]), **kept}
    elif form == "kto":
        for side, label in (("chosen", True), ("rejected", False)):
            yield {"prompt": prompt, "completion": said(record[side]), "label": label, **kept}
    else:
        responses = [said(response) for response in record["responses"]]
        graded = {name: record[name] for name in ("weights", "strengths")}
        yield {"prompt": prompt, "responses": responses, **graded, **kept}


def plain_response(
    template: ChatTemplate, chat: Sequence[Mapping[str, str]], response: Sequence[Mapping[str, str]]
) -> str:
    """A response as it reads behind the plain prompt.

    That is its content, but for a first space that was left out of it (see :meth:`Encoder.message`): the tokenizer has
    the space in the response's first token, and the template would have doubled it.
    """
    said, before = response[0]["content"], template.render(chat)

    def behind(content: str) -> str:
        answered = [*chat, {"role": "assistant", "content": content}]
        return template.render(answered, generation_prompt=False).removeprefix(before)

    if said.startswith(" ") or not behind(said).startswith(" " + said):
        return said
    tokenizer = template.tokenizer
    first = len(tokenizer("x", add_special_tokens=False)["input_ids"])
    tokens = tokenizer("x " + said, add_special_tokens=False)["input_ids"][first:]
    swallowed = not tokenizer.decode(tokens, skip_special_tokens=True).startswith(" ")
    return " " + said if swallowed and behind(" " + said).startswith("  " + said) else said


def plain_prompt(template: ChatTemplate, chat: Sequence[Mapping[str, str]]) -> str:
    """A chat up to where the response begins, as a text that the tokenizer turns into exactly the chat's tokens.

    Raises:
        ValueError: there is no such text, because the tokenizer adds tokens that the chat template does not have.
    """
    text, tokenizer = template.render(chat), template.tokenizer
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer.bos_token
    for candidate in (text, text.removeprefix(first) if first else text):
        if list(tokenizer(candidate)["input_ids"]) == list(wanted):
            return candidate
    raise ValueError(
        "plain: this tokenizer adds tokens of its own that the chat template does not have, so no text gives the "
        "tokens that the model was prompted with; export the conversational style"
    )


def of_run(result: RunResult, form: Format, style: Style = "conversational") -> list[dict[str, Any]]:
    """:func:`convert` for a finished run; the tokenizer is that of the run's model."""
    tokenizer = template = None
    if style == "plain":
        from transformers import AutoTokenizer

        identity = result.manifest["identity"]
        config = identity["config"]
        tokenizer = AutoTokenizer.from_pretrained(
            model_path(config["model"]), revision=config["runtime"].get("revision")
        )
        template = ChatTemplate(tokenizer, config.get("template"), identity["chat_template"].get("clock"))
    return list(convert(result.records(), form, style, tokenizer, template))


def to_bytes(rows: Sequence[Mapping[str, Any]], ending: str) -> bytes:
    """Rows as a file: ".jsonl" or ".parquet"."""
    if ending == ".jsonl":
        return to_jsonl(rows)
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer, compression="zstd")
    return buffer.getvalue()
