"""How a kernel's result is held against the reference's in a storage type: by what the reference itself loses in it.

A tolerance for bf16 that is wide enough for every op hides a missing or an extra rounding. Here the reference in fp32,
on the same numbers, says what is exact; the reference in the storage type says what is lost of it; and the kernel may
lose hardly more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.check import copied

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def exactly(reference: Callable[..., Any], *arguments: Any) -> Any:
    """What ``reference`` gives in fp32 on copies of the arguments."""
    return reference(*copied(arguments, upcast=True))


def no_worse(out: Tensor, reference: Tensor, exact: Tensor, *, differ: float = 0.01) -> None:
    """``out`` has the reference's dtype and shape, and what it loses.

    Fails where ‖out − exact‖ > 1.5 · ‖reference − exact‖ + 1e-5 · ‖exact‖, or where more than a share ``differ`` of the
    elements (two are always allowed) is not the reference's to the bit: a sum in another order falls on the other side
    of a rounding now and then, another rounding does so everywhere.
    """
    assert (out.dtype, out.shape) == (reference.dtype, reference.shape)
    assert torch.equal(out.isnan(), reference.isnan())
    ours, theirs = ((x.double() - exact.double()).norm() for x in (out, reference))
    assert float(ours) <= 1.5 * float(theirs) + 1e-5 * float(exact.double().norm()), (float(ours), float(theirs))
    if out.dtype != torch.float32:
        unequal = int((out != reference).sum())
        assert unequal <= max(2, differ * out.numel()), f"{unequal} of {out.numel()} elements differ"
