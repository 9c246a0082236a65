"""From a config to a runtime and a chat frame that fit it, with everything refused that could not work later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.templates import ChatFrame

if TYPE_CHECKING:
    from icon2_rt import Runtime


def model_path(name: str) -> str:
    """ "tiny" is the model that ships with the package; anything else is a path or a hub id already."""
    if name == "tiny":
        from icon2_rt import tiny

        return str(tiny.path())
    return name


def load_runtime(config: RunConfig, as_on: Mapping[str, Any] | None = None) -> Runtime:
    """The runtime that a config asks for.

    ``as_on`` is the ``machine`` part of a manifest: what the config leaves to circumstances (KV memory by what is free,
    threads) is then set as it was, because the schedule of a decode depends on it.
    """
    from icon2_rt import Runtime

    options, as_on = config.runtime, as_on or {}
    threads = options.threads or as_on.get("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    extra: dict[str, Any] = {"dtype": options.dtype}
    if options.revision is not None:
        extra["revision"] = options.revision
    return Runtime.from_pretrained(
        model_path(config.model),
        device=options.device,
        backend=options.backend,
        kv_memory=as_on.get("kv_bytes", options.kv_memory),
        max_rows=options.max_rows,
        page_size=options.page_size,
        prefill_chunk=options.prefill_chunk,
        **extra,
    )


def end_tokens(rt: Runtime) -> tuple[int, ...]:
    """The tokens that end a response: the checkpoint's own, else the tokenizer's."""
    ids = rt.generation_config.eos_token_id
    if ids is None:
        ids = rt.tokenizer.eos_token_id if rt.tokenizer is not None else None
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def instruction_room(rt: Runtime, frame: ChatFrame, config: RunConfig) -> int:
    """How many tokens the chat of an instruction may have, so that a whole response fits behind it.

    Raises:
        ValueError: a token limit that the model's positions cannot hold.
    """
    positions, shortest = rt.spec.max_length, len(rt.encode(frame.messages("a")))
    for key, limit, before in (
        ("instructions.max_new_tokens", config.instructions.max_new_tokens, len(frame.pre_query)),
        ("pairs.max_new_tokens", config.pairs.max_new_tokens, shortest),
    ):
        if before + limit > positions:
            raise ValueError(
                f"{key}: {limit} tokens do not fit: the model has {positions} positions, and its chat template alone "
                f"takes {before}; at most {positions - before}"
            )
    return positions - config.pairs.max_new_tokens


def system_tokens(rt: Runtime, frame: ChatFrame, criteria: Mapping[str, Criterion]) -> int:
    """How many tokens the longest of the contrastive system prompts adds to a chat."""
    bare = len(rt.encode(frame.messages("a")))
    prompts = [text for criterion in criteria.values() for text in (criterion.positive, criterion.negative)]
    return max(len(rt.encode(frame.messages("a", system=text))) for text in prompts) - bare
