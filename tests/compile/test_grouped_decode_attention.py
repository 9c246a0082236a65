from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from icon2_rt.kernels import grouped_decode_attention as attention
from icon2_rt.kernels.device import multiprocessors
from icon2_rt.kernels.grouped_decode_attention import MERGE_BUDGET, SPLIT_BUDGET, grouped_decode_attention, tile_for
from icon2_rt.ops import AttentionItems
from tests.launches import (
    ARCHITECTURES,
    MODELS,
    SHARED_MEMORY,
    Launch,
    Sizes,
    compiled,
    launches_of,
    over_budget,
    recorded,
)

BUDGETS = {"split_kernel": SPLIT_BUDGET, "merge_kernel": MERGE_BUDGET}
# The other head sizes that models have, on a model's other sizes.
LLAMA = MODELS[0]
OTHERS = [
    *(replace(LLAMA, name=f"heads of {d}", head_dim=d) for d in (80, 96, 256)),
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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_within_budget_on_every_architecture(arch: int, monkeypatch) -> None:
    """As configured for the architecture, whose multiprocessors have a KiB more than a program may have."""
    monkeypatch.setattr(attention, "shared_memory", lambda device: SHARED_MEMORY[arch] + 1024)
    assert over_budget(launches(LLAMA), BUDGETS, (arch,)) == []


@pytest.mark.parametrize("model", OTHERS, ids=str)
def test_other_head_sizes_are_within_budget(model: Sizes) -> None:
    assert over_budget(launches(model), BUDGETS) == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_largest_head_fits_the_shared_memory(arch: int) -> None:
    (split,) = [each for each in launches(OTHERS[2]) if each.kernel.__name__ == "split_kernel"]
    assert OTHERS[2].head_dim == 256
    assert compiled(split, arch).shared <= SHARED_MEMORY[arch]


SIZES = pytest.mark.parametrize("model", [LLAMA, *OTHERS, MODELS[-1]], ids=str)


@SIZES
@pytest.mark.parametrize("memory", [100, 228], ids="{} KiB".format)
def test_a_tile_s_shared_memory_is_what_the_compiler_takes(model: Sizes, memory: int, monkeypatch) -> None:
    monkeypatch.setattr(attention, "shared_memory", lambda device: memory * 1024)
    tile = tile_for(model.head_dim, model.dtype, 128, memory * 1024)
    split = compiled(launches(model)[0], 89 if memory == 100 else 90)
    assert tile.shared - 64 <= split.shared <= tile.shared
    threads, held = 32 * tile.warps, tile.resident(memory * 1024)
    assert held * threads * -(-split.registers // 8) * 8 <= 65536


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if SHARED_MEMORY[arch] < 100 * 1024])
def test_two_programs_share_a_small_multiprocessor(arch: int, monkeypatch) -> None:
    """sm_86, sm_89 and sm_120 have 100 KiB: a program that waits for memory has another one beside it."""
    memory = SHARED_MEMORY[arch] + 1024  # of a multiprocessor; what a program may have is a KiB less
    monkeypatch.setattr(attention, "shared_memory", lambda device: memory)
    split = launches(LLAMA, n=640)[0]
    found = compiled(split, arch)
    assert 2 * (found.shared + 1024) <= memory
    assert 2 * 128 * -(-found.registers // 8) * 8 <= 65536
    assert split.grid == (2 * multiprocessors(torch.device("meta")),)
    # A tile before the loop, one inside it.
    assert found.ptx.count("cp.async.cg.shared.global") == 2 * 2 * 64 * 128 * 2 // (16 * 128)
    assert over_budget(launches(LLAMA), BUDGETS, (arch,)) == []


def test_a_grid_is_what_multiprocessors_hold_at_once() -> None:
    """By shared memory (sm_80, small ones) or registers (sm_90: three, as the budget says)."""
    held = {
        (kib, d): tile_for(d, torch.bfloat16, 128, kib * 1024).resident(kib * 1024)
        for kib in (100, 164, 228)
        for d in (64, 128, 256)
    }
    assert held == {(100, 64): 2, (100, 128): 2, (100, 256): 2} | {
        (164, 64): 2, (164, 128): 2, (164, 256): 2, (228, 64): 3, (228, 128): 3, (228, 256): 2
    }  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kv_flows_through_shared_memory_into_one_kind_of_tile(arch: int) -> None:
    split = compiled(launches(LLAMA)[0], arch)
    # K and V ahead of their use, asynchronously and 16 bytes at a time: two tiles before the loop, one inside it.
    assert split.ptx.count("cp.async.cg.shared.global") == 3 * 2 * 64 * 128 * 2 // (16 * 128)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in split.ptx
    # The larger tiles' instructions would give a row other bytes than the small one's.
    assert "wgmma" not in split.ptx and "tcgen05" not in split.ptx


@triton.jit
def careless_dot_kernel(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fp32_is_not_computed_in_ten_bits(arch: int) -> None:
    """A dot of fp32 takes TF32 unless it is told not to, and the interpreter cannot show it."""
    split, merge = launches(OTHERS[-1])
    assert OTHERS[-1].dtype == torch.float32
    for each in (split, merge):
        assert "tf32" not in compiled(each, arch).ptx
        assert "mma" not in compiled(each, arch).ptx


def test_ten_bits_would_be_seen() -> None:
    x = torch.empty(32, 32, device="meta")
    with recorded() as made:
        careless_dot_kernel[(1,)](x, x, x, N=32, num_warps=4)
    assert "tf32" in compiled(made[0], 90).ptx


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
