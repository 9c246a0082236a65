"""The compile lane itself notices what it is there to notice."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from icon2_rt.kernels.budget import Budget
from icon2_rt.kernels.silu_mul import BUDGET, silu_mul
from tests.launches import ARCHITECTURES, SHARED_MEMORY, compiled, launches_of, over_budget


def test_narrow_loads_are_over_budget() -> None:
    aligned, odd = (torch.empty(4, 2 * width, dtype=torch.bfloat16, device="meta") for width in (1024, 1023))
    assert over_budget(launches_of(silu_mul, aligned), {"silu_mul_kernel": BUDGET}) == []
    (launch,) = launches_of(silu_mul, odd)
    assert (compiled(launch, 90).wide_loads, compiled(launch, 90).narrow_loads) == (0, 16)
    assert any("narrow_loads 16 > 0" in line for line in over_budget([launch], {"silu_mul_kernel": BUDGET}))


def test_a_view_is_bound_as_far_as_it_is_aligned() -> None:
    buffer = torch.empty(4, 4096, dtype=torch.bfloat16, device="meta")
    (launch,) = launches_of(silu_mul, buffer[:, 4:2052])
    assert compiled(launch, 90).narrow_loads > 0
    (launch,) = launches_of(silu_mul, buffer[:, 8:2056])
    assert compiled(launch, 90).narrow_loads == 0


def test_registers_are_counted() -> None:
    launches = launches_of(silu_mul, torch.empty(4, 2048, device="meta"))
    small = Budget(registers=8, shared=0, narrow_loads=0)
    assert len(over_budget(launches, {"silu_mul_kernel": small}, ARCHITECTURES)) == len(ARCHITECTURES)
    raised = replace(small, registers_on={86: 255, 120: 255})
    over = over_budget(launches, {"silu_mul_kernel": raised}, ARCHITECTURES)
    assert [line.split(":")[0] for line in over] == [f"silu_mul_kernel on sm_{arch}" for arch in (80, 89, 90, 100)]


def test_what_a_gpu_does_not_have_is_over_any_budget() -> None:
    (launch,) = launches_of(silu_mul, torch.empty(4, 2048, device="meta"))
    budget = Budget(registers=255, shared=1 << 20, narrow_loads=0)
    for arch, most in SHARED_MEMORY.items():
        greedy = replace(compiled(launch, arch), shared=100 * 1024, registers=72, threads=1024)
        lines = greedy.over(budget)
        assert any("shared memory of the GPU" in line for line in lines) is (most < 100 * 1024)
        assert any("registers of the GPU 73728 > 65536" in line for line in lines)


def test_fake_tensors_are_recorded_like_meta_tensors() -> None:
    meta = launches_of(silu_mul, torch.empty(4, 2048, device="meta"))
    with FakeTensorMode():
        fake = launches_of(silu_mul, torch.empty(4, 2048))
    assert fake == meta
    assert meta[0].arguments()["width"] == 1024
