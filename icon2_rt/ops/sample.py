"""From logits to tokens: transformers' processors in transformers' order, then a choice by counter-based noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icon2_rt.ops.philox import exponential_noise
from icon2_rt.ops.state import RowState


@dataclass(frozen=True)
class RowSampling:
    """How each row of a batch samples, and when it ends. A field is None where the host knows that no row needs it.

    Attributes (rows first; the neutral value of a row that does not use it in brackets):
        sampled: ``[rows]`` bool, False = greedy.
        seeds: ``[rows, 2]`` int64, low and high word of the row seed.
        temperature: ``[rows]`` fp32 (1). top_k: ``[rows]`` int32 (vocabulary). top_p: ``[rows]`` fp32 (1).
        min_p: ``[rows]`` fp32 (0). repetition_penalty: ``[rows]`` fp32 (1).
        seen: ``[rows, vocab]`` bool, tokens of the prompt and the response so far, kept up to date by
            :func:`sample`; with repetition_penalty.
        eos: ``[rows, E]`` int32, the tokens that end a row, -1 in unused places. They may not come before
            ``min_tokens [rows]`` int32 (0) tokens are generated.
        budget: ``[rows]`` int32, how many tokens a row may generate.
        scratch: uint8, memory that an op may leave anything in, of at least as many bytes as the backend's
            ``sample_scratch(rows, vocab)`` says; None: an op that needs some allocates it in every call.
    """

    sampled: Tensor | None
    seeds: Tensor | None
    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    repetition_penalty: Tensor | None
    seen: Tensor | None
    eos: Tensor
    min_tokens: Tensor | None
    budget: Tensor
    scratch: Tensor | None = None


def sample(logits: Tensor, how: RowSampling, state: RowState) -> None:
    """One token for every running row, its log-probability under the raw logits, and the row's next state.

    Args:
        logits: ``[rows, vocab]``, any float dtype.
        state: advanced in place where a row runs: ``tokens`` and ``logprobs`` are those of the new token, positions and
            generated grow by one, ``running`` ends with an eos token or with the budget. Other rows stay as they are.
    """
    raw = logits.float()
    scores = process(raw, how, state)
    if how.sampled is None or how.seeds is None:
        tokens = scores.argmax(dim=-1)
    else:
        noise = exponential_noise(how.seeds, state.generated.long(), raw.shape[1])
        race = noise / warp(scores, how).double().softmax(dim=-1)
        tokens = torch.where(how.sampled, race.argmin(dim=-1), scores.argmax(dim=-1))
    runs = state.running
    state.logprobs.copy_(
        torch.where(runs, raw.gather(1, tokens[:, None])[:, 0] - raw.logsumexp(dim=-1), state.logprobs)
    )
    state.tokens.copy_(torch.where(runs, tokens, state.tokens))
    state.positions.add_(runs)
    state.generated.add_(runs)
    if how.seen is not None:
        here = state.tokens[:, None]
        how.seen.scatter_(1, here, how.seen.gather(1, here) | runs[:, None])
    runs.logical_and_((tokens[:, None] != how.eos).all(dim=1)).logical_and_(state.generated < how.budget)


def process(scores: Tensor, how: RowSampling, state: RowState) -> Tensor:
    """``[rows, vocab]``; what also bears on a greedy choice: repetition penalty (prompt included), no early eos."""
    if how.repetition_penalty is not None and how.seen is not None:
        penalty = how.repetition_penalty[:, None]
        scores = torch.where(how.seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if how.min_tokens is not None:
        rows, vocab = scores.shape
        early = (state.generated < how.min_tokens)[:, None] & (how.eos >= 0)
        banned = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=scores.device)  # one column for unused places
        banned.scatter_(1, torch.where(early, how.eos, vocab).long(), True)
        scores = scores.masked_fill(banned[:, :-1], -torch.inf)
    return scores


def warp(scores: Tensor, how: RowSampling) -> Tensor:
    """Temperature, top_k, top_p, min_p, in this order: those that fall out become -inf. ``[rows, vocab]`` fp32.

    A filter is a threshold, so that equal scores share their fate whatever their order: top_k keeps everything equal to
    the k-th (as transformers does); top_p keeps a score if what is above it has less than p of the mass, so the
    smallest set whose mass reaches p and what equals its last (transformers cuts through equal scores as its sort has
    left them); min_p keeps what has at least min_p of the largest probability.
    """
    if how.temperature is not None:
        scores = scores / how.temperature[:, None]
    if how.top_k is not None:
        ordered = scores.sort(dim=-1, descending=True).values
        kth = ordered.gather(1, (how.top_k.long().clamp(max=scores.shape[1]) - 1)[:, None])
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if how.top_p is not None:
        ordered = scores.sort(dim=-1).values
        below = ordered.softmax(dim=-1).cumsum(dim=-1)
        drop = (below <= (1 - how.top_p)[:, None]) & (how.top_p < 1)[:, None]
        drop[:, -1] = False
        last = ordered.masked_fill(drop, torch.inf).amin(dim=-1, keepdim=True)
        scores = scores.masked_fill(scores < last, -torch.inf)
    if how.min_p is not None:
        probs = scores.softmax(dim=-1)
        scores = scores.masked_fill(probs < how.min_p[:, None] * probs.amax(dim=-1, keepdim=True), -torch.inf)
    return scores
