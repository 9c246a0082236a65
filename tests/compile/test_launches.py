"""The compile lane itself notices what it is there to notice."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from icon2_rt.kernels.budget import Budget
from icon2_rt.kernels.silu_mul import BUDGET, silu_mul
from tests.launches import compiled, launches_of, over_budget


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
    assert len(over_budget(launches, {"silu_mul_kernel": Budget(registers=8, shared=0, narrow_loads=0)})) == 3


def test_fake_tensors_are_recorded_like_meta_tensors() -> None:
    meta = launches_of(silu_mul, torch.empty(4, 2048, device="meta"))
    with FakeTensorMode():
        fake = launches_of(silu_mul, torch.empty(4, 2048))
    assert fake == meta
    assert meta[0].arguments()["width"] == 1024
