"""Does the steering do what it is for? Asked of a sample of the finished pairs, beside an unsteered response to each.

Nobody judges: everything is what the *unsteered* model makes of the three texts, chosen, neutral and rejected.

- *projection*: ⟨h, u_c*⟩ where the model reads a response, the mean over some of its tokens, per block. Given in
  deviations of the neutral ones around their criterion's mean, so that blocks and criteria can stand side by side.
- *agreement*: how much likelier a response is under the criterion's positive system prompt than under its negative
  one, in nats per token. It needs those prompts, which ready directions do not bring.
- *loss*: how many nats per token a steered response is less likely than the neutral one: broken text shows there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icon2_rt.pipeline.config import PairsConfig
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.loading import system_tokens
from icon2_rt.pipeline.pairs import response_sampling
from icon2_rt.pipeline.sampling import sound, stage_seed
from icon2_rt.pipeline.templates import ChatFrame

if TYPE_CHECKING:
    from icon2_rt import DirectionSet, Runtime

SIDES = ("chosen", "neutral", "rejected")
SAMPLE = 64
# Of a response's tokens so many, evenly spaced and with the last, are where its projection is taken.
POSITIONS = 4


def measure(
    rt: Runtime,
    frame: ChatFrame,
    records: Sequence[Mapping[str, Any]],
    directions: DirectionSet,
    criteria: Mapping[str, Criterion],
    layers: Sequence[int],
    config: PairsConfig,
    eos_token_ids: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """The figures over ``records`` (rows of the dataset), or ``{"pairs": 0}`` if none of them can be read.

    Args:
        records: their ``criterion`` is a direction's name, or several joined by "+" (steered by their sum).
        criteria: empty where their prompts are not known; then there is no agreement.
        layers: the controlled blocks, over which one figure per response is the mean.
    """
    criteria = {name: criteria[name] for name in directions.names if name in criteria}
    if any(record["criterion"] not in criteria for record in records):
        criteria = {}  # several criteria in one steering: no one pair of prompts belongs to it
    room = rt.spec.max_length - (system_tokens(rt, frame, criteria) if criteria else 0) - config.max_new_tokens
    records = [record for record in records if len(rt.encode(record["prompt"])) <= room]
    if not records:
        return {"pairs": 0}
    neutral = rt.generate(
        [record["prompt"] for record in records],
        seed=stage_seed(seed, "effect"),
        sample_ids=[record["id"] for record in records],
        generation_config=response_sampling(config, eos_token_ids, frame.end_string),
    )
    texts: dict[str, list[str]] = {
        side: [record[side][0]["content"] for record in records] for side in ("chosen", "rejected")
    }
    texts["neutral"] = [frame.said(completion) for completion in sound(neutral)]
    shifts = _standardised(
        {side: _projections(rt, records, texts[side], directions) for side in SIDES},
        [record["criterion"] for record in records],
    )
    band = {side: shift[:, list(layers)].mean(dim=1).tolist() for side, shift in shifts.items()}
    plain = {side: _per_token(rt, [record["prompt"] for record in records], texts[side]) for side in SIDES}
    return {
        "pairs": len(records),
        "ids": [record["id"] for record in records],
        "projection": {
            "per_block": {side: shift.mean(dim=0).tolist() for side, shift in shifts.items()},
            "controlled": band,
            "chosen_higher": higher(band["chosen"], band["rejected"]),
        },
        "agreement": _agreement(rt, frame, records, texts, criteria) if criteria else None,
        "logprob_per_token": {side: fmean(values) for side, values in plain.items()},
        "loss": {side: fmean(plain["neutral"]) - fmean(plain[side]) for side in ("chosen", "rejected")},
    }


def higher(a: Sequence[float], b: Sequence[float]) -> float:
    """The share of pairs with a > b; a tie is half."""
    return fmean((x > y) + 0.5 * (x == y) for x, y in zip(a, b, strict=True))


def token_ids(rt: Runtime) -> Callable[[str], list[int]]:
    """A text's tokens, no special ones added."""
    tokenizer = rt.tokenizer
    assert tokenizer is not None
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _projections(
    rt: Runtime, records: Sequence[Mapping[str, Any]], texts: Sequence[str], directions: DirectionSet
) -> Tensor:
    """⟨h, u⟩ on each record's own direction, the mean over its response's positions: fp32 ``[n, n_layers]``."""
    prompts: list[list[int]] = []
    owner: list[int] = []
    for i, (record, text) in enumerate(zip(records, texts, strict=True)):
        before = rt.encode(record["prompt"])
        response = rt.encode_completion(text, before)
        ends = {math.ceil(len(response) * (k + 1) / POSITIONS) for k in range(POSITIONS)}
        prompts += [[*before, *response[:end]] for end in sorted(ends)]
        owner += [i] * len(ends)
    own = torch.tensor([_is_part(record["criterion"], directions.names) for record in records])
    rows = torch.tensor(owner)
    projected = rt.project(prompts, directions)
    found = (projected * own[rows][:, :, None]).sum(dim=1) / own[rows].sum(dim=1)[:, None]
    sums = torch.zeros(len(records), found.shape[1]).index_add(0, rows, found)
    return sums / torch.bincount(rows)[:, None]


def _is_part(criterion: str, names: Sequence[str]) -> list[bool]:
    parts = [criterion] if criterion in names else criterion.split("+")
    return [name in parts for name in names]


def _standardised(projected: Mapping[str, Tensor], criteria: Sequence[str]) -> dict[str, Tensor]:
    """Each criterion's projections less the mean of its neutral ones, in deviations of the neutral ones."""
    means = torch.empty_like(projected["neutral"])
    for name in set(criteria):
        rows = [i for i, criterion in enumerate(criteria) if criterion == name]
        means[rows] = projected["neutral"][rows].mean(dim=0)
    deviation = (projected["neutral"] - means).square().mean(dim=0).sqrt()
    scale = torch.where(deviation > 0, deviation, math.inf)
    return {side: (values - means) / scale for side, values in projected.items()}


def _agreement(
    rt: Runtime,
    frame: ChatFrame,
    records: Sequence[Mapping[str, Any]],
    texts: Mapping[str, Sequence[str]],
    criteria: Mapping[str, Criterion],
) -> dict[str, Any]:
    def under(which: str) -> list[list[dict[str, str]]]:
        return [
            frame.messages(record["prompt"][0]["content"], getattr(criteria[record["criterion"]], which))
            for record in records
        ]

    positive, negative = under("positive"), under("negative")
    found: dict[str, Any] = {
        side: [
            p - n
            for p, n in zip(_per_token(rt, positive, texts[side]), _per_token(rt, negative, texts[side]), strict=True)
        ]
        for side in SIDES
    }
    return {**found, "chosen_higher": higher(found["chosen"], found["rejected"])}


def _per_token(rt: Runtime, prompts: Sequence[Any], texts: Sequence[str]) -> list[float]:
    """Log-probability per token of every text under the unsteered model; 0 for one without tokens."""
    return [fmean(s.logprobs) if s.logprobs else 0.0 for s in rt.score(prompts, texts)]
