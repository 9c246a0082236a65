"""The oracle: transformers with forward hooks that apply the steering law, and decoding by full recomputation.

Nothing of the engine is used, and no cache: every token is the argmax of one plain forward pass over the whole
sequence. The law is written from its definition: all inner products are taken from the state before any term, and
terms with beta = -1 that meet on a block are one orthogonal projection (solved by a pseudo-inverse here).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from icon2_rt.steering import Steering


def first_steered(prompt_length: int, scope: str) -> int:
    """The first absolute position that a scope steers."""
    return {"all": 0, "response": prompt_length - 1, "generated": prompt_length}[scope]


def law(h: Tensor, steering: Steering, layer: int) -> Tensor:
    """The steered ``h`` (``[..., hidden]``, computed in fp64, returned in h's dtype) after block ``layer``."""
    state = h.double()
    delta = torch.zeros_like(state)
    pinned, targets = [], []
    touched = False
    for term in steering.terms:
        alpha, beta = float(term.alpha[layer]), float(term.beta[layer])
        if alpha == 0 and beta == 0:
            continue
        touched = True
        u = term.direction.vectors[layer].double()
        if beta == -1:
            pinned.append(u)
            targets.append(alpha)
        else:
            delta += (alpha + beta * (state @ u))[..., None] * u
    if pinned:
        U, t = torch.stack(pinned), torch.tensor(targets, dtype=torch.float64)
        delta += (t - state @ U.T) @ torch.linalg.pinv(U, rcond=1e-6).T
    if not touched:
        return h
    steered = state + delta
    if steering.keep_norm:
        before, after = state.norm(dim=-1, keepdim=True), steered.norm(dim=-1, keepdim=True)
        steered = torch.where(after == 0, steered, steered * before / after)
    return steered.to(h.dtype)


@contextmanager
def steered(model: PreTrainedModel, steering: Steering | None, start: int) -> Iterator[None]:
    """Within the context, every block's output at positions ``start`` and later is steered."""
    handles = []
    for index, block in enumerate(model.model.layers if steering is not None else ()):

        def hook(module: nn.Module, args: object, output: Tensor | tuple, index: int = index) -> Tensor | tuple:
            states = output[0] if isinstance(output, tuple) else output
            states = torch.cat([states[:, :start], law(states[:, start:], steering, index)], dim=1)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handles.append(block.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Sequence[int], steering: Steering | None = None, start: int = 0) -> Tensor:
    """``[len(ids), vocab]`` fp32: one forward pass over the whole sequence."""
    with steered(model, steering, start):
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


@torch.no_grad()
def states(model: PreTrainedModel, ids: Sequence[int], steering: Steering | None = None, start: int = 0) -> Tensor:
    """``[n_layers, len(ids), hidden]``: what leaves every block (steered), the last before the final norm."""
    found: list[Tensor] = []
    with steered(model, steering, start):

        def read(module: nn.Module, args: object, output: Tensor | tuple) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[0].float())

        handles = [block.register_forward_hook(read) for block in model.model.layers]
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        for handle in handles:
            handle.remove()
    return torch.stack(found)


@dataclass(frozen=True)
class Decoded:
    """``logits`` ``[n_new, vocab]`` are those that each token was drawn from; ``logprobs`` of the drawn tokens."""

    token_ids: list[int]
    logits: Tensor
    logprobs: list[float]


def response_logits(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int], steering: Steering | None
) -> Tensor:
    """``[len(completion), vocab]``: the logits that each token of the completion is drawn from."""
    start = first_steered(len(prompt), steering.scope) if steering is not None else 0
    return logits(model, [*prompt, *completion[:-1]], steering, start)[len(prompt) - 1 :]


def teacher_forced(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int], steering: Steering | None = None
) -> Decoded:
    """Score a given completion in one pass."""
    rows = response_logits(model, prompt, completion, steering)
    logprobs = torch.log_softmax(rows.double(), dim=-1)[range(len(completion)), list(completion)]
    return Decoded(list(completion), rows, logprobs.tolist())


def greedy(
    model: PreTrainedModel, prompt: Sequence[int], n: int, steering: Steering | None = None, draft: Sequence[int] = ()
) -> Decoded:
    """Greedy decoding by recomputing the whole sequence, without a cache.

    Args:
        draft: a guess of the result, to save time: it is believed only as far as every one of its tokens is the argmax
            after those before it, so the result is the same with any draft or none.
    """
    start = first_steered(len(prompt), steering.scope) if steering is not None else 0
    sure: list[int] = []
    while len(sure) < n:
        guess = [*sure, *draft[len(sure) : n]]
        argmax = logits(model, [*prompt, *guess], steering, start)[len(prompt) - 1 :].argmax(dim=-1).tolist()
        agreed = next((i for i, (a, b) in enumerate(zip(argmax, guess, strict=False)) if a != b), len(guess))
        sure = argmax[: min(agreed + 1, n)]
        if sure[: len(draft)] != list(draft[: len(sure)]):
            draft = ()
    return teacher_forced(model, prompt, sure, steering)
