from __future__ import annotations

import pytest
import torch

from icon2_rt.kernels.rope_append import BUDGET, rope_append
from tests.launches import ARCHITECTURES, MODELS, Launch, Sizes, launches_of, over_budget


def launches(heads: int, kv_heads: int, d: int, dtype: torch.dtype, norm: bool) -> list[Launch]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return launches_of(
        rope_append,
        empty(6, (heads + 2 * kv_heads) * d),
        empty(6, 1, d),
        empty(6, 1, d),
        empty(d) if norm else None,
        empty(d) if norm else None,
        1e-6,
        empty(10, 16, kv_heads, d),
        empty(10, 16, kv_heads, d),
        torch.empty(6, dtype=torch.int64, device="meta"),
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_within_budget(model: Sizes, norm: bool) -> None:
    recorded = launches(model.heads, model.kv_heads, model.head_dim, model.dtype, norm)
    assert over_budget(recorded, {"rope_append_kernel": BUDGET}) == []


@pytest.mark.parametrize("d", [80, 96, 256])
def test_other_head_sizes(d: int) -> None:
    assert over_budget(launches(14, 2, d, torch.bfloat16, True), {"rope_append_kernel": BUDGET}) == []


def test_within_budget_on_every_architecture() -> None:
    recorded = launches(32, 8, 128, torch.bfloat16, True)
    assert over_budget(recorded, {"rope_append_kernel": BUDGET}, ARCHITECTURES) == []
