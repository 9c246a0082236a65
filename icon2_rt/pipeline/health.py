"""Health checks: the figures that tell a usable dataset from one that only looks finished. All from data that is there
anyway; none needs a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icon2_rt.pipeline.pairs import Strengths

if TYPE_CHECKING:
    from icon2_rt import DirectionSet, Steering

# Where the contrast, ‖mean difference‖ / ‖h‖, is below this at every block, the two system prompts hardly change the
# model's state, and a direction is noise however consistent it looks. Measured on small models: 4 % where prompts did
# nothing; 35–78 % at the best block of the shipped model, which heeds them, though only 2–13 % in its middle.
WEAK_CONTRAST = 0.1
# Of all pairs; beyond it something is wrong with the strengths or the limit.
MANY_IDENTICAL, MANY_CUT = 0.1, 0.1


def residual_norms(states: Tensor) -> list[float]:
    """Mean ‖h‖ after every block from hidden states ``[n, n_layers, hidden]``."""
    return states.double().norm(dim=2).mean(dim=0).tolist()


def doses(strengths: Strengths, norms: Sequence[float], directions: DirectionSet) -> dict[str, list[float | None]]:
    """‖γu‖ / ‖h‖ per block for both signs, the mean over the directions; None where a block is not steered."""

    def per_block(steerings: Sequence[Steering]) -> list[float | None]:
        alpha = torch.stack([term.alpha.abs() for steering in steerings for term in steering.terms]).mean(dim=0)
        return [
            push / norm if push > 0 and norm > 0 else None for push, norm in zip(alpha.tolist(), norms, strict=True)
        ]

    return {
        "positive": per_block([strengths.push(d, strengths.positive[d.name]) for d in directions]),
        "negative": per_block([strengths.push(d, strengths.negative[d.name]) for d in directions]),
    }


def direction_health(directions: DirectionSet) -> dict[str, dict[str, list[float]]]:
    """Per criterion and figure, one number per block, as the extraction left them."""
    return {d.name: {key: [float(v) for v in values] for key, values in d.health.items()} for d in directions}


def similarities(directions: DirectionSet) -> list[list[float]]:
    """Mean cosine over blocks between every two directions: criteria that are nearly one and the same show."""
    stacked = torch.stack([d.vectors.double() for d in directions])  # [m, n_layers, hidden]
    return torch.einsum("alh,blh->ab", stacked, stacked).div(stacked.shape[1]).tolist()


def direction_warnings(directions: DirectionSet, fingerprint: str) -> list[str]:
    """What a person should know before trusting the directions; ``fingerprint`` is that of the model in use."""
    found = []
    for d in directions:
        if d.model is not None and d.model != fingerprint:
            found.append(f"{d.name}: made on another model ({d.model_name or d.model}), not on the one in use")
        contrast = d.health.get("contrast")
        if contrast and max(contrast) < WEAK_CONTRAST:
            found.append(
                f"{d.name}: the two system prompts move the state by at most {max(contrast):.1%} of its norm at any "
                f"block; the model may hardly heed them, and the direction may be noise"
            )
    return found


def without_text(record: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset row as :func:`pair_health` reads it: figures only, so that a large dataset fits in memory."""
    figures = {key: value for key, value in record.items() if not isinstance(value, list)}
    for side in ("chosen", "rejected"):
        figures[f"{side}_empty"] = not record[side][0]["content"].strip()
    return figures


def pair_health(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures over the pairs of a dataset (rows as :func:`without_text` gives them).

    Shares are of all pairs or all responses, lengths in tokens, log-probabilities per token under the unsteered model.
    """
    if not records:
        return {"pairs": 0}
    differing = [r["first_difference"] for r in records if r["first_difference"] is not None]
    health: dict[str, Any] = {
        "pairs": len(records),
        "per_criterion": dict(sorted(Counter(r["criterion"] for r in records).items())),
        "identical": 1 - len(differing) / len(records),
        "median_first_difference": median(differing) if differing else None,
        "length_ratio": _sum(records, "chosen_tokens") / max(1, _sum(records, "rejected_tokens")),
    }
    for side in ("chosen", "rejected"):
        tokens = max(1, _sum(records, f"{side}_tokens"))
        health[side] = {
            "mean_tokens": tokens / len(records),
            "cut_off": fmean(r[f"{side}_finish"] == "length" for r in records),
            "empty": fmean(r[f"{side}_empty"] for r in records),
            "repetition": fmean(r[f"{side}_repetition"] for r in records),
            "logprob_per_token": _sum(records, f"{side}_logprob_unsteered") / tokens,
        }
    return health


def pair_warnings(health: Mapping[str, Any]) -> list[str]:
    if not health["pairs"]:
        return ["no pairs"]
    found = []
    if health["identical"] > MANY_IDENTICAL:
        found.append(f"{health['identical']:.0%} of the pairs are identical: the strengths are too small")
    for side in ("chosen", "rejected"):
        if health[side]["cut_off"] > MANY_CUT:
            share = health[side]["cut_off"]
            found.append(f"{share:.0%} of the {side} responses were cut off: raise pairs.max_new_tokens")
        if health[side]["empty"] > 0:
            found.append(f"{health[side]['empty']:.0%} of the {side} responses are empty")
    return found


def _sum(records: Sequence[Mapping[str, Any]], column: str) -> float:
    return sum(r[column] for r in records)
