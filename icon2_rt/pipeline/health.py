"""Health figures: what tells a usable dataset from one that only looks finished. All from data that is there anyway;
none needs a judge. What is good and what is bad of them: :mod:`icon2_rt.pipeline.checks`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from icon2_rt.models import comparable
from icon2_rt.pipeline.pairs import Strengths

if TYPE_CHECKING:
    from icon2_rt import DirectionSet, Steering

BINS = 24


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


def spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of the places 0 … count - 1, evenly spaced."""
    size = min(most, count)
    return [i * count // size for i in range(size)]


def histograms(series: Mapping[str, Sequence[float]], bins: int = BINS) -> dict[str, Any]:
    """How values are spread, over bins that all series share: ``edges`` and per series ``counts``.

    The bins reach over the middle 98 % of all values; what lies beyond is counted in the first or the last one.
    """
    values = np.concatenate([np.asarray(one, dtype=float) for one in series.values()])
    low, high = np.quantile(values, (0.01, 0.99)) if len(values) else (0.0, 1.0)
    if high <= low:
        low, high = low - 0.5, low + 0.5
    edges = np.linspace(low, high, bins + 1)
    counts = {name: np.histogram(np.clip(one, low, high), edges)[0].tolist() for name, one in series.items()}
    return {"edges": edges.tolist(), "counts": counts}


def made_elsewhere(directions: DirectionSet, fingerprint: str) -> list[str]:
    """A warning for each direction of another model than the one in use, or that does not say so reliably."""
    return [
        f"{d.name}: made on another model ({d.model_name or d.model}), not on the one in use"
        if comparable(d.model)
        else f"{d.name}: whether it was made on the model in use cannot be told, its fingerprint is of an older kind"
        for d in directions
        if d.model is not None and d.model != fingerprint
    ]


def without_text(record: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset row as :func:`pair_health` reads it: figures only, so that a large dataset fits in memory."""
    figures = {key: value for key, value in record.items() if not isinstance(value, list)}
    for side in ("chosen", "rejected"):
        figures[f"{side}_empty"] = not record[side][0]["content"].strip()
    return figures


def pair_health(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures over the pairs of a dataset (rows as :func:`without_text` gives them).

    Shares are of all pairs or all responses, lengths in tokens, log-probabilities per token under the unsteered model;
    rewards where a judge gave them.
    """
    if not records:
        return {"pairs": 0}
    differing = [r["first_difference"] for r in records if r["first_difference"] is not None]
    health: dict[str, Any] = {
        "pairs": len(records),
        "per_criterion": dict(sorted(Counter(r["criterion"] for r in records if r["criterion"] is not None).items())),
        "identical": 1 - len(differing) / len(records),
        "median_first_difference": median(differing) if differing else None,
        "length_ratio": _sum(records, "chosen_tokens") / max(1, _sum(records, "rejected_tokens")),
        "chosen_longer": fmean(
            (r["chosen_tokens"] > r["rejected_tokens"]) + 0.5 * (r["chosen_tokens"] == r["rejected_tokens"])
            for r in records
        ),
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
    sides = ("chosen", "rejected")
    health["distributions"] = {
        "tokens": histograms({side: [r[f"{side}_tokens"] for r in records] for side in sides}),
        "logprob_per_token": histograms(
            {side: [r[f"{side}_logprob_unsteered"] / max(1, r[f"{side}_tokens"]) for r in records] for side in sides}
        ),
        "first_difference": histograms({"pairs": differing}) if differing else None,
    }
    if all(r.get("chosen_reward") is not None for r in records):
        rewards = {side: [r[f"{side}_reward"] for r in records] for side in sides}
        health["distributions"]["reward"] = histograms(rewards)
        for side in sides:
            health[side]["reward"] = fmean(rewards[side])
    return health


def _sum(records: Sequence[Mapping[str, Any]], column: str) -> float:
    return sum(r[column] for r in records)
