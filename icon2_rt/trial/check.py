"""Is what an op computes right? Its memory is fenced and filled with nonsense first, and its results are held against
the reference in fp32.

Right means: integers are equal. Of floating-point numbers, no row is further from the reference in fp32 than three
times what the reference itself loses in the same dtype, and no element by more than a few units in the last place of
itself and of its row's root mean square. There is no absolute tolerance: it would be too tight for one model and pass
anything for another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Bytes before and behind a fenced tensor. A multiple of what torch aligns memory to, so that kernels see no difference.
FENCE = 1024
_FENCE_BYTE, _FLOAT_BYTE, _INT_BYTE = 0xA5, 0xFF, 0x7F  # 0xFF everywhere is NaN in every floating-point type
# Fields that an op may leave anything in.
SCRATCH = ("partials", "partial_lse", "scratch")
# A row's norm may be off by so many times what the reference loses, and by so much more.
LOSSES, NORM = 3.0, 1e-5
# An element by so many units in the last place, and by so much (of itself and of its row) where sums are long.
UNITS, ELEMENT = 8.0, 3e-5
# Tokens whose scores differ by no more than this, relatively, may be chosen one for the other.
TIE = 1e-5


class Fences:
    """Tensors with a pattern before and behind them; :meth:`broken` says which pattern has changed."""

    def __init__(self) -> None:
        self._whole: list[tuple[str, Tensor, int]] = []

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str,
        stride: tuple[int, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        """A tensor full of nonsense: NaN, or a large number. Contiguous, or with ``stride``, and then what lies between
        its elements is nonsense too."""
        n = (torch.Size(shape).numel() if stride is None else span(shape, stride)) * dtype.itemsize
        whole = torch.full((2 * FENCE + -(-n // 64) * 64,), _FENCE_BYTE, dtype=torch.uint8, device=device)
        inside = whole[FENCE : FENCE + n]
        if dtype == torch.bool:
            inside.fill_(1)
        else:
            inside.fill_(_FLOAT_BYTE if dtype.is_floating_point else _INT_BYTE)
        self._whole.append((name, whole, n))
        return inside.view(dtype).view(shape) if stride is None else inside.view(dtype).as_strided(shape, stride)

    def copy(self, value: Any, kept: frozenset[int] = frozenset(), name: str = "argument") -> Any:
        """``value`` with every tensor in it copied into fenced memory, but for those whose address is in ``kept``."""
        if isinstance(value, Tensor):
            if value.data_ptr() in kept:
                return value
            fenced = self.empty(tuple(value.shape), value.dtype, value.device, name, stride_of_copy(value))
            return fenced if name in SCRATCH else fenced.copy_(value)
        return rebuild(value, lambda v, part: self.copy(v, kept, part or name))

    def broken(self) -> str | None:
        """The first tensor beside which something was written, None if there is none."""
        for name, whole, n in self._whole:
            if bool((whole[:FENCE] != _FENCE_BYTE).any()) or bool((whole[FENCE + n :] != _FENCE_BYTE).any()):
                return name
        return None


class Fenced(TorchFunctionMode):
    """Within the context, memory that an op asks for is fenced and holds nonsense."""

    def __init__(self, fences: Fences):
        super().__init__()
        self.fences = fences

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.empty, torch.empty_like, Tensor.new_empty) or kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        like = args[0] if func is not torch.empty else None
        device = torch.device(kwargs.get("device") or (like.device if isinstance(like, Tensor) else "cpu"))
        meta = func(*args, **{**kwargs, "device": "meta"})
        return self.fences.empty(tuple(meta.shape), meta.dtype, device, "a result")


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements of memory from the first to the last of a tensor, its gaps included."""
    return 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def stride_of_copy(x: Tensor) -> tuple[int, ...] | None:
    """The stride that a copy of ``x`` is to have so that rows lie as far apart as its do, which is what a kernel that
    takes one row's length for another's gets wrong. None, contiguous, where it is, or elements share memory."""
    shared = span(x.shape, x.stride()) < x.numel()
    return None if x.is_contiguous() or shared else x.stride()


def copy_of(x: Tensor) -> Tensor:
    """A copy whose rows lie as far apart as those of ``x``."""
    stride = stride_of_copy(x)
    if stride is None:
        return x.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def rebuild(value: Any, change: Callable[[Any, str | None], Any]) -> Any:
    """``value`` with the parts of a tuple, list or dataclass changed; anything else stays itself."""
    if isinstance(value, tuple | list):
        return type(value)(change(v, None) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: change(getattr(value, f.name), f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def upcast(value: Any) -> Any:
    """``value`` copied, with every floating-point tensor (and dtype) in it fp32: the arguments of the definition."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype != torch.float32 else value.clone()
    if isinstance(value, torch.dtype):
        return torch.float32 if value.is_floating_point else value
    return rebuild(value, lambda v, part: v if part in SCRATCH else upcast(v))


def tensors(value: Any, name: str = "result") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside with a name, in order, without what may hold anything."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for v in value:
            yield from tensors(v, name)
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from tensors(v, key)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            if f.name not in SCRATCH:
                yield from tensors(getattr(value, f.name), f"{name}.{f.name}")


def same_bytes(one: Any, other: Any) -> str | None:
    """The name of the first tensor that differs in any bit, None if none does."""
    for (name, a), (_, b) in zip(tensors(one), tensors(other), strict=True):
        if a.data_ptr() != b.data_ptr() and not torch.equal(_bytes(a), _bytes(b)):
            return name
    return None


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


@dataclasses.dataclass(frozen=True)
class Difference:
    """``error``: the largest ‖out − expected‖ / ‖expected‖ of a row. ``wrong``: None, or the first thing that is."""

    error: float
    wrong: str | None


def compare(out: Any, expected: Any, reference: Any) -> Difference:
    """Hold results ``out`` against ``expected``, the reference's on the same numbers in fp32; ``reference`` are its
    results in out's own dtype, which say how much that loses."""
    worst, wrong = 0.0, None
    for (name, a), (_, b), (_, r) in zip(tensors(out), tensors(expected), tensors(reference), strict=True):
        error, here = _compare(name, a, b, r)
        worst, wrong = max(worst, error), wrong or here
    return Difference(worst, wrong)


def _compare(name: str, out: Tensor, expected: Tensor, reference: Tensor) -> tuple[float, str | None]:
    if tuple(out.shape) != tuple(expected.shape):
        return 0.0, f"{name} has the shape {list(out.shape)} and not {list(expected.shape)}"
    if not out.numel() or out.data_ptr() == expected.data_ptr():
        return 0.0, None
    if not out.is_floating_point():
        unequal = int((out != expected).sum())
        return 0.0, f"{unequal} of {out.numel()} elements of {name} differ" if unequal else None
    worst, wrong = 0.0, None
    for begin, a in _rows(out):  # a piece at a time: fp64 copies of KV pages would be large
        b, r = (x.flatten().view(-1, a.shape[1])[begin : begin + len(a)].double() for x in (expected, reference))
        a = a.double()
        norm = b.norm(dim=1)
        scale = norm.clamp(min=1e-30)
        off = (a - b).norm(dim=1)
        error, lost = off / scale, (r - b).norm(dim=1) / scale
        # A row of zeros has no relative error: nothing may be there.
        empty = norm == 0
        error = torch.where(empty, torch.where(off == 0, 0.0, torch.inf), error)
        lost = torch.where(empty, 0.0, lost)
        allowed = LOSSES * torch.maximum(lost, lost.median()) + NORM
        bad = ~(error <= allowed)  # NaN is bad
        at = (a - b).abs()
        room = (UNITS * torch.finfo(out.dtype).eps + ELEMENT) * (b.abs() + norm[:, None] / a.shape[1] ** 0.5)
        far = ~(at <= room)
        finite = error[torch.isfinite(error)]
        worst = max(worst, float(finite.max()) if len(finite) else 0.0)
        if wrong is None and bool(far.any()):
            place = int(far.flatten().nonzero()[0])
            row, column = divmod(place, a.shape[1])
            wrong = (
                f"{int(far.sum())} of {out.numel()} elements of {name} are wrong; the first, element {column} of row "
                f"{begin + row}, is {float(a[row, column]):.6g} and should be {float(b[row, column]):.6g}"
            )
        if wrong is None and bool(bad.any()):
            row = int(bad.nonzero()[0])
            wrong = (
                f"row {begin + row} of {name} is off by {float(error[row]):.2e}, of which {float(allowed[row]):.2e} "
                f"are allowed"
            )
    return worst, wrong


def _rows(x: Tensor, elements: int = 1 << 24) -> Iterator[tuple[int, Tensor]]:
    """x as rows of its last dimension (one row, where it has only that), so many elements at a time."""
    rows = x.flatten().view(-1, x.shape[-1])
    step = max(1, elements // rows.shape[1])
    for begin in range(0, len(rows), step):
        yield begin, rows[begin : begin + step]
