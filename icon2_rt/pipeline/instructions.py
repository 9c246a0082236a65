"""Step 2a: the model writes its own instructions, from the chat template up to where the user's text would begin.

A draw is kept if it ended by itself, is not empty, holds no stray special token and has not been seen before. How many
fell to which rule is part of every report.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icon2_rt.pipeline.config import InstructionsConfig
from icon2_rt.pipeline.files import from_jsonl
from icon2_rt.pipeline.sampling import neutral, stage_seed
from icon2_rt.pipeline.templates import ChatFrame, chat_length

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from icon2_rt import Completion, Runtime

# Why a draw is dropped, in the order in which the rules are applied.
REASONS = ("truncated", "empty", "special", "length", "too long", "duplicate")


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``id`` is its number among the draws, and the sample id of everything decoded from it."""

    id: int
    text: str


def synthesise(
    rt: Runtime, frame: ChatFrame, ids: Sequence[int], config: InstructionsConfig, seed: int, room: int
) -> tuple[list[Instruction], Counter[str]]:
    """Draw one instruction per id and drop the unusable ones, also those whose chat has more than ``room`` tokens.

    Duplicates are left in: they can only be told over all shards together, see :func:`without_duplicates`.

    Returns: the usable instructions in the order of ``ids``, and the counts (``"drawn"`` and :data:`REASONS`).
    """
    completions = rt.generate(
        [list(frame.pre_query)] * len(ids),
        sample_ids=list(ids),
        seed=stage_seed(seed, "instructions"),
        generation_config=instruction_sampling(config, frame),
    )
    counts = Counter(drawn=len(ids))
    kept = []
    for i, completion in zip(ids, completions, strict=True):
        text, reason = clean(completion, frame, rt.tokenizer, config)
        if reason is None and chat_length(rt.tokenizer, frame.messages(text)) > room:
            reason = "too long"
        if reason is None:
            kept.append(Instruction(i, text))
        else:
            counts[reason] += 1
    return kept, counts


def instruction_sampling(config: InstructionsConfig, frame: ChatFrame) -> GenerationConfig:
    """How instructions are drawn: neutral settings, ended by the end of the user's turn."""
    return neutral(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=frame.stop_token_ids,
        stop_string=frame.stop_string,
    )


def clean(
    completion: Completion, frame: ChatFrame, tokenizer: Any, config: InstructionsConfig
) -> tuple[str, str | None]:
    """The instruction in a completion, and the rule that drops it (one of :data:`REASONS`) or None."""
    if completion.finish_reason == "length":
        return "", "truncated"
    tokens = list(completion.token_ids)
    if completion.finish_reason == "eos":
        tokens.pop()
    if {*tokens} & {*tokenizer.all_special_ids}:
        return "", "special"
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if frame.stop_string is not None:
        text = text.partition(frame.stop_string)[0]
    text = text.strip()
    if not text:
        return "", "empty"
    if len(text) < config.min_chars or (config.max_chars is not None and len(text) > config.max_chars):
        return "", "length"
    return text, None


def without_duplicates(
    instructions: Iterable[Instruction], seen: Iterable[Instruction] = ()
) -> tuple[list[Instruction], int]:
    """The first of each text (case, spacing and Unicode form aside) that is not in ``seen``; and how many went."""
    known = {_normal(s.text) for s in seen}
    kept = []
    dropped = 0
    for instruction in instructions:
        key = _normal(instruction.text)
        if key in known:
            dropped += 1
        else:
            known.add(key)
            kept.append(instruction)
    return kept, dropped


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def read_instructions(path: str | Path) -> list[tuple[Instruction, Mapping[str, Any]]]:
    """Instructions from a file: plain text with one on each line, or ``.jsonl`` with a key ``instruction`` each.

    A JSON line may carry an ``id`` (a whole number, unique) and a ``criterion``; the rest of it is passed through.

    Raises:
        ValueError: nothing in it, or a line that is wrong, with its number.
        OSError: it cannot be read.
    """
    path = Path(path)
    data = path.read_bytes()
    found: list[tuple[Instruction, Mapping[str, Any]]] = []
    if path.suffix in (".jsonl", ".json"):
        for record in from_jsonl(data, str(path)):
            text, number = record.get("instruction"), record.get("id", len(found))
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f'{path}, record {len(found) + 1}: "instruction" must be a text, not {text!r:.60}')
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ValueError(f'{path}, record {len(found) + 1}: "id" must be a whole number, not {number!r}')
            found.append((Instruction(number, text.strip()), record))
    else:
        try:
            lines = data.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
        found = [(Instruction(i, line.strip()), {}) for i, line in enumerate(filter(str.strip, lines))]
    if not found:
        raise ValueError(f"{path} holds no instruction")
    twice = [i for i, n in Counter(instruction.id for instruction, _ in found).items() if n > 1]
    if twice:
        raise ValueError(f"{path}: the id {twice[0]} occurs more than once")
    return found
