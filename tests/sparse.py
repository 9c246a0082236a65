"""Tensors of more than 2³¹ elements that take no memory, and launches of a few of their rows.

A private mapping without reserved memory reads as zeros and takes a page of memory for every page that is written. With
it a launcher can be called on the tensors of a batch far larger than there will be, and Triton's interpreter made to
run only the programs of the rows that hold something: an offset that is computed in 32 bits then misses them.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux; Python names it from 3.13 on
LIMIT = 1 << 31


def sparse(*shape: int, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
    """Zeros. As many elements as an offset of 32 bits that has wrapped around may reach lie before and behind them."""
    size = dtype.itemsize
    before, elements = LIMIT * size, math.prod(shape) * size
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = mmap.mmap(-1, before + max(elements, LIMIT * size), flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=before).view(shape)


@contextmanager
def only(programs: Mapping[str, Sequence[tuple[int, ...]]]) -> Iterator[None]:
    """Within the context a kernel runs only the ``programs`` listed under its name, of the grid that it is given, and
    what launchers allocate is sparse."""
    usual, builder = InterpretedFunction.run, interpreter.interpreter_builder

    def run(self: InterpretedFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        sizes = (*grid, 1, 1)[:3]
        for program in programs[self.__name__]:
            index = (*program, 0, 0)[:3]
            assert all(i < n for i, n in zip(index, sizes, strict=True)), f"{index} is not in the grid {sizes}"

            def take_index(_: InterpreterBuilder, *__: int, index: tuple[int, ...] = index) -> None:
                builder.grid_idx = index

            def take_sizes(_: InterpreterBuilder, *__: int) -> None:
                builder.grid_dim = sizes

            with (
                mock.patch.object(InterpreterBuilder, "set_grid_idx", take_index),
                mock.patch.object(InterpreterBuilder, "set_grid_dim", take_sizes),
            ):
                usual(self, *args, grid=(1,), warmup=warmup, **options)

    def empty(*shape: Any, **how: Any) -> Tensor:
        return sparse(*(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape), **how)

    def empty_like(like: Tensor) -> Tensor:
        return sparse(*like.shape, dtype=like.dtype)

    with (
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
    ):
        yield


@contextmanager
def in_32_bits(but: str = "") -> Iterator[None]:
    """Within the context every integer of 64 bits in a kernel has 32, as if no index had been widened; in all kernels
    ``but`` one."""
    usual, narrows = InterpretedFunction.run, [False]
    cast, load = InterpreterBuilder.cast_impl, InterpreterBuilder.create_masked_load
    store, binary = InterpreterBuilder.create_masked_store, InterpreterBuilder.binary_op

    def whole(builder: InterpreterBuilder, pointers: Any, value: Any, *rest: Any) -> Any:
        """What is stored has its 64 bits all the same."""
        if pointers.get_element_ty() == tl.int64:
            value = TensorHandle(value.data.astype("int64"), tl.int64)
        return store(builder, pointers, value, *rest)

    def run(self: InterpretedFunction, *args: Any, **options: Any) -> None:
        narrows.append(self.__name__ != but)
        usual(self, *args, **options)
        narrows.pop()

    def narrow(handle: Any) -> Any:
        if narrows[-1] and handle.data.dtype.name == "int64":
            handle.data = handle.data.astype("int32")
        return handle

    with (
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(InterpreterBuilder, "cast_impl", lambda *args: narrow(cast(*args))),
        mock.patch.object(InterpreterBuilder, "create_masked_load", lambda *args: narrow(load(*args))),
        mock.patch.object(InterpreterBuilder, "create_masked_store", whole),
        mock.patch.object(InterpreterBuilder, "binary_op", lambda *args: narrow(binary(*args))),
    ):
        yield
