"""Step 3: every kept instruction is answered several times in one pass, pushed towards its criterion and away from it.

A *plan* lists the branches of one prompt from the best to the worst by their grade: 1 is the positive strength γ⁺, 0
the negative one γ⁻, and what lies between is in proportion. A pair is two branches, a ternary record three (the middle
one unsteered), a ladder K. The first is ``chosen``, the last ``rejected``: every shape is a preference dataset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from icon2_rt.pipeline.config import PairsConfig
from icon2_rt.pipeline.instructions import Instruction
from icon2_rt.pipeline.sampling import neutral, sound, stage_seed
from icon2_rt.pipeline.templates import Chat, ChatFrame

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from icon2_rt import Completion, Direction, DirectionSet, Runtime, Scored, Steering

REPETITION_NGRAM = 4


@dataclass(frozen=True)
class Kept:
    """An instruction that passed the filter: its criterion c*, the score under it, the margin (None: one criterion),
    and its scores under all criteria."""

    instruction: Instruction
    criterion: str
    score: float
    margin: float | None
    scores: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.instruction.id,
            "instruction": self.instruction.text,
            "criterion": self.criterion,
            "score": self.score,
            "margin": self.margin,
            "scores": dict(self.scores),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Kept:
        instruction = Instruction(record["id"], record["instruction"])
        return cls(instruction, record["criterion"], record["score"], record["margin"], record["scores"])


@dataclass(frozen=True)
class Strengths:
    """γ⁺ and γ⁻ of every criterion in residual units, and the blocks (0-based) that they act on.

    ``profile`` has one factor per controlled block, of mean 1: the strength at ``layers[k]`` is γ · ``profile[k]``. All
    are 1 where one strength is for all blocks.
    """

    positive: Mapping[str, float]
    negative: Mapping[str, float]
    layers: tuple[int, ...]
    profile: tuple[float, ...]

    def at(self, name: str, grade: float) -> float:
        """A criterion's strength at a grade: 1 is γ⁺, 0 is γ⁻."""
        return grade * self.positive[name] + (1 - grade) * self.negative[name]

    def push(self, direction: Direction, gamma: float) -> Steering:
        """γ along a direction, spread over the controlled blocks."""
        each = [0.0] * direction.n_layers
        for layer, factor in zip(self.layers, self.profile, strict=True):
            each[layer] = gamma * factor
        return each * direction


def residual_profile(norms: Sequence[float], unit: str) -> tuple[float, ...]:
    """How strengths are spread over controlled blocks of mean residual norms ``norms``: a factor of mean 1 for each.

    In units of the residual stream every block gets the same; by "dose" each gets the same share of its own norm.
    """
    mean = fmean(norms)
    return tuple(norm / mean for norm in norms) if unit == "dose" else (1.0,) * len(norms)


@dataclass(frozen=True)
class Branch:
    """One answer to be: its grade in [0, 1], its strength in residual units (0: unsteered), and the steering itself."""

    grade: float
    strength: float
    steering: Steering | None


@dataclass(frozen=True)
class Plan:
    """The branches of one prompt that make one record, from best to worst, and the criterion that the record names."""

    item: Kept
    criterion: str
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Answer:
    """A finished branch, what the unsteered model makes of it, its text as the assistant's message, and what an outside
    judge gave it (None: nobody asked)."""

    completion: Completion
    scored: Scored
    text: str
    reward: float | None = None


@dataclass(frozen=True)
class Draft:
    """The beginning of a response that all branches of a prompt share: unsteered, and without its ending token."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    seed: int | None


def plan(item: Kept, directions: DirectionSet, strengths: Strengths, config: PairsConfig) -> list[Plan]:
    """What one instruction is answered with: one plan, or with ``pairs.directions = "each"`` one per criterion."""
    if config.directions == "sum":
        weights = config.weights or dict.fromkeys(directions.names, 1.0)
        steered = {"+".join(weights): weights}
    else:
        names = [item.criterion] if config.directions == "best" else directions.names
        steered = {name: {name: 1.0} for name in names}
    grades: Sequence[float | None]  # None: unsteered, at whatever grade that is
    if config.shape == "ladder":
        grades = [1 - k / (config.rungs - 1) for k in range(config.rungs)]
    else:
        grades = (1, 0) if config.shape == "pair" else (1, None, 0)

    def branch(weights: Mapping[str, float], grade: float | None) -> Branch:
        if grade is None:
            best, worst = (fmean(strengths.at(name, end) for name in weights) for end in (1, 0))
            return Branch(-worst / (best - worst), 0.0, None)
        gammas = {name: strengths.at(name, grade) for name in weights}
        pushes = [strengths.push(directions[name], weight * gammas[name]) for name, weight in weights.items()]
        return Branch(grade, fmean(gammas.values()), sum(pushes[1:], pushes[0]) if any(gammas.values()) else None)

    return [Plan(item, name, tuple(branch(weights, grade) for grade in grades)) for name, weights in steered.items()]


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
    """One shard: the records of ``kept``, in their order (columns: :data:`icon2_rt.pipeline.dataset.COLUMNS`), but for
    those with a branch whose logits were not finite.

    The instruction is the whole prompt, without a system prompt; with ``pairs.shared_tokens`` the beginning of an
    unsteered response is part of it. All of it is one call with a fixed list of prompts, so that the same shard on the
    same machine gives the same bytes.
    """
    chats = [frame.messages(item.instruction.text) for item in kept]
    plans = [plan(item, directions, strengths, config) for item in kept]
    ids = [item.instruction.id for item in kept]
    sampling = response_sampling(config, eos_token_ids, frame.end_string)
    drafts: list[Draft | None] = [None] * len(kept)
    prompts: list[Any] = list(chats)
    if config.shared_tokens:
        found = draft(rt, frame, chats, ids, config, eos_token_ids, seed)
        drafts = list(found)
        prompts = [[*rt.encode(chat), *d.tokens] for chat, d in zip(chats, found, strict=True)]
        sampling.max_new_tokens = config.max_new_tokens - config.shared_tokens
    rows = [[branch for p in several for branch in p.branches] for several in plans]  # the same number for all
    outputs: list[list[Completion]] = [[] for _ in kept]
    stream = rt.stream_branches(
        prompts,
        [[row[k].steering for row in rows] for k in range(len(rows[0]))],
        seed=stage_seed(seed, "pairs"),
        noise=config.noise,
        sample_ids=ids,
        generation_config=sampling,
    )
    for n, output in enumerate(stream, start=1):
        outputs[output.index] = [_behind(rt, chats[output.index], drafts[output.index], c) for c in output.branches]
        done(n)
    dealt = [
        (n, p, completions)
        for n, (several, output) in enumerate(zip(plans, outputs, strict=True))
        for p, completions in _dealt(several, output)
        if all(completion.finish_reason != "error" for completion in completions)
    ]
    if kept and not dealt:
        raise FloatingPointError(
            "no pair of a whole shard came to be: of each, a branch ended where its logits were not finite"
        )
    with rt.usage.during("figures"):
        scores = rt.score(
            [chats[n] for n, _, completions in dealt for _ in completions],
            [completion for _, _, completions in dealt for completion in completions],
        )
    scored = iter(scores)
    return [
        record(p, [Answer(c, next(scored), frame.said(c)) for c in completions], drafts[n], config)
        for n, p, completions in dealt
    ]


def _dealt(plans: Sequence[Plan], completions: Sequence[Completion]) -> Iterator[tuple[Plan, Sequence[Completion]]]:
    """The completions of one prompt, to the plans that asked for them."""
    start = 0
    for p in plans:
        yield p, completions[start : start + len(p.branches)]
        start += len(p.branches)


def n_records(kept: Sequence[Kept], directions: DirectionSet, config: PairsConfig) -> int:
    """How many records ``kept`` makes where every branch comes to its end."""
    return len(kept) * (len(directions.names) if config.directions == "each" else 1)


def draft(
    rt: Runtime,
    frame: ChatFrame,
    chats: Sequence[Any],
    ids: Sequence[int],
    config: PairsConfig,
    eos_token_ids: Sequence[int],
    seed: int,
) -> list[Draft]:
    """The first ``pairs.shared_tokens`` tokens of an unsteered response to every chat.

    A response that ends before that gives its first half: the branches must have something left to differ in.
    """
    sampling = response_sampling(config, eos_token_ids, frame.end_string)
    sampling.max_new_tokens = config.shared_tokens
    completions = sound(rt.generate(chats, sample_ids=ids, seed=stage_seed(seed, "drafts"), generation_config=sampling))
    drafts = []
    for completion in completions:
        whole = completion.finish_reason == "length"
        n = len(completion.token_ids) if whole else (len(completion.token_ids) - 1) // 2
        drafts.append(Draft(tuple(completion.token_ids[:n]), tuple(completion.logprobs[:n]), completion.seed))
    return drafts


def _behind(rt: Runtime, chat: Chat, draft: Draft | None, completion: Completion) -> Completion:
    """The whole response: what a branch wrote behind the shared beginning."""
    if draft is None:
        return completion
    tokens = [*draft.tokens, *completion.token_ids]
    return dataclasses.replace(
        completion,
        text=rt.decode(tokens, chat),
        message=rt.message(chat, tokens),
        token_ids=tokens,
        logprobs=[*draft.logprobs, *completion.logprobs],
    )


def response_sampling(
    config: PairsConfig, eos_token_ids: Sequence[int], stop_string: str | None = None
) -> GenerationConfig:
    """How responses are drawn, in pairs and in the calibration of their strengths."""
    return neutral(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=eos_token_ids,
        stop_string=stop_string,
    )


def record(p: Plan, answers: Sequence[Answer], draft: Draft | None, config: PairsConfig) -> dict[str, Any]:
    """One row of the dataset."""
    item, best, worst = p.item, p.branches[0], p.branches[-1]
    row = {
        **preference(item.instruction, answers[0], answers[-1], config.per_token),
        "criterion": p.criterion,
        "score": item.scores.get(p.criterion, item.score),
        "margin": None if config.directions == "each" and p.criterion != item.criterion else item.margin,
        "strength_positive": best.strength,
        "strength_negative": worst.strength,
    }
    if config.shape == "ternary":
        row |= {"neutral": reply(answers[1]), **response_figures("neutral", answers[1], config.per_token)}
    if config.shape == "ladder":
        grades = [branch.grade for branch in p.branches]
        row |= {
            "responses": [reply(answer) for answer in answers],
            "strengths": [branch.strength for branch in p.branches],
            "weights": [grade / sum(grades) for grade in grades],
            **_columns([response_figures("responses", answer, config.per_token) for answer in answers]),
        }
    if draft is not None:
        row |= {"shared_tokens": len(draft.tokens), "shared_seed": draft.seed}
    return row


def preference(instruction: Instruction, chosen: Answer, rejected: Answer, per_token: bool = False) -> dict[str, Any]:
    """What every record has, whoever made it: prompt, chosen and rejected with their figures. The other columns that a
    steered record has are null."""
    return {
        "prompt": [{"role": "user", "content": instruction.text}],
        "chosen": reply(chosen),
        "rejected": reply(rejected),
        "id": instruction.id,
        "criterion": None,
        "score": None,
        "margin": None,
        "strength_positive": None,
        "strength_negative": None,
        "first_difference": first_difference(chosen.completion.token_ids, rejected.completion.token_ids),
        **response_figures("chosen", chosen, per_token),
        **response_figures("rejected", rejected, per_token),
    }


def reply(answer: Answer) -> list[dict[str, str]]:
    """A response as the chat message that answers the prompt."""
    return [{"role": "assistant", "content": answer.text}]


def response_figures(side: str, answer: Answer, per_token: bool = False) -> dict[str, Any]:
    """The columns of one response, ``{side}_…``; see :data:`icon2_rt.pipeline.dataset.PER_RESPONSE`."""
    completion, scored = answer.completion, answer.scored
    figures: dict[str, Any] = {
        "tokens": len(completion.token_ids),
        "finish": completion.finish_reason,
        "logprob": sum(completion.logprobs),
        "logprob_unsteered": sum(scored.logprobs),
        "logprob_unsteered_mean": fmean(scored.logprobs),
        "entropy": fmean(scored.entropies),
        "repetition": repetition(completion.token_ids),
        "seed": completion.seed,
    }
    if per_token:
        figures |= {"token_logprobs": list(scored.logprobs), "token_entropies": list(scored.entropies)}
    if answer.reward is not None:
        figures["reward"] = answer.reward
    return {f"{side}_{name}": value for name, value in figures.items()}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


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
