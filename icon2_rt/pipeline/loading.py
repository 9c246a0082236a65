"""From a config to a runtime and a chat frame that fit it, with everything refused that could not work later."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icon2_rt.pipeline.config import RunConfig, controlled_bands
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.templates import ChatFrame, chat_frame
from icon2_rt.steering import DirectionSet

if TYPE_CHECKING:
    from icon2_rt import Runtime


def model_path(name: str) -> str:
    """ "tiny" is the model that ships with the package; anything else is a path or a hub id already."""
    if name == "tiny":
        from icon2_rt import tiny

        return str(tiny.path())
    return os.path.expanduser(name)


def glance(config: RunConfig) -> tuple[Any, Any]:
    """The checkpoint's config and tokenizer, before its weights are read.

    Raises:
        ValueError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    from icon2_rt.models import read_config

    path, revision = model_path(config.model), {"revision": config.runtime.revision or "main"}
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ValueError(f"model: there is no folder {Path(path).absolute()}; give a checkpoint's folder, or a hub id")
    try:
        checkpoint = read_config(path, **revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {config.model!r} cannot be loaded: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model: no tokenizer could be loaded from {config.model!r}; its folder needs the files of one, "
            f"tokenizer.json and tokenizer_config.json ({str(error).splitlines()[0]})"
        ) from error
    return checkpoint, tokenizer


def glance_frame(config: RunConfig) -> ChatFrame:
    """The chat frame of the checkpoint's template, before its weights are read.

    Raises:
        ValueError: as :func:`glance`; no chat template, or one that cannot be used.
    """
    return chat_frame(glance(config)[1], variables=config.template)


def look(config: RunConfig) -> None:
    """Refuse what the checkpoint's config and tokenizer alone show not to work in a run.

    Raises:
        ValueError: as :func:`glance`; no chat template; blocks, directions or token limits that are not this model's.
    """
    checkpoint, tokenizer = glance(config)
    frame = chat_frame(tokenizer, variables=config.template)
    if not all(hasattr(checkpoint, name) for name in ("num_hidden_layers", "hidden_size", "max_position_embeddings")):
        return  # no decoder that runs here; the runtime says which do
    bands = controlled_bands(config, checkpoint.num_hidden_layers)
    if config.directions.file is not None:
        made = read_directions(config.directions.file, checkpoint.num_hidden_layers)
        check_directions(made, checkpoint.num_hidden_layers, checkpoint.hidden_size, bands)
    shortest = frame.length(frame.messages("a"))
    check_limits(config, checkpoint.max_position_embeddings, len(frame.pre_query), shortest)


def read_directions(path: str | Path, n_layers: int) -> DirectionSet:
    """The directions of a file for a model of ``n_layers`` blocks: another tool's control vector may stop before the
    last of them, and does not say how many there are."""
    made = DirectionSet.load(path)
    stops_early = all(d.method == "imported" and d.n_layers < n_layers for d in made)
    return DirectionSet.load(path, n_layers=n_layers) if stops_early and str(path).endswith(".gguf") else made


def check_directions(made: DirectionSet, n_layers: int, hidden_size: int, bands: Mapping[str, Sequence[int]]) -> None:
    """Can a model of this size be steered by the directions of ``directions.file``, in these blocks?

    Raises:
        ValueError: it cannot.
    """
    for d in made:
        if (d.n_layers, d.hidden_size) != (n_layers, hidden_size):
            raise ValueError(
                f"directions.file: {d.name!r} has {d.n_layers} blocks of size {d.hidden_size}, the model has "
                f"{n_layers} of size {hidden_size}: it was made on another model"
            )
        for layers in bands.values():
            if not set(layers) & set(d.layers):
                raise ValueError(f"pairs.layers: direction {d.name!r} has no vector on blocks {list(layers)}")


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


def find_frame(rt: Runtime, config: RunConfig, as_before: Mapping[str, Any] | None = None) -> ChatFrame:
    """The chat frame of a loaded model, for one run.

    ``as_before`` is the ``chat_template`` part of a manifest: what the template's clock gave then, it gives again.

    Raises:
        ValueError: as :func:`~icon2_rt.pipeline.templates.chat_frame`.
    """
    clock = (as_before or {}).get("clock")
    return chat_frame(rt.tokenizer, own_end_tokens(rt), variables=config.template, clock=clock)


@contextmanager
def rendering(rt: Runtime, frame: ChatFrame) -> Iterator[None]:
    """The runtime renders chats as the frame does: with the run's variables, and the time at which it began."""
    before = rt.template
    rt.template = frame.template
    try:
        yield
    finally:
        rt.template = before


def own_end_tokens(rt: Runtime) -> tuple[int, ...]:
    """The checkpoint's own end tokens, else the tokenizer's."""
    ids = rt.generation_config.eos_token_id
    if ids is None:
        ids = rt.tokenizer.eos_token_id if rt.tokenizer is not None else None
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def end_tokens(rt: Runtime) -> tuple[int, ...]:
    """The tokens that end a response: the checkpoint's own, and the one that its chat template ends an answer with."""
    return chat_frame(rt.tokenizer, own_end_tokens(rt), variables=rt.template.variables).end_token_ids


def instruction_room(rt: Runtime, frame: ChatFrame, config: RunConfig) -> int:
    """How many tokens the chat of an instruction may have, so that a whole response fits behind it.

    Raises:
        ValueError: as :func:`check_limits`.
    """
    check_limits(config, rt.spec.max_length, len(frame.pre_query), len(rt.encode(frame.messages("a"))))
    return rt.spec.max_length - config.pairs.max_new_tokens


def check_limits(config: RunConfig, positions: int, pre_query: int, shortest: int) -> None:
    """Do a model's positions hold the pre-query with a whole instruction, and the shortest chat with a whole response?

    Raises:
        ValueError: they do not.
    """
    for key, limit, before in (
        ("instructions.max_new_tokens", config.instructions.max_new_tokens, pre_query),
        ("pairs.max_new_tokens", config.pairs.max_new_tokens, shortest),
    ):
        if before + limit > positions:
            raise ValueError(
                f"{key}: {limit} tokens do not fit: the model has {positions} positions, and its chat template alone "
                f"takes {before}; at most {positions - before}"
            )


def system_tokens(rt: Runtime, frame: ChatFrame, criteria: Mapping[str, Criterion]) -> int:
    """How many tokens the longest of the contrastive system prompts adds to a chat."""
    bare = len(rt.encode(frame.messages("a")))
    prompts = [text for criterion in criteria.values() for text in (criterion.positive, criterion.negative)]
    return max(len(rt.encode(frame.messages("a", system=text))) for text in prompts) - bare
