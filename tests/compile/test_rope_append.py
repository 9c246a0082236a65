from __future__ import annotations

import pytest
import torch

from icon2_rt.kernels.rope_append import BUDGET, rope_append
from tests.launches import MODELS, Sizes, launches_of, over_budget


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_within_budget(model: Sizes, norm: bool) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=model.dtype, device="meta")

    d, kv = model.head_dim, model.kv_heads
    weight = empty(d) if norm else None
    launches = launches_of(
        rope_append,
        empty(6, (model.heads + 2 * kv) * d),
        empty(6, 1, d),
        empty(6, 1, d),
        weight,
        weight,
        1e-6,
        empty(10, 16, kv, d),
        empty(10, 16, kv, d),
        torch.empty(6, dtype=torch.int64, device="meta"),
    )
    assert over_budget(launches, {"rope_append_kernel": BUDGET}) == []
