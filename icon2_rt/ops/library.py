"""The ops as ``torch.ops.icon2_rt.*``, for ``torch.compile``, ``torch.export`` and code of your own.

Importing this module registers them (the engine calls its backend directly and does without). On a CPU an op runs on
the backend that ``"auto"`` picks; on a CUDA device in the form that a stored verdict proves there for the tensors'
dtype, else as the reference: these ops never start a trial. Signatures are those of the functions beside this file,
with what they take as one object spelled out field by field; what is written is declared as mutated. There are no
gradients: a runtime decodes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from icon2_rt.ops import AttentionItems, Ops, RowSampling, RowState, RowSteering, select


@cache
def _ops_for(device: torch.device, dtype: torch.dtype) -> Ops:
    if device.type == "cuda":
        from icon2_rt import qualify  # this module is a face, and stands above the ops

        if (verdict := qualify.stored(device, dtype)) is not None:
            return verdict.ops()
    return select("auto", device)


def _ops(tensor: Tensor, dtype: torch.dtype | None = None) -> Ops:
    """The ops for ``tensor``, whose dtype is the model's unless another one is given."""
    return _ops_for(tensor.device, dtype or tensor.dtype)


@custom_op("icon2_rt::embed", mutates_args=())
def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """:func:`icon2_rt.ops.embed`."""
    return _ops(weight).embed(tokens, weight)


@embed.register_fake
def _(tokens: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((tokens.shape[0], weight.shape[1]))


@custom_op("icon2_rt::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`icon2_rt.ops.linear`."""
    return _ops(x).linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@custom_op("icon2_rt::silu_mul", mutates_args=())
def silu_mul(gate_up: Tensor) -> Tensor:
    """:func:`icon2_rt.ops.silu_mul`."""
    return _ops(gate_up).silu_mul(gate_up)


@silu_mul.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@custom_op("icon2_rt::add_steer_rmsnorm", mutates_args=("measured",))
def add_steer_rmsnorm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    measured: Tensor | None,
    bank: Tensor | None = None,
    count: Tensor | None = None,
    index: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    keep_norm: Tensor | None = None,
    which: Tensor | None = None,
    layer: int = -1,
) -> tuple[Tensor, Tensor]:
    """:func:`icon2_rt.ops.add_steer_rmsnorm`; ``bank`` to ``which`` are the fields of its RowSteering, all or none.
    ``measured`` (or None) comes before them: torch 2.11 looks for what is written among the arguments that it got."""
    fields = (bank, count, index, alpha, beta, keep_norm, which)
    given: list[Any] = [field for field in fields if field is not None]
    if given and len(given) < len(fields):
        raise ValueError("bank, count, index, alpha, beta, keep_norm and which must be given together, or none of them")
    steering = RowSteering(*given) if given else None
    h, normed = _ops(weight).add_steer_rmsnorm(x, residual, weight, eps, steering, layer, measured)
    return _own(h, residual), normed


@add_steer_rmsnorm.register_fake
def _(x, residual, weight, eps, measured, bank=None, count=None, index=None, alpha=None, beta=None, keep_norm=None, which=None, layer=-1):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape, dtype=weight.dtype)


@custom_op("icon2_rt::rope_append", mutates_args=("k_pages", "v_pages"))
def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> Tensor:
    """:func:`icon2_rt.ops.rope_append`."""
    return _ops(qkv).rope_append(qkv, cos, sin, q_norm, k_norm, eps, k_pages, v_pages, slots)


@rope_append.register_fake
def _(qkv, cos, sin, q_norm, k_norm, eps, k_pages, v_pages, slots):  # type: ignore[no-untyped-def]
    kv_heads, d = k_pages.shape[2:]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // d - 2 * kv_heads, d))


@custom_op("icon2_rt::begin_step", mutates_args=("lengths", "n_splits"))
def begin_step(
    positions: Tensor,
    running: Tensor,
    tables: Tensor,
    page_size: int,
    inv_freq: Tensor,
    rope_scaling: float,
    rows: Tensor,
    splits: Tensor,
    count: Tensor,
    lengths: Tensor,
    n_splits: Tensor,
    split: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`icon2_rt.ops.begin_step`; the fields of its state and items that it reads or writes."""
    unread = positions
    state = RowState(unread, positions, unread, running, unread)
    items = AttentionItems(rows, rows, splits, rows, count, splits, lengths, n_splits, split, 0)
    slots, cos, sin = _ops(positions, dtype).begin_step(state, tables, page_size, inv_freq, rope_scaling, items, dtype)
    return slots, cos, _own(sin, cos)


@begin_step.register_fake
def _(positions, running, tables, page_size, inv_freq, rope_scaling, rows, splits, count, lengths, n_splits, split, dtype):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    shape = (positions.shape[0], 1, 2 * inv_freq.shape[0])
    cos = positions.new_empty(shape, dtype=dtype)
    return positions.new_empty(positions.shape, dtype=torch.int64), cos, torch.empty_like(cos)


@custom_op("icon2_rt::grouped_decode_attention", mutates_args=())
def grouped_decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rows: Tensor,
    pages: Tensor,
    splits: Tensor,
    layers: Tensor,
    count: Tensor,
    starts: Tensor,
    lengths: Tensor,
    n_splits: Tensor,
    split: int,
    n_partials: int,
    scale: float,
    layer: int,
) -> Tensor:
    """:func:`icon2_rt.ops.grouped_decode_attention`; ``rows`` to ``n_partials`` are the fields of its items."""
    items = AttentionItems(rows, pages, splits, layers, count, starts, lengths, n_splits, split, n_partials)
    return _ops(q).grouped_decode_attention(q, k_pages, v_pages, items, scale, layer)


@grouped_decode_attention.register_fake
def _(q, k_pages, v_pages, rows, pages, splits, layers, count, starts, lengths, n_splits, split, n_partials, scale, layer):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    return q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))


@custom_op("icon2_rt::sample", mutates_args=("seen", "tokens", "positions", "generated", "running", "logprobs"))
def sample(
    logits: Tensor,
    sampled: Tensor | None,
    seeds: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    repetition_penalty: Tensor | None,
    seen: Tensor | None,
    eos: Tensor,
    min_tokens: Tensor | None,
    budget: Tensor,
    tokens: Tensor,
    positions: Tensor,
    generated: Tensor,
    running: Tensor,
    logprobs: Tensor,
) -> None:
    """:func:`icon2_rt.ops.sample`; the fields of RowSampling, then those of the state that is advanced."""
    how = RowSampling(
        sampled, seeds, temperature, top_k, top_p, min_p, repetition_penalty, seen, eos, min_tokens, budget
    )
    _ops(logits).sample(logits, how, RowState(tokens, positions, generated, running, logprobs))


@sample.register_fake
def _(logits, sampled, seeds, temperature, top_k, top_p, min_p, repetition_penalty, seen, eos, min_tokens, budget, tokens, positions, generated, running, logprobs):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    return None


def _own(result: Tensor, other: Tensor) -> Tensor:
    """``result`` in memory of its own: an op may not return what it was given, or one memory twice."""
    same = result.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return result.clone() if same else result
