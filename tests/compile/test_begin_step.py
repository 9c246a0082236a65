from __future__ import annotations

import pytest
import torch

from icon2_rt.kernels.begin_step import BUDGET, begin_step
from icon2_rt.ops import AttentionItems, RowState
from tests.launches import ARCHITECTURES, MODELS, Launch, Sizes, launches_of, over_budget


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(model: Sizes) -> list[Launch]:
    rows, n, group = 32, 1000, model.heads // model.kv_heads
    state = RowState(
        tokens=empty(rows, dtype=torch.int64),
        positions=empty(rows),
        generated=empty(rows),
        running=empty(rows, dtype=torch.bool),
        logprobs=empty(rows, dtype=torch.float32),
    )
    items = AttentionItems(
        rows=empty(n, 16 // group),
        pages=empty(n, 8),
        splits=empty(n),
        layers=empty(n, 2),
        count=empty(1),
        starts=empty(rows),
        lengths=empty(n),
        n_splits=empty(rows),
        split=128,
        n_partials=n,
    )
    inv_freq = empty(model.head_dim // 2, dtype=torch.float32)
    return launches_of(begin_step, state, empty(rows, 512), 16, inv_freq, 1.0, items, model.dtype)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_within_budget_and_one_launch(model: Sizes) -> None:
    assert len(launches(model)) == 1
    assert over_budget(launches(model), {"begin_step_kernel": BUDGET}) == []


def test_within_budget_on_every_architecture() -> None:
    assert over_budget(launches(MODELS[0]), {"begin_step_kernel": BUDGET}, ARCHITECTURES) == []
