"""The two ways to make steered pairs with transformers alone: two `generate` calls, or one with a row per branch.

As fast as plain hooks get: one in-place addition of a ready vector to the last position. With left padding that is the
last prompt token at prefill and the new token at every later step, which is the scope "response".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from icon2_rt import Steering

Prompts = Sequence[Sequence[int]]
# Both branches' new tokens, per prompt.
Pairs = list[tuple[list[int], list[int]]]


def two_calls(
    model: PreTrainedModel, prompts: Prompts, positive: Steering, negative: Steering, new_tokens: int
) -> Pairs:
    """(a): all prompts with the positive push, then all with the negative one."""
    branches = []
    for steering in (positive, negative):
        with pushed(model, vectors(steering, model)):
            branches.append(generate(model, prompts, new_tokens))
    return list(zip(*branches, strict=True))


def one_call(
    model: PreTrainedModel, prompts: Prompts, positive: Steering, negative: Steering, new_tokens: int
) -> Pairs:
    """(b): one batch of twice the rows, each row with its own push."""
    n = len(prompts)
    sides = [vectors(steering, model) for steering in (positive, negative)]
    rows = {
        layer: torch.cat([side[layer].expand(n, -1) for side in sides]) for layer in sides[0].keys() & sides[1].keys()
    }
    with pushed(model, rows):
        tokens = generate(model, [*prompts, *prompts], new_tokens)
    return list(zip(tokens[:n], tokens[n:], strict=True))


def vectors(steering: Steering, model: PreTrainedModel) -> dict[int, Tensor]:
    """What a steering of plain additions adds at each block: ``[hidden]`` in the model's dtype, where the model is."""
    pushes: dict[int, Tensor] = {}
    for term in steering.terms:
        for layer in term.alpha.nonzero().flatten().tolist():
            pushes[layer] = pushes.get(layer, 0) + term.alpha[layer] * term.direction.vectors[layer]
    return {layer: push.to(model.device, model.dtype) for layer, push in pushes.items()}


@contextmanager
def pushed(model: PreTrainedModel, pushes: dict[int, Tensor]) -> Iterator[None]:
    """Within the context, a block's output gets its push (``[hidden]`` or ``[rows, hidden]``) at the last position."""

    def hook(push: Tensor) -> Callable[..., None]:
        def add(module: torch.nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            states[:, -1] += push

        return add

    handles = [model.model.layers[layer].register_forward_hook(hook(push)) for layer, push in pushes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def generate(model: PreTrainedModel, prompts: Prompts, new_tokens: int) -> list[list[int]]:
    """Greedy continuations of left-padded prompts, all ``new_tokens`` long (the model has no eos token here)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)  # type: ignore
    return out[:, width:].tolist()


@torch.inference_mode()
def gap_at(model: PreTrainedModel, tokens: Sequence[int], steering: Steering, n_prompt: int) -> float:
    """How far the best next token is ahead of the second best (logits) after ``tokens``, by one plain forward pass
    with the push at positions from ``n_prompt - 1`` on."""
    handles = []
    for layer, push in vectors(steering, model).items():

        def add(
            module: torch.nn.Module, args: object, output: Tensor | tuple[Tensor, ...], push: Tensor = push
        ) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            states[:, n_prompt - 1 :] += push

        handles.append(model.model.layers[layer].register_forward_hook(add))
    try:
        ids = torch.tensor([list(tokens)], device=model.device)
        logits = model(ids, use_cache=False).logits[0, -1].float()
    finally:
        for handle in handles:
            handle.remove()
    best = logits.topk(2).values
    return float(best[0] - best[1])
