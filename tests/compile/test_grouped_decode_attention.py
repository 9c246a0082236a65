from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from icon2_rt.kernels.grouped_decode_attention import MERGE_BUDGET, SPLIT_BUDGET, grouped_decode_attention
from icon2_rt.ops import AttentionItems
from tests.launches import MODELS, Launch, Sizes, compiled, launches_of, over_budget

BUDGETS = {"split_kernel": SPLIT_BUDGET, "merge_kernel": MERGE_BUDGET}
# The other head sizes that models have, on a model's other sizes.
LLAMA = MODELS[0]
OTHERS = [
    *(replace(LLAMA, name=f"heads of {d}", head_dim=d) for d in (64, 80, 256)),
    replace(LLAMA, name="12 over 2 heads of 128 in fp32", dtype=torch.float32, heads=12, kv_heads=2),
]


def launches(model: Sizes, layer: int = 3, n: int = 64, batch: int = 8, device: str = "meta") -> list[Launch]:
    def ids(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=device)

    width = 16 // (model.heads // model.kv_heads)
    items = AttentionItems(
        rows=ids(n, width),
        pages=ids(n, 4),
        splits=ids(n),
        layers=ids(n, 2),
        count=ids(1),
        starts=ids(batch),
        lengths=ids(n),
        n_splits=ids(batch),
        split=128,
        n_partials=n * width,
    )
    q = torch.empty(batch, model.heads, model.head_dim, dtype=model.dtype, device=device)
    pages = torch.empty(100, 32, model.kv_heads, model.head_dim, dtype=model.dtype, device=device)
    return launches_of(grouped_decode_attention, q, pages, pages, items, model.head_dim**-0.5, layer)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_within_budget(model: Sizes) -> None:
    assert over_budget(launches(model), BUDGETS) == []


@pytest.mark.parametrize("model", OTHERS, ids=str)
def test_other_head_sizes_are_within_budget(model: Sizes) -> None:
    assert [line for each in launches(model) for line in compiled(each, 90).over(BUDGETS[each.kernel.__name__])] == []


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kv_flows_through_shared_memory_into_one_kind_of_tile(arch: int) -> None:
    split = compiled(launches(LLAMA)[0], arch)
    # K and V ahead of their use, asynchronously and 16 bytes at a time: two tiles before the loop, one inside it.
    assert split.ptx.count("cp.async.cg.shared.global") == 3 * 2 * 64 * 128 * 2 // (16 * 128)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in split.ptx
    # The larger tiles' instructions would give a row other bytes than the small one's.
    assert "wgmma" not in split.ptx and "tcgen05" not in split.ptx


def test_one_binary_for_all_blocks_and_batches() -> None:
    model = replace(LLAMA, heads=28, kv_heads=4)
    first = [each.bind() for each in launches(model, layer=0)]
    for layer, n, batch in ((1, 64, 8), (16, 1, 1), (31, 777, 33)):
        assert [each.bind() for each in launches(model, layer, n, batch)] == first


def test_nothing_of_a_tensor_is_read_and_grids_follow_from_shapes() -> None:
    with FakeTensorMode():
        split, merge = launches(LLAMA, n=3, batch=5, device="cuda")
    assert merge.grid == (5, 32)
    assert len(split.grid) == 1 and 1 <= split.grid[0] <= 3 * 8
