"""A model's answers to a benchmark's questions, in the file that the benchmark's own judge reads.

- ``alpaca_eval``: questions are a JSON list (or JSON lines) of ``{instruction, …}``, answers a JSON list of
  ``{instruction, output, generator, dataset}``, as AlpacaEval's ``--model_outputs``.
- ``arena_hard``: questions are JSON lines, of version 0.1 (``{question_id, turns: [{content}], …}``) or 2.0 (``{uid,
  prompt, …}``); answers are JSON lines for ``model_answer/NAME.jsonl`` of the same version.

Judging is not done here: it asks a model that is not this one.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from icon2_rt.pipeline.files import from_jsonl, text_of, to_jsonl
from icon2_rt.pipeline.loading import own_end_tokens, rendering
from icon2_rt.pipeline.sampling import neutral, sound
from icon2_rt.pipeline.templates import chat_frame
from icon2_rt.prompts import check_text

if TYPE_CHECKING:
    from icon2_rt import Completion, Runtime

Benchmark = Literal["alpaca_eval", "arena_hard"]
BENCHMARKS: tuple[Benchmark, ...] = ("alpaca_eval", "arena_hard")


def read_questions(path: str | Path, benchmark: Benchmark) -> list[tuple[str, Mapping[str, Any]]]:
    """The text of every question, with the record that it came in.

    Raises:
        ValueError: no question, or a record that is not of this benchmark, with its number and what it lacks.
        OSError: it cannot be read.
    """
    path = Path(path)
    data = path.read_bytes()
    records: list[Any]
    text = text_of(data, str(path))
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    else:
        records = list(from_jsonl(data, str(path)))
    found = [(_question(record, benchmark, f"{path}, record {n}"), record) for n, record in enumerate(records, start=1)]
    if not found:
        raise ValueError(f"{path} holds no question")
    return found


def _question(record: Any, benchmark: Benchmark, where: str) -> str:
    text: Any = None
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: must be an object, not {record!r:.60}")
    if benchmark == "alpaca_eval":
        text, wanted = record.get("instruction"), '"instruction"'
    elif "uid" in record:
        text, wanted = record.get("prompt"), '"prompt"'
    elif "question_id" in record:
        turns, wanted = record.get("turns"), '"turns" with one {"content": …}'
        if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], Mapping):
            text = turns[0].get("content")
    else:
        wanted = '"uid" and "prompt" (version 2.0), or "question_id" and "turns" (version 0.1)'
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: a question of {benchmark} needs {wanted}")
    try:
        check_text(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return text


def answer(
    rt: Runtime,
    questions: Sequence[tuple[str, Mapping[str, Any]]],
    benchmark: Benchmark,
    name: str,
    *,
    max_new_tokens: int = 2048,
    temperature: float = 0.0,
    seed: int = 0,
    done: Callable[[int], None] = lambda n: None,
) -> list[dict[str, Any]]:
    """The benchmark's records of the model's answers, in the order of the questions.

    Args:
        name: what the benchmark calls this model.
        temperature: 0 is greedy.

    Raises:
        ValueError: a question that leaves no room for ``max_new_tokens``, by its number.
    """
    frame = chat_frame(rt.tokenizer, own_end_tokens(rt), variables=rt.template.variables, clock=rt.template.clock)
    chats = [frame.messages(text) for text, _ in questions]
    room = rt.spec.max_length - max_new_tokens
    for n, chat in enumerate(chats, start=1):
        if (length := frame.length(chat)) > room:
            raise ValueError(
                f"question {n} has {length} tokens and leaves no room for max_new_tokens = {max_new_tokens}: the model "
                f"has {rt.spec.max_length} positions"
            )
    sampling = neutral(
        temperature=temperature,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=frame.end_token_ids,
        stop_string=frame.end_string,
    )
    completions: list[Completion | None] = [None] * len(chats)
    with rendering(rt, frame):
        stream = rt.stream_branches(chats, [None], seed=seed, generation_config=sampling)
        for finished, output in enumerate(stream, start=1):
            [completions[output.index]] = sound(output.branches)
            done(finished)
    make = _alpaca_eval if benchmark == "alpaca_eval" else _arena_hard
    return [
        make(record, text, frame.said(completion), len(completion.token_ids), name)
        for (text, record), completion in zip(questions, completions, strict=True)
        if completion is not None
    ]


def _alpaca_eval(record: Mapping[str, Any], text: str, said: str, tokens: int, name: str) -> dict[str, Any]:
    dataset = {"dataset": record["dataset"]} if "dataset" in record else {}
    return {"instruction": text, "output": said, "generator": name, **dataset}


def _arena_hard(record: Mapping[str, Any], text: str, said: str, tokens: int, name: str) -> dict[str, Any]:
    style = {"token_len": tokens, **_markdown(said)}
    number = record.get("uid", record.get("question_id"))
    own_id = hashlib.sha256(f"{name}/{number}/{said}".encode()).hexdigest()[:22]
    if "uid" in record:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": {"answer": said}}]
        return {
            "uid": number,
            "ans_id": own_id,
            "model": name,
            "messages": messages,
            "tstamp": time.time(),
            "metadata": style,
        }
    return {
        "question_id": number,
        "answer_id": own_id,
        "model_id": name,
        "choices": [{"index": 0, "turns": [{"content": said, "token_len": style["token_len"]}]}],
        "tstamp": time.time(),
        "conv_metadata": style,
    }


def _markdown(text: str) -> dict[str, dict[str, int]]:
    """What the benchmark's style control looks at: headings, lists and bold text outside code blocks."""
    prose = re.sub(r"```[^`]*```", "", text)
    headings = [len(marks) for marks in re.findall(r"^(#{1,6})\s", prose, re.MULTILINE)]
    return {
        "header_count": {f"h{level}": headings.count(level) for level in range(1, 7)},
        "list_count": {
            "ordered": len(re.findall(r"^\s*\d+\.\s", prose, re.MULTILINE)),
            "unordered": len(re.findall(r"^\s*[-*+]\s", prose, re.MULTILINE)),
        },
        "bold_count": {
            "**": len(re.findall(r"\*\*[^*\n]+\*\*", prose)),
            "__": len(re.findall(r"__[^_\n]+__", prose)),
        },
    }


def to_bytes(records: Sequence[Mapping[str, Any]], benchmark: Benchmark) -> bytes:
    """The file that the benchmark reads."""
    if benchmark == "alpaca_eval":
        return (json.dumps(list(records), indent=2, ensure_ascii=False) + "\n").encode()
    return to_jsonl(records)
