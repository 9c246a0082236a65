"""Sampling settings that owe nothing to the checkpoint: a model's own generation config must not colour a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from icon2_rt.outputs import Completion


def neutral(
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    eos_token_id: Sequence[int],
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_string: str | None = None,
) -> GenerationConfig:
    """A config with every filter and penalty off but those named. Temperature 0 is greedy decoding."""
    from icon2_rt.engine.sampling import WholeConfig

    sampled: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        if min_p > 0:
            sampled["min_p"] = min_p
    if stop_string is not None:
        sampled["stop_strings"] = [stop_string]
    return WholeConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        eos_token_id=list(eos_token_id) or None,
        **sampled,
    )


def sound(completions: Sequence[Completion]) -> Sequence[Completion]:
    """Unsteered completions themselves, if all of them came to an end.

    Raises:
        FloatingPointError: the logits of one were not finite: without a steering it is the model or its dtype.
    """
    if any(completion.finish_reason == "error" for completion in completions):
        raise FloatingPointError("the unsteered model's own logits are not finite: its weights, or its dtype")
    return completions


def stage_seed(seed: int, stage: str) -> int:
    """The seed of one stage of a run, so that a sample's noise in one stage says nothing about it in another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}".encode()).digest()[:4], "little") >> 1
