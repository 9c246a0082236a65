from __future__ import annotations

import pytest
import torch

from icon2_rt.kernels.silu_mul import BUDGET, silu_mul
from tests.launches import ARCHITECTURES, MODELS, USUAL, Sizes, launches_of, over_budget


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_within_budget(model: Sizes) -> None:
    gate_up = torch.empty(6, 2 * model.ffn, dtype=model.dtype, device="meta")
    architectures = ARCHITECTURES if model is MODELS[0] else USUAL
    assert over_budget(launches_of(silu_mul, gate_up), {"silu_mul_kernel": BUDGET}, architectures) == []
