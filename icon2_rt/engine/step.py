"""One decode step, from the rows' tokens to their next ones: tensors in, the same tensors advanced, nothing for the
host to decide. That is what lets a CUDA graph replay it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from icon2_rt.engine.forward import Model, computing, embed, finish, logits, run_blocks
from icon2_rt.engine.kv import KVPages
from icon2_rt.ops import AttentionItems, RowSampling, RowState, RowSteering


@dataclass(frozen=True)
class StepInputs:
    """Everything a step reads besides weights and KV; rows are seats.

    Attributes:
        state: advanced by the step. tables: ``[rows, pages]`` int32, the pages that each row may write.
        items: one list for all blocks; its lengths are written by the step. steering: None where no row has one.
    """

    state: RowState
    tables: Tensor
    items: AttentionItems
    steering: RowSteering | None
    sampling: RowSampling


def decode_step(model: Model, kv: KVPages, inputs: StepInputs) -> None:
    """Feed every row's token, sample its next one, advance ``inputs.state``."""
    ops, spec = model.ops, model.spec
    scale = spec.head_dim**-0.5
    with computing(model):
        slots, cos, sin = ops.begin_step(
            inputs.state,
            inputs.tables,
            kv.page_size,
            model.weights.inv_freq,
            spec.rope_scaling,
            inputs.items,
            model.dtype,
        )

        def attend(layer: int, q: Tensor) -> Tensor:
            return ops.grouped_decode_attention(q, kv.k[layer], kv.v[layer], inputs.items, scale, layer)

        stream = embed(model, inputs.state.tokens)
        stream = run_blocks(model, stream, range(spec.n_layers), (cos, sin), kv, slots, attend, inputs.steering)
        ops.sample(logits(model, finish(model, stream, inputs.steering)), inputs.sampling, inputs.state)
