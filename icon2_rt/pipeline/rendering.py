"""What a trainer reads: does the chat template show a response as the model wrote it?

A trainer renders prompt and response by the template. Some templates change a response on the way: they cut out a
thought, trim white space, or leave the turn open. What is trained on is then not what was steered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from icon2_rt.pipeline.templates import ChatFrame
from icon2_rt.prompts import decode_behind

SAMPLE = 64  # so many records are rendered
SIDES = ("chosen", "rejected")


def examine(frame: ChatFrame, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The share of responses in ``records`` that are rendered as they were written, and why the others are not."""
    reasons: dict[str, int] = {}
    for record in records:
        for side in SIDES:
            reason = difference(frame, record["prompt"], record[side], record[f"{side}_finish"])
            if reason is not None:
                reasons[reason] = reasons.get(reason, 0) + 1
    responses = len(records) * len(SIDES)
    return {"responses": responses, "as_written": 1 - sum(reasons.values()) / responses, "reasons": reasons}


def difference(
    frame: ChatFrame, prompt: Sequence[Mapping[str, str]], response: Sequence[Mapping[str, str]], finish: str
) -> str | None:
    """What the template makes of a response that was not written so; None: nothing."""
    template = frame.template
    try:
        before, whole = template.encode(prompt), template.encode([*prompt, *response], generation_prompt=False)
    except ValueError:
        return "refused by the template"
    if whole[: len(before)] != before:
        return "does not follow the prompt"
    rest = whole[len(before) :]
    # The space in front may be the template's: a message has it or has it not, and the tokens are the same.
    said = response[0]["content"].removeprefix(" ")
    if not decode_behind(template.tokenizer, before, rest).removeprefix(" ").startswith(said):
        return "text changed"
    ends = set(frame.end_token_ids)
    if finish == "eos" and not ends.intersection(rest):
        return "end of the response missing"
    return None
