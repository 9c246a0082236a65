from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from icon2_rt.kernels.sample import CHOOSE, SCAN, sample
from icon2_rt.ops import RowSampling, RowState
from tests.launches import (
    ARCHITECTURES,
    MODELS,
    Launch,
    Sizes,
    compiled,
    fused_with_a_shuffle,
    launches_of,
    over_budget,
)

BUDGETS = {"scan_kernel": SCAN, "choose_kernel": CHOOSE}


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "meta") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def arguments(model: Sizes, rows: int, draws: bool, dense: bool) -> tuple[Tensor, RowSampling, RowState]:
    """Greedy rows, rows that draw and filter nothing, or the buffers of a graph, which have every setting."""
    i32, flag = torch.int32, torch.bool
    how = RowSampling(
        sampled=empty(rows, dtype=flag) if draws else None,
        seeds=empty(rows, 2, dtype=torch.int64) if draws else None,
        temperature=empty(rows) if dense else None,
        top_k=empty(rows, dtype=i32) if dense else None,
        top_p=empty(rows) if dense else None,
        min_p=empty(rows) if dense else None,
        repetition_penalty=empty(rows) if dense else None,
        seen=empty(rows, model.vocab, dtype=flag) if dense else None,
        eos=empty(rows, 4 if dense else 1, dtype=i32),
        min_tokens=empty(rows, dtype=i32) if dense else None,
        budget=empty(rows, dtype=i32),
    )
    state = RowState(
        tokens=empty(rows, dtype=torch.int64),
        positions=empty(rows, dtype=i32),
        generated=empty(rows, dtype=i32),
        running=empty(rows, dtype=flag),
        logprobs=empty(rows),
    )
    return empty(rows, model.vocab, dtype=model.dtype), how, state


def launches(model: Sizes, draws: bool = True, dense: bool = True) -> list[Launch]:
    return launches_of(sample, *arguments(model, 6, draws, dense))


# The choice is the largest kernel of all and slow to compile: the sizes that differ most.
@pytest.mark.parametrize("model", [m for m in MODELS if m.name in ("Qwen2-7B", "shipped-fp32")], ids=str)
def test_a_graphs_buffers_within_budget(model: Sizes) -> None:
    assert over_budget(launches(model), BUDGETS) == []


def test_within_budget_on_every_architecture() -> None:
    assert over_budget(launches(MODELS[0]), BUDGETS, ARCHITECTURES) == []


@pytest.mark.parametrize("model", [m for m in MODELS if m.name in ("Llama-3-8B", "shipped-bf16")], ids=str)
@pytest.mark.parametrize("draws", [False, True], ids=["greedy", "draws"])
def test_without_filters_within_budget(model: Sizes, draws: bool) -> None:
    assert over_budget(launches(model, draws, dense=False), BUDGETS) == []


@pytest.mark.parametrize("model", [m for m in MODELS if m.name in ("Llama-3-8B", "Qwen2-7B", "Qwen3-8B")], ids=str)
def test_logits_are_read_16_bytes_at_a_time(model: Sizes) -> None:
    """A program of the scan has 16 logits per thread: two loads; with the penalty, 16 flags more."""
    scan, _ = launches(model, dense=False)
    assert compiled(scan, 90).wide_loads == 2
    scan, choose = launches(model)
    assert compiled(scan, 90).wide_loads == 3
    assert compiled(choose, 90).wide_loads >= 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lanes_agree_on_what_they_have_summed(arch: int) -> None:
    """The search takes its turns by sums over a warp's lanes, which must be equal in all of them to the last bit."""
    for launch in launches(MODELS[0]):
        ptx = compiled(launch, arch).ptx
        assert "shfl.sync.bfly" in ptx
        assert fused_with_a_shuffle(ptx) == []


def test_contraction_would_let_lanes_disagree() -> None:
    """Left to itself Triton fuses, and the test above sees it."""
    _, choose = launches(MODELS[0])
    assert choose.options["enable_fp_fusion"] is False
    fused = compiled(replace(choose, options={**choose.options, "enable_fp_fusion": True}), 90)
    assert fused_with_a_shuffle(fused.ptx) != []


@pytest.mark.parametrize(("draws", "dense"), [(False, False), (True, False), (True, True)])
def test_two_launches_and_nothing_else(draws: bool, dense: bool) -> None:
    """Under fake tensors the host cannot read a value, and the grids follow from the shapes."""
    with FakeTensorMode():
        scan, choose = launches_of(sample, *arguments(MODELS[0], 256, draws, dense))
    assert (scan.grid, choose.grid) == ((63, 256), (256,))
    assert launches_of(sample, *arguments(MODELS[0], 0, draws, dense)) == []
