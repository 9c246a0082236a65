"""The cases of the micro benchmarks: every reference op at the shapes of both models, with the bytes it has to move.

Each case holds several sets of arguments and goes through them in turn, so that a model larger than the caches is
measured from memory, as in a decode step, and not from a weight that was read a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon2_rt.engine.bank import DirectionBank
from icon2_rt.engine.batch import plan_items
from icon2_rt.engine.forward import Model, rotary
from icon2_rt.models import DecoderSpec, DecoderWeights
from icon2_rt.ops import Ops, RowSampling
from icon2_rt.steering import Direction, compile_steering

# As many sets of arguments as make this many bytes, but no more than the model has blocks.
ROTATE_BYTES = 256 * 2**20
COPY_BYTES = 256 * 2**20
CONTEXT = 192  # KV positions of a row in the attention case

SPECS = {
    "tiny": DecoderSpec("llama", 6, 128, 4, 2, 32, 384, 1024, 1024, None, 1e-6, 1.0, False),
    "random100m": DecoderSpec("llama", 12, 768, 12, 4, 64, 2048, 32000, 4096, None, 1e-6, 1.0, True),
}


@dataclass(frozen=True)
class Case:
    """One op at one shape. ``n_bytes``: what it reads and writes at least, once each."""

    name: str
    model: str
    rows: int
    function: Callable[..., Any]
    arguments: list[tuple[Any, ...]]
    n_bytes: int

    def calls(self) -> Callable[[], Any]:
        """A function that runs the op on the next set of arguments at each call."""
        turn = cycle(self.arguments)
        return lambda: self.function(*next(turn))


def cases_of(model: str, rows: int) -> Iterator[Case]:
    """Every op of a decode step of ``rows`` rows."""
    spec, ops = SPECS[model], Ops("reference")
    hidden, ffn, d = spec.hidden_size, spec.intermediate_size, spec.head_dim
    heads = spec.n_heads + 2 * spec.n_kv_heads
    generator = torch.Generator().manual_seed(rows)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, residual, weight = rand(rows, hidden), rand(rows, hidden), rand(hidden)
    yield Case(
        "add_rmsnorm", model, rows, ops.add_steer_rmsnorm, [(x, residual, weight, 1e-6)], size(x) * 4 + size(weight)
    )

    bank = DirectionBank(2, 1, spec.n_layers, hidden, torch.device("cpu"))
    steering = compile_steering(0.1 * Direction("d", rand(spec.n_layers, hidden)), spec.n_layers, hidden)
    bank.pin([steering])
    chosen = bank.row_steering([steering] * rows)
    yield Case(
        "add_steer_rmsnorm", model, rows, ops.add_steer_rmsnorm, [(x, residual, weight, 1e-6, chosen, 1)],
        size(x) * 4 + size(weight) * 2,
    )  # fmt: skip

    shapes = {"qkv": (heads * d, hidden), "gate_up": (2 * ffn, hidden), "down": (hidden, ffn)}
    for name, (n_out, n_in) in {**shapes, "lm_head": (spec.vocab_size, hidden)}.items():
        several = 1 if name == "lm_head" else min(spec.n_layers, max(1, ROTATE_BYTES // (4 * n_out * n_in)))
        arguments = [(rand(rows, n_in), rand(n_out, n_in)) for _ in range(several)]
        moved = 4 * (n_out * n_in + rows * (n_in + n_out))
        yield Case(f"linear_{name}", model, rows, ops.linear, arguments, moved)

    gate_up = rand(rows, 2 * ffn)
    yield Case("silu_mul", model, rows, ops.silu_mul, [(gate_up,)], size(gate_up) * 3 // 2)

    shell = Model(spec, _no_weights(spec), ops)
    page_size = 32
    per_row = -(-CONTEXT // page_size)
    shape = (rows * per_row, page_size, spec.n_kv_heads, d)
    pages = [(rand(*shape), rand(*shape)) for _ in range(spec.n_layers)]
    qkv = rand(rows, heads * d)
    cos, sin = rotary(shell, torch.full((rows,), CONTEXT - 1))
    slots = (torch.arange(rows) * per_row + per_row - 1) * page_size
    yield Case(
        "rope_append", model, rows, ops.rope_append,
        [(qkv, cos, sin, None, None, 1e-6, k, v, slots) for k, v in pages], size(qkv) * 2,
    )  # fmt: skip

    tables = [list(range(row * per_row, (row + 1) * per_row)) for row in range(rows)]
    items, _ = plan_items(tables, [CONTEXT - 1] * rows, 1, page_size, 4, shell)
    items.mask[items.mask == -torch.inf] = 0.0
    q = rand(rows, spec.n_heads, d)
    yield Case(
        "grouped_decode_attention", model, rows, ops.grouped_decode_attention,
        [(q, k, v, items, d**-0.5) for k, v in pages], rows * CONTEXT * spec.n_kv_heads * d * 4 * 2,
    )  # fmt: skip

    logits = rand(rows, spec.vocab_size)
    index = torch.zeros(rows, dtype=torch.int64)
    greedy = RowSampling(None, None, None, None, None, None, None, None, None)
    yield Case("sample_greedy", model, rows, ops.sample, [(logits, index, greedy)], size(logits))
    sampled = RowSampling(
        sampled=torch.ones(rows, dtype=torch.bool), seeds=torch.arange(2 * rows).view(rows, 2),
        temperature=torch.full((rows,), 0.8), top_k=None, top_p=torch.full((rows,), 0.95), min_p=None,
        repetition_penalty=None, seen=None, banned=None,
    )  # fmt: skip
    yield Case("sample_top_p", model, rows, ops.sample, [(logits, index, sampled)], size(logits))


def copy() -> Case:
    """The device copy that every GB/s is read beside: a buffer far larger than the caches, read and written."""
    source = torch.from_numpy(np.ones(COPY_BYTES // 4, dtype=np.float32))
    target = torch.empty_like(source)
    return Case("device_copy", "-", 0, target.copy_, [(source,)], 2 * COPY_BYTES)


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _no_weights(spec: DecoderSpec) -> DecoderWeights:
    """What `rotary` needs of a decoder, and nothing else."""
    nothing = torch.empty(0)
    frequencies = 10000.0 ** -(torch.arange(0, spec.head_dim, 2) / spec.head_dim)
    return DecoderWeights(nothing, [], nothing, nothing, frequencies)
