"""The decoder itself, written once: prefill and decode differ only in the attention that they hand in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from icon2_rt.engine.kv import KVPages
from icon2_rt.models import DecoderSpec, DecoderWeights
from icon2_rt.ops import Ops, RowSteering

# (layer, q [rows, H, d]) → [rows, H · d]
Attend = Callable[[int, Tensor], Tensor]
# (layer, h [rows, hidden]): the residual stream after that block, steered
Observe = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Model:
    """A decoder ready to run: sizes, tensors, the backend's ops."""

    spec: DecoderSpec
    weights: DecoderWeights
    ops: Ops

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embedding.dtype


@contextmanager
def computing(model: Model) -> Iterator[None]:
    """No gradients, the model's own dtypes even inside somebody's autocast, and its own device whichever is current:
    Triton launches on the current one."""
    device = model.device
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), current:
        yield


@dataclass
class Stream:
    """The rows between two blocks: the residual and the last block's output, not yet added (None at the start)."""

    residual: Tensor  # [rows, hidden]
    x: Tensor | None  # [rows, hidden]

    def take(self, rows: Tensor) -> Stream:
        """The rows by index; a row may come several times (where a prompt forks)."""
        return Stream(self.residual[rows], None if self.x is None else self.x[rows])


def embed(model: Model, tokens: Tensor) -> Stream:
    """``tokens [rows]`` int64 → the stream before block 0."""
    return Stream(model.ops.embed(tokens, model.weights.embedding), None)


def run_blocks(
    model: Model,
    stream: Stream,
    layers: range,
    rope: tuple[Tensor, Tensor],
    kv: KVPages,
    slots: Tensor,
    attend: Attend,
    steering: RowSteering | None = None,
    observe: Observe | None = None,
    kv_only: bool = False,
) -> Stream:
    """Run consecutive blocks over ``rows`` tokens.

    The steering *after* block i is applied where block i + 1 begins (residual add and norm are one op), so the last
    block's is left to :func:`finish`. With ``kv_only`` the very last block stops once its K and V are written.
    """
    ops, eps = model.ops, model.spec.rms_norm_eps
    cos, sin = rope
    residual, x = stream.residual, stream.x
    for i in layers:
        w = model.weights.layers[i]
        residual, h = ops.add_steer_rmsnorm(x, residual, w.input_norm, eps, steering if i else None, i - 1)
        if observe is not None and i:
            observe(i - 1, residual)
        qkv = ops.linear(h, w.qkv, w.qkv_bias)
        q = ops.rope_append(qkv, cos, sin, w.q_norm, w.k_norm, eps, kv.k[i], kv.v[i], slots)
        if kv_only and i == model.spec.n_layers - 1:
            return Stream(residual, None)
        x = ops.linear(attend(i, q), w.o)
        residual, h = ops.add_steer_rmsnorm(x, residual, w.post_norm, eps)
        x = ops.linear(ops.silu_mul(ops.linear(h, w.gate_up)), w.down)
    return Stream(residual, x)


def finish(model: Model, stream: Stream, steering: RowSteering | None = None, observe: Observe | None = None) -> Tensor:
    """The steering after the last block and the final norm: ``[rows, hidden]``, ready for :func:`logits`."""
    last = model.spec.n_layers - 1
    residual, h = model.ops.add_steer_rmsnorm(
        stream.x, stream.residual, model.weights.final_norm, model.spec.rms_norm_eps, steering, last
    )
    if observe is not None:
        observe(last, residual)
    return h


def logits(model: Model, h: Tensor) -> Tensor:
    """``[rows, hidden]`` → ``[rows, vocab]`` in the model's dtype."""
    return model.ops.linear(h, model.weights.lm_head)
