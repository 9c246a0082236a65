"""torch.ops.icon2_rt.*: what torch asks of a custom op, and the same results as the functions that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from icon2_rt import ops
from icon2_rt.ops import RowSampling, RowState, library
from tests.op_inputs import attention_items, rand, row_state, row_steering, settings, step_of

STEERING = ("bank", "count", "index", "alpha", "beta", "keep_norm", "which")
SAMPLING = tuple(field.name for field in fields(RowSampling) if field.name != "scratch")
ITEMS = ("rows", "pages", "splits", "layers", "count", "starts", "lengths", "n_splits", "split", "n_partials")


def values(of: object, names: tuple[str, ...] | None = None) -> list[Any]:
    return [getattr(of, name) for name in names or [field.name for field in fields(of)]]  # type: ignore[arg-type]


def arguments(op: str) -> tuple[Any, ...]:
    """The arguments of one call, made anew each time: an op may write them."""
    torch.manual_seed(3)
    if op == "embed":
        return torch.tensor([3, 0, 3]), rand(7, 20)
    if op == "linear":
        return rand(3, 20), rand(9, 20), rand(9)
    if op == "silu_mul":
        return (rand(3, 20),)
    if op == "add_steer_rmsnorm":
        steering = row_steering(5, 4, 20, 2)
        return rand(5, 20), rand(5, 20), rand(20), 1e-5, torch.zeros(5, 3), *values(steering, STEERING), 2
    if op == "add_steer_rmsnorm, no block before":
        return None, rand(5, 20), rand(20), 1e-5, None
    if op == "rope_append":
        slots = torch.tensor([3, -1, 9])
        pages = rand(3, 4, 2, 8), rand(3, 4, 2, 8)
        return rand(3, 8 * 8), rand(3, 1, 8), rand(3, 1, 8), rand(8), rand(8), 1e-6, *pages, slots
    if op == "sample":
        how = settings(4, 30, temperature=torch.full((4,), 0.8), top_k=torch.full((4,), 7, dtype=torch.int32))
        return rand(4, 30), *values(how, SAMPLING), *values(row_state([9] * 4, [True, True, False, True]))
    state, tables = step_of([True, True, False, True, True, True])
    items = attention_items(state, tables, 8, 4, 4)
    if op == "begin_step":
        inv_freq = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
        drawn = values(items, ("rows", "splits", "count", "lengths", "n_splits", "split"))
        return state.positions, state.running, tables, 8, inv_freq, 1.25, *drawn, torch.float32
    items.update(state)
    pages = rand(72, 8, 2, 8), rand(72, 8, 2, 8)
    return rand(6, 4, 8), *pages, *values(items, ITEMS), 0.3, 1


REGISTERED = (
    "embed",
    "linear",
    "silu_mul",
    "add_steer_rmsnorm",
    "add_steer_rmsnorm, no block before",
    "rope_append",
    "begin_step",
    "grouped_decode_attention",
    "sample",
)


def registered(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.icon2_rt, op.split(",")[0])


def test_every_op_of_a_backend_is_registered():
    about = {"backend", "fixed", "capture", "attention_partials", "sample_scratch"}  # and prefill has its own libraries
    of_a_step = {field.name for field in fields(ops.Ops)} - about - {"prefill_attention"}
    assert of_a_step == {op.split(",")[0] for op in REGISTERED}


@pytest.mark.parametrize("op", REGISTERED)
def test_what_torch_asks_of_an_op(op):
    """Its schema says what it writes, its fake has the shapes and dtypes of the real one, and it can be traced."""
    torch.library.opcheck(registered(op), arguments(op))


@pytest.mark.parametrize("op", REGISTERED)
def test_compiled_and_not_it_writes_and_returns_the_same(op):
    torch._dynamo.reset()
    plain, traced = arguments(op), arguments(op)
    one = registered(op)(*plain)
    two = torch.compile(registered(op), backend="aot_eager", fullgraph=True)(*traced)
    same(one, two)
    same(plain, traced)


def same(one: Any, two: Any) -> None:
    if isinstance(one, tuple | list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            same(a, b)
    elif isinstance(one, Tensor):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, equal_nan=True)
    else:
        assert one == two


def test_it_is_the_backends_op():
    x, residual, weight, eps, written, *rest = arguments("add_steer_rmsnorm")
    steering, measured = row_steering(5, 4, 20, 2), torch.zeros(5, 3)
    for name, value in zip(STEERING, rest, strict=False):
        getattr(steering, name).copy_(value)
    expected = ops.add_steer_rmsnorm(x, residual, weight, eps, steering, 2, measured)
    same(torch.ops.icon2_rt.add_steer_rmsnorm(x, residual, weight, eps, written, *rest), expected)
    same(written, measured)

    logits, *others = arguments("sample")
    how, state = RowSampling(*others[:11]), RowState(*(t.clone() for t in others[11:]))
    ops.sample(logits, how, state)
    torch.ops.icon2_rt.sample(logits, *others)
    same(others[11:], values(state))


def test_half_a_steering_is_refused():
    with pytest.raises(ValueError, match="given together"):
        library.add_steer_rmsnorm(None, rand(2, 8), rand(8), 1e-5, None, bank=rand(1, 2, 8))
