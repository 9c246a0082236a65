"""bf16 in Triton's interpreter, mended.

The interpreter keeps bf16 as its 16 bits and hands those to numpy as integers: sums, products and comparisons of them
are those of the bit patterns, and a cast to bf16 cuts off instead of rounding. :func:`mend_bf16` makes it do what a GPU
does: every operation on bf16 is one in fp32 with its result rounded to nearest even, ``tl.dot`` and reductions
accumulate in fp32. (Sums, products and quotients in fp32 have enough digits that the second rounding changes nothing.)

It wraps methods of ``InterpreterBuilder``, ``ReduceOps`` and ``ScanOps``, which Triton 3.6 and 3.7 have alike;
tests/interpret/test_interpreter.py compares with torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits, uint16, of the bf16 nearest to each fp32 ``x``; of two equally near, the even one. NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(x), quiet, nearest).astype(np.uint16).reshape(np.shape(x))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The fp32 of bf16 bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> Any:
    return TensorHandle(from_bf16(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle: Any) -> Any:
    """A result in fp32 as bf16; that of a comparison as it is."""
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(round_to_bf16(handle.data), tl.bfloat16)


def _through_fp32(usual: Any) -> Any:
    """``usual(self, *handles, *rest)`` with its bf16 operands in fp32, its result rounded."""

    def method(self: Any, *args: Any) -> Any:
        handles = [arg for arg in args if isinstance(arg, TensorHandle)]
        if not any(map(_is_bf16, handles)) or args[-1] is np.where:  # a choice moves bits
            return usual(self, *args)
        return _narrow(usual(self, *(_wide(arg) if isinstance(arg, TensorHandle) else arg for arg in args)))

    return method


def _cast(usual: Any) -> Any:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and not _is_bf16(src):
            return TensorHandle(round_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return usual(self, _wide(src), dst_type) if dst_type.scalar != tl.bfloat16 else src

    return cast_impl


def _fp_to_fp(usual: Any) -> Any:
    nearest = interpreter._ir.ROUNDING_MODE.RTNE

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16 and rounding_mode == nearest:
            return self.cast_impl(src, dst_type)
        return usual(self, src, dst_type, rounding_mode)

    return create_fp_to_fp


def _dot(usual: Any) -> Any:
    """Products of bf16 are exact in fp32, where a tensor core sums them too."""

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        done = usual(self, _wide(a), _wide(b), _wide(d), *rest)
        return _narrow(done) if _is_bf16(d) else done

    return create_dot


def _reduce(usual: Any) -> Any:
    def apply_impl(self: Any, inputs: Any) -> Any:
        narrow = [_is_bf16(x.handle) for x in inputs]
        if not any(narrow):
            return usual(self, inputs)
        done = usual(self, tuple(self.to_tensor(_wide(x.handle).data, tl.float32) for x in inputs))
        results = list(done) if isinstance(done, list | tuple) else [done]
        # An index, where one is asked for, comes second and is an integer.
        return [
            self.to_tensor(_narrow(x.handle).data, tl.bfloat16) if x.dtype == tl.float32 and was else x
            for x, was in zip(results, narrow, strict=False)
        ] + results[len(narrow) :]

    return apply_impl


_WRAPPERS: tuple[tuple[type, str, Any], ...] = (
    (InterpreterBuilder, "cast_impl", _cast),
    (InterpreterBuilder, "create_fp_to_fp", _fp_to_fp),
    (InterpreterBuilder, "create_dot", _dot),
    *((InterpreterBuilder, name, _through_fp32) for name in ("binary_op", "unary_op", "ternary_op")),
    *((InterpreterBuilder, f"create_{name}", _through_fp32) for name in ("fma", "rsqrt", "erf")),
    (ReduceOps, "apply_impl", _reduce),
    (ScanOps, "apply_impl", _reduce),
)
_usual = {(owner, name): getattr(owner, name) for owner, name, _ in _WRAPPERS}


def mend_bf16() -> None:
    """From now on bf16 is right in Triton's interpreter in this process. Once or often is the same."""
    for owner, name, wrapper in _WRAPPERS:
        setattr(owner, name, wrapper(_usual[owner, name]))
