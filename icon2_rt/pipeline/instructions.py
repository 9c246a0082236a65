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
from icon2_rt.pipeline.instruction_files import read_records
from icon2_rt.pipeline.sampling import neutral, sound, stage_seed
from icon2_rt.pipeline.templates import ChatFrame
from icon2_rt.prompts import check_text

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from icon2_rt import Completion, Runtime

# Why a draw is dropped. "special": a special token or a mark of the chat template in it; "broken": half a character.
REASONS = ("truncated", "empty", "special", "broken", "length", "too long", "duplicate")
# Reasons that reports name only where they occur.
RARE = ("broken",)


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
    for i, completion in zip(ids, sound(completions), strict=True):
        text, reason = clean(completion, frame, rt.tokenizer, config)
        if reason is None and frame.length(frame.messages(text)) > room:
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
    if frame.special_ids.intersection(tokens):
        return "", "special"
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if frame.stop_string is not None:
        text = text.partition(frame.stop_string)[0]
    text = text.strip()
    if not text:
        return "", "empty"
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "", "broken"
    # Marks that are spelled out of ordinary tokens become real ones when the text is encoded, or pass for real ones.
    if any(mark in text for mark in frame.marks) or frame.special_ids.intersection(
        tokenizer(text, add_special_tokens=False)["input_ids"]
    ):
        return "", "special"
    if len(text) < config.min_chars or (config.max_chars is not None and len(text) > config.max_chars):
        return "", "length"
    return text, None


def without_duplicates(
    instructions: Iterable[Instruction], seen: Iterable[Instruction] = (), criteria: Sequence[str | None] | None = None
) -> tuple[list[Instruction], int]:
    """The first of each text (case, spacing and Unicode form aside) that is not in ``seen``; and how many went.

    ``criteria``: what some came with, one for each instruction; a text under two criteria is two instructions.
    """
    known: set[tuple[str, str | None]] = {(_normal(s.text), None) for s in seen}
    kept = []
    dropped = 0
    listed = list(instructions)
    for instruction, criterion in zip(listed, criteria or [None] * len(listed), strict=True):
        key = (_normal(instruction.text), criterion)
        if key in known:
            dropped += 1
        else:
            known.add(key)
            kept.append(instruction)
    return kept, dropped


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def read_instructions(path: str | Path) -> list[tuple[Instruction, Mapping[str, Any]]]:
    """Instructions from a file (see :mod:`icon2_rt.pipeline.instruction_files`), with the record that each came in.

    A record has a key ``instruction`` and may have an ``id`` (a whole number, unique) and a ``criterion``; the rest of
    it is passed through.

    Raises:
        ValueError: a kind of file that is not read, nothing in it, or a record that is wrong, with where it stands.
        OSError: it cannot be read.
    """
    found: list[tuple[Instruction, Mapping[str, Any]]] = []
    places: dict[int, str] = {}
    for where, record in read_records(path):
        text, number, criterion = record.get("instruction"), record.get("id"), record.get("criterion")
        number = len(found) if number is None else number
        try:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f'"instruction" must be a text, not {text!r:.60}')
            check_text(text)
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
                raise ValueError(f'"id" must be a whole number from 0 to 2⁶³ − 1, not {number!r:.60}')
            if criterion is not None and not isinstance(criterion, str):
                raise ValueError(f'"criterion" must be a text, not {criterion!r:.60}')
            if number in places:
                raise ValueError(f"the id {number} occurs more than once, first in {places[number]}")
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from None
        places[number] = where
        found.append((Instruction(number, text.strip()), record))
    if not found:
        raise ValueError(f"{path} holds no instruction")
    return found
