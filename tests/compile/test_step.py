"""A whole decode step without its launches: what the host does of it depends on no value, and how much it launches.

Under FakeTensorMode a tensor has a shape and no content, so any read of one by the host (an index, a length,
``item()``) raises: what runs there can be captured in a graph.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from icon2_rt import Runtime
from icon2_rt.engine import step as engine_step
from icon2_rt.engine.batch import Batch, Manner
from icon2_rt.engine.buffers import BatchSizes
from icon2_rt.engine.forward import Model
from icon2_rt.engine.step import StepInputs, decode_step
from icon2_rt.models import DecoderWeights, LayerWeights
from icon2_rt.ops import Ops, select
from icon2_rt.ops import triton_ops as make_triton_ops
from tests.launches import recorded
from tests.models import tiny_llama, tiny_qwen2, tiny_qwen3


def parts(runtime: Runtime, ops: Ops) -> tuple[Model, Batch]:
    engine = runtime._engine
    model = replace(engine.model, ops=ops)
    sizes = BatchSizes(seats=8, partials=64, eos=4, terms=4, split_pages=engine.options.split_pages)
    return model, Batch(model, engine.kv, engine.bank, sizes, Manner(fixed=True))


def run_fake(
    runtime: Runtime, ops: Ops, rows: int, watch: AbstractContextManager[object] | None = None
) -> Counter[str]:
    """One step of ``rows`` seats under FakeTensorMode (and ``watch``): the launches of each kernel."""
    model, batch = parts(runtime, ops)
    inputs = batch._views(rows)
    mode = FakeTensorMode()

    def fake(value: object) -> object:
        return tree_map_only(torch.Tensor, mode.from_tensor, value)

    def all_fake(thing: object) -> dict[str, object]:
        return {name: fake(value) for name, value in vars(thing).items() if not name.startswith("_")}

    weights = model.weights
    layers = [LayerWeights(**all_fake(layer)) for layer in weights.layers]
    fake_weights = DecoderWeights(**{**all_fake(weights), "layers": layers})
    kv = runtime._engine.kv
    fake_kv = type("FakePages", (), {"k": fake(kv.k), "v": fake(kv.v), "page_size": kv.page_size})()
    fake_inputs = StepInputs(
        tables=fake(inputs.tables),
        **{
            name: type(getattr(inputs, name))(**all_fake(getattr(inputs, name)))
            for name in ("state", "items", "steering", "sampling")
        },
    )
    with mode, recorded() as launches, watch or nullcontext():
        decode_step(replace(model, weights=fake_weights), fake_kv, fake_inputs)
    return Counter(launch.kernel.fn.__name__ for launch in launches)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_qwen3])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_host_reads_nothing_in_a_step(build, rows):
    runtime = Runtime(build(), device="cpu", page_size=16)
    launches = run_fake(runtime, make_triton_ops(), rows)
    n_layers = runtime.spec.n_layers
    # Per block two norms, one rotary, two of attention and one activation; around them one norm, one layout, sampling.
    assert launches["add_steer_rmsnorm_kernel"] == 2 * n_layers + 1
    assert launches["rope_append_kernel"] == n_layers
    assert launches["silu_mul_kernel"] == n_layers
    assert sum(launches.values()) <= 6 * n_layers + 1 + 1 + 2


class Allocations(TorchFunctionMode):
    """Bytes of every ``torch.empty``, all of which torch fills where deterministic algorithms are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.zeros):
            self.bytes.append(result.nbytes)
        return result


def test_a_step_allocates_nothing_that_grows_with_the_places_for_partial_results_or_the_vocabulary():
    """With torch.use_deterministic_algorithms(True) that would be filled in every block."""
    runtime = Runtime(tiny_llama(), device="cpu", page_size=16)
    spec, ops = runtime.spec, make_triton_ops()
    kept, rows = Allocations(), 8
    run_fake(runtime, ops, rows, kept)
    partials = 4 * 64 * spec.n_heads * (spec.head_dim + 1)
    assert kept.bytes
    assert max(kept.bytes) <= 4 * rows * max(spec.hidden_size, spec.intermediate_size, spec.n_heads * spec.head_dim)
    # An op that is given no memory of the batch's takes its own, in every block.
    made = Allocations()
    given = Batch._views
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "_views", lambda batch, n: without_scratch(given(batch, n)))
        run_fake(runtime, ops, rows, made)
    assert sum(made.bytes) - sum(kept.bytes) == spec.n_layers * partials + ops.sample_scratch(rows, spec.vocab_size)


def without_scratch(inputs: StepInputs) -> StepInputs:
    return replace(
        inputs,
        items=replace(inputs.items, partials=None, partial_lse=None),
        sampling=replace(inputs.sampling, scratch=None),
    )


def test_a_read_would_be_noticed(monkeypatch):
    """The same with a host that looks at a token: FakeTensorMode says no."""
    runtime = Runtime(tiny_llama(), device="cpu", page_size=16)
    monkeypatch.setattr(
        engine_step,
        "embed",
        lambda model, tokens, embed=engine_step.embed: embed(model, tokens) if int(tokens[0]) else None,
    )
    with pytest.raises(DataDependentOutputException):
        run_fake(runtime, make_triton_ops(), 2)


def test_triton_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        select("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="CUDA device"):
        Runtime(tiny_llama(), device="cpu", backend="triton")
