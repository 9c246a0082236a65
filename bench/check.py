"""Is what is measured right? An op against the reference in fp32 on the same numbers, its outputs poisoned first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from icon2_rt.trial.check import rebuild
from icon2_rt.trial.check import tensors as named_tensors


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the context, memory that `torch.empty` gives out holds NaN (the largest number for integers): what an op
    does not write shows."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    torch.use_deterministic_algorithms(True, warn_only=True)  # which is what makes torch fill it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def compare(
    function: Callable[..., Any], reference: Callable[..., Any], arguments: tuple[Any, ...]
) -> dict[str, float]:
    """``error``: the largest ‖out − expected‖ / ‖expected‖ over everything that the op returns or writes into (NaN if
    anything is); ``unequal``: the largest share of integers and booleans that differ."""
    ours, theirs = copied(arguments, upcast=False), copied(arguments, upcast=True)
    with poisoned():
        returned = function(*ours)
    expected = reference(*theirs)
    error = unequal = 0.0
    for out, right in zip(tensors((returned, ours)), tensors((expected, theirs)), strict=True):
        if right.is_floating_point():
            difference = float((out.double() - right.double()).norm() / right.double().norm().clamp(min=1e-30))
            error = math.nan if math.isnan(error + difference) else max(error, difference)
        else:
            unequal = max(unequal, float((out != right).float().mean()) if right.numel() else 0.0)
    return {"error": error, "unequal": unequal}


def copied(value: Any, *, upcast: bool) -> Any:
    """The arguments anew, so that what an op writes into is nobody else's."""
    if isinstance(value, Tensor):
        return value.float() if upcast and value.is_floating_point() else value.clone()
    return rebuild(value, lambda v, _: copied(v, upcast=upcast))


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside, in order, without memory that an op may leave anything in."""
    return (tensor for _, tensor in named_tensors(value))
