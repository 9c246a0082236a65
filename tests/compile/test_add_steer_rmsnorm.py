from __future__ import annotations

import re

import pytest
import torch

from icon2_rt.kernels.add_steer_rmsnorm import BUDGET, add_steer_rmsnorm
from icon2_rt.ops import RowSteering
from tests.launches import ARCHITECTURES, MODELS, Launch, Sizes, compiled, launches_of, over_budget

ROWS, TERMS = 6, 4


def steering(hidden: int) -> RowSteering:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return RowSteering(
        bank=empty(8, 32, hidden),
        count=empty(5, 32, dtype=torch.int32),
        index=empty(5, 32, TERMS, dtype=torch.int32),
        alpha=empty(5, 32, TERMS),
        beta=empty(5, 32, TERMS),
        keep_norm=empty(5, dtype=torch.bool),
        which=empty(ROWS, dtype=torch.int32),
    )


def variants(model: Sizes, residual_dtype: torch.dtype | None = None) -> dict[str, Launch]:
    x = torch.empty(ROWS, model.hidden, dtype=model.dtype, device="meta")
    weight, measured = torch.empty_like(x[0]), torch.empty(ROWS, 1 + TERMS, device="meta")
    h, s = x.to(residual_dtype or model.dtype), steering(model.hidden)
    calls = {
        "plain": (x, h, weight, 1e-5),
        "steered": (x, h, weight, 1e-5, s, 3),
        "measured": (x, h, weight, 1e-5, s, 3, measured),
        "embedding": (None, h, weight, 1e-5),
    }
    return {name: launches_of(add_steer_rmsnorm, *args)[0] for name, args in calls.items()}


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_within_budget(model: Sizes) -> None:
    assert over_budget(list(variants(model).values()), {"add_steer_rmsnorm_kernel": BUDGET}) == []


def test_within_budget_on_every_architecture() -> None:
    launches = list(variants(MODELS[0]).values())
    assert over_budget(launches, {"add_steer_rmsnorm_kernel": BUDGET}, ARCHITECTURES) == []


def test_one_launch_for_every_layer() -> None:
    x = torch.empty(ROWS, 128, device="meta")
    bound = [launches_of(add_steer_rmsnorm, x, x, x[0], 1e-5, steering(128), layer)[0].bind() for layer in (0, 1, 16)]
    assert bound[0] == bound[1] == bound[2]


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_rows_without_terms_go_through_the_same_arithmetic_in_every_variant(residual_dtype: torch.dtype) -> None:
    """Bitwise equality of a sum needs the same elements in the same threads, and no multiplication and addition fused
    in one variant alone."""
    for arch in ARCHITECTURES:
        layouts = {}
        for name, launch in variants(MODELS[0], residual_dtype).items():
            code = compiled(launch, arch)
            meaning = dict(re.findall(r"^(#\w+) = (#ttg.*)$", code.ttgir, re.MULTILINE))
            # What a sum adds comes to it as the threads have it ("allow_reorder").
            sums = re.findall(r"tt.reshape .*allow_reorder.* : tensor<4096xf32, (#\w+)> -> .*, (#\w+)>", code.ttgir)
            layouts[name] = {(meaning[before], meaning[after]) for before, after in sums}
            assert not re.search(r"\bfma\.\S*f32", code.ptx), name
        assert len(layouts["plain"]) == 1
        assert layouts["plain"] == layouts["steered"] == layouts["measured"] == layouts["embedding"]
