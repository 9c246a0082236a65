"""Step 3: every kept instruction is answered twice in one pass, pushed towards its criterion and away from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icon2_rt.pipeline.config import PairsConfig
from icon2_rt.pipeline.instructions import Instruction
from icon2_rt.pipeline.sampling import neutral, stage_seed
from icon2_rt.pipeline.templates import ChatFrame

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from icon2_rt import Completion, DirectionSet, PairedOutput, Runtime, Scored

REPETITION_NGRAM = 4


@dataclass(frozen=True)
class Kept:
    """An instruction that passed the filter: its criterion c*, the score under it, the margin (None: one criterion)."""

    instruction: Instruction
    criterion: str
    score: float
    margin: float | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.instruction.id,
            "instruction": self.instruction.text,
            "criterion": self.criterion,
            "score": self.score,
            "margin": self.margin,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Kept:
        instruction = Instruction(record["id"], record["instruction"])
        return cls(instruction, record["criterion"], record["score"], record["margin"])


@dataclass(frozen=True)
class Strengths:
    """γ⁺ and γ⁻ in residual units, and the blocks (0-based) that they act on."""

    positive: float
    negative: float
    layers: tuple[int, ...]


def decode(
    rt: Runtime,
    frame: ChatFrame,
    kept: Sequence[Kept],
    directions: DirectionSet,
    strengths: Strengths,
    config: PairsConfig,
    eos_token_ids: Sequence[int],
    seed: int,
    done: Callable[[int], None] = lambda n: None,
) -> list[dict[str, Any]]:
    """One shard: the records of ``kept``, in their order (columns: :data:`icon2_rt.pipeline.dataset.COLUMNS`).

    The instruction is the whole prompt, without a system prompt. All of it is one call with a fixed list of prompts, so
    that the same shard on the same machine gives the same bytes.
    """
    chats = [frame.messages(item.instruction.text) for item in kept]
    banded = {d.name: d[list(strengths.layers)] for d in directions}
    outputs: list[PairedOutput | None] = [None] * len(kept)
    stream = rt.stream_pairs(
        chats,
        positive=[strengths.positive * banded[item.criterion] for item in kept],
        negative=[strengths.negative * banded[item.criterion] for item in kept],
        seed=stage_seed(seed, "pairs"),
        noise=config.noise,
        sample_ids=[item.instruction.id for item in kept],
        generation_config=response_sampling(config, eos_token_ids),
    )
    for n, output in enumerate(stream, start=1):
        outputs[output.index] = output
        done(n)
    finished = [output for output in outputs if output is not None]
    unsteered = rt.score(
        [chat for chat in chats for _ in range(2)],
        [completion for output in finished for completion in (output.positive, output.negative)],
    )
    return [
        record(item, output, strengths, unsteered[2 * i], unsteered[2 * i + 1])
        for i, (item, output) in enumerate(zip(kept, finished, strict=True))
    ]


def response_sampling(config: PairsConfig, eos_token_ids: Sequence[int]) -> GenerationConfig:
    """How responses are drawn, in pairs and in the calibration of their strengths."""
    return neutral(
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=eos_token_ids,
    )


def record(
    item: Kept, output: PairedOutput, strengths: Strengths, chosen_scored: Scored, rejected_scored: Scored
) -> dict[str, Any]:
    """One row of the dataset."""
    chosen, rejected = output.positive, output.negative
    row = output.to_preference()
    return {
        **row,
        "id": item.instruction.id,
        "criterion": item.criterion,
        "score": item.score,
        "margin": item.margin,
        "strength_positive": strengths.positive,
        "strength_negative": strengths.negative,
        "first_difference": first_difference(chosen.token_ids, rejected.token_ids),
        **_response("chosen", chosen, chosen_scored),
        **_response("rejected", rejected, rejected_scored),
    }


def _response(side: str, completion: Completion, scored: Scored) -> dict[str, Any]:
    return {
        f"{side}_tokens": len(completion.token_ids),
        f"{side}_finish": completion.finish_reason,
        f"{side}_logprob": sum(completion.logprobs),
        f"{side}_logprob_unsteered": sum(scored.logprobs),
        f"{side}_repetition": repetition(completion.token_ids),
        f"{side}_seed": completion.seed,
    }


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position where two token lists differ; None if they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def repetition(tokens: Sequence[int], n: int = REPETITION_NGRAM) -> float:
    """The share of n-grams that occurred before in the same text: 0 for none, near 1 for a text caught in a loop."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
