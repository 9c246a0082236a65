"""From logits to tokens: transformers' processors in transformers' order, then a choice by counter-based noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icon2_rt.ops.philox import exponential_noise


@dataclass(frozen=True)
class RowSampling:
    """How each row of a batch samples. A field is None where no row needs it: the host knows, and skips the work.

    Attributes (rows first; the neutral value of a row that does not use it in brackets):
        sampled: ``[rows]`` bool, False = greedy.
        seeds: ``[rows, 2]`` int64, low and high word of the row seed.
        temperature: ``[rows]`` fp32 (1). top_k: ``[rows]`` int64 (vocabulary). top_p: ``[rows]`` fp32 (1).
        min_p: ``[rows]`` fp32 (0). repetition_penalty: ``[rows]`` fp32 (1).
        seen: ``[rows, vocab]`` bool, tokens of the prompt and the response so far; with repetition_penalty.
        banned: ``[rows, vocab]`` bool, tokens that may not come now (eos before min_new_tokens).
    """

    sampled: Tensor | None
    seeds: Tensor | None
    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    repetition_penalty: Tensor | None
    seen: Tensor | None
    banned: Tensor | None


def sample(logits: Tensor, index: Tensor, how: RowSampling) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability under the raw logits.

    Args:
        logits: ``[rows, vocab]``, any float dtype. index: ``[rows]`` int64, how many tokens the row has generated.

    Returns:
        tokens ``[rows]`` int64; log-softmax of the raw logits at them ``[rows]`` fp32.
    """
    raw = logits.float()
    scores = process(raw, how)
    if how.sampled is None or how.seeds is None:
        tokens = scores.argmax(dim=-1)
    else:
        race = exponential_noise(how.seeds, index, raw.shape[1]) / warp(scores, how).double().softmax(dim=-1)
        tokens = torch.where(how.sampled, race.argmin(dim=-1), scores.argmax(dim=-1))
    logprobs = raw.gather(1, tokens[:, None])[:, 0] - raw.logsumexp(dim=-1)
    return tokens, logprobs


def process(scores: Tensor, how: RowSampling) -> Tensor:
    """``[rows, vocab]``; what also bears on a greedy choice: repetition penalty (prompt included), banned tokens."""
    if how.repetition_penalty is not None and how.seen is not None:
        penalty = how.repetition_penalty[:, None]
        scores = torch.where(how.seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if how.banned is not None:
        scores = scores.masked_fill(how.banned, -torch.inf)
    return scores


def warp(scores: Tensor, how: RowSampling) -> Tensor:
    """Temperature, top_k, top_p, min_p, in this order: those that fall out become -inf. ``[rows, vocab]`` fp32.

    Ties follow transformers: top_k keeps everything equal to the k-th; top_p keeps the smallest set whose mass reaches
    p (at least one); min_p keeps what has at least min_p of the largest probability.
    """
    if how.temperature is not None:
        scores = scores / how.temperature[:, None]
    if how.top_k is not None:
        ordered = scores.sort(dim=-1, descending=True).values
        kth = ordered.gather(1, (how.top_k.clamp(max=scores.shape[1]) - 1)[:, None])
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if how.top_p is not None:
        ordered, order = scores.sort(dim=-1)
        below = ordered.softmax(dim=-1).cumsum(dim=-1)
        drop = (below <= (1 - how.top_p)[:, None]) & (how.top_p < 1)[:, None]
        drop[:, -1] = False
        scores = scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    if how.min_p is not None:
        probs = scores.softmax(dim=-1)
        scores = scores.masked_fill(probs < how.min_p[:, None] * probs.amax(dim=-1, keepdim=True), -torch.inf)
    return scores
