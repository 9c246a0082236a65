"""The launches that a launcher makes, recorded instead of run, and each compiled for GPUs that are not there.

What is compiled is what a launch on a GPU would compile: the argument types, the values and divisibilities that Triton
specialises on, and the options come from the recorded call by Triton's own binding. Tensors may be on the meta device
or fake: nothing is read.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from icon2_rt.kernels.budget import Budget

# Shared memory that a program may have, in bytes, on every architecture that is supported.
SHARED_MEMORY = {arch: kib * 1024 for arch, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))}
ARCHITECTURES = tuple(SHARED_MEMORY)
# For every shape: the oldest, and the one with other instructions. One shape of each kernel is compiled for all.
USUAL = (80, 90)


@dataclass(frozen=True)
class Sizes:
    """A model as the kernels see it."""

    name: str
    dtype: torch.dtype
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    def __str__(self) -> str:
        return self.name


MODELS = (
    Sizes("Llama-3-8B", torch.bfloat16, 4096, 32, 8, 128, 14336, 128256),
    Sizes("Llama-3.2-1B", torch.bfloat16, 2048, 32, 8, 64, 8192, 128256),
    Sizes("Llama-3.2-3B", torch.bfloat16, 3072, 24, 8, 128, 8192, 128256),
    Sizes("Qwen3-8B", torch.bfloat16, 4096, 32, 8, 128, 12288, 151936),
    Sizes("Qwen2-7B", torch.bfloat16, 3584, 28, 4, 128, 18944, 152064),
    Sizes("shipped-fp32", torch.float32, 128, 4, 2, 32, 256, 975),
    Sizes("shipped-bf16", torch.bfloat16, 128, 4, 2, 32, 256, 975),
)


@dataclass(frozen=True)
class Pointer:
    """What Triton looks at in a tensor argument: its dtype, and whether its address is a multiple of 16."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Launch:
    """One ``kernel[grid](*args, **options)``; ``options`` has keyword arguments and compiler options alike."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def bind(self, arch: int = 90) -> tuple[Any, ...]:
        """Compiler options, signature, constants and attributes, as Triton makes them of this launch on ``arch``."""
        backend = make_backend(GPUTarget("cuda", arch, 32))
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        options = {**self.options, "debug": False, "instrumentation_mode": ""}
        bound, specialization, rest = bind(*self.args, **options)
        return self.kernel._pack_args(backend, options, bound, specialization, rest)

    def arguments(self) -> dict[str, Any]:
        """Every argument of the kernel by its name."""
        names = [p.name for p in self.kernel.params]
        return dict(zip(names, self.args, strict=False)) | {k: v for k, v in self.options.items() if k in names}


def _pointer(value: Any) -> Any:
    # Every allocation begins at a multiple of 512 bytes, so the offset says how a view is aligned.
    return Pointer(value.dtype, value.storage_offset() * value.element_size()) if torch.is_tensor(value) else value


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, a Triton launch does nothing but appear in the list."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert not callable(grid), "a grid that is computed from the kernel's arguments hides its size"
        options = {name: _pointer(value) for name, value in options.items()}
        launches.append(Launch(self, tuple(grid), tuple(map(_pointer, args)), options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def launches_of(launcher: Callable, *args: Any, **kwargs: Any) -> list[Launch]:
    """The launches of one call of ``launcher``."""
    with recorded() as launches:
        launcher(*args, **kwargs)
    return launches


@dataclass(frozen=True)
class Compiled:
    """A launch as machine code for one architecture, and what it uses; see :class:`icon2_rt.kernels.budget.Budget`.

    ``wide_loads`` counts the instructions that load 16 bytes or more from global memory, into registers or
    asynchronously into shared memory.
    """

    name: str
    arch: int
    ttgir: str
    ptx: str
    registers: int
    stack: int
    shared: int
    wide_loads: int
    narrow_loads: int
    threads: int

    def over(self, budget: Budget) -> list[str]:
        """What of the budget, or of what the architecture has, is exceeded, in words; empty where nothing is."""
        used = [(name, getattr(self, name), most) for name, most in budget.on(self.arch).items()]
        used.append(("shared memory of the GPU", self.shared, SHARED_MEMORY[self.arch]))
        # Registers are given to a warp in units of 8 for each thread.
        used.append(("registers of the GPU", -(-self.registers // 8) * 8 * self.threads, 65536))
        return [f"{self.name} on sm_{self.arch}: {name} {n} > {most}" for name, n, most in used if n > most]


def compiled(launch: Launch, arch: int) -> Compiled:
    """``launch`` compiled for compute capability ``arch``; equal launches are compiled once."""
    options, signature, constants, attributes = launch.bind(arch)
    frozen = (tuple(sorted(mapping.items())) for mapping in (signature, constants))
    named = tuple((place, tuple(map(tuple, values))) for place, values in sorted(attributes.items()) if values)
    return _compile(launch.kernel, *frozen, named, options, arch)


@functools.cache
def _compile(
    kernel: JITFunction, signature: tuple, constants: tuple, attributes: tuple, options: Any, arch: int
) -> Compiled:
    # Back in the order of the kernel's parameters, which is the order in which the code receives them.
    types = {name: dict(signature)[name] for name in (p.name for p in kernel.params)}
    source = ASTSource(kernel, types, dict(constants), {place: list(map(list, v)) for place, v in attributes})
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options.__dict__)
    ptx = code.asm["ptx"]
    wide = [width >= 16 for width in _loads(ptx)]
    registers, stack = _resources(code.asm["cubin"])
    return Compiled(
        name=kernel.__name__,
        arch=arch,
        ttgir=code.asm["ttgir"],
        ptx=ptx,
        registers=registers,
        stack=stack,
        shared=code.metadata.shared,
        wide_loads=sum(wide),
        narrow_loads=len(wide) - sum(wide),
        threads=32 * code.metadata.num_warps,
    )


def _loads(ptx: str) -> list[int]:
    """Bytes per thread of every load from global memory. A bulk copy (TMA) is as wide as can be."""
    plain = re.findall(r"\bld\.global((?:\.[\w:]+)*)\s", ptx)
    found = []
    for modifiers in plain:
        lanes = re.search(r"\.v(\d)\b", modifiers)
        bits = re.search(r"\.[busf](\d+)$", modifiers)
        assert bits is not None, f"a load of unknown width: ld.global{modifiers}"
        found.append(int(bits[1]) // 8 * (int(lanes[1]) if lanes else 1))
    found += [int(n, 0) for n in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(0x[0-9a-f]+|\d+)", ptx)]
    return found + [128 for _ in re.findall(r"\bcp\.async\.bulk\.tensor\S*global\b", ptx)]


def fused_with_a_shuffle(ptx: str) -> list[str]:
    """The fused multiply-adds one of whose operands is what another lane has sent (``shfl.sync.bfly``), moved or
    chosen on the way at most. In a butterfly sum such a lane rounds its own product once less than its partner."""
    sent: set[str] = set()
    fused = []
    for line in ptx.splitlines():
        found = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s+([^;]*);", line)
        if found is None:
            continue
        operation, operands = found[1], re.findall(r"%\w+", found[2])
        reads_sent = bool(sent.intersection(operands[1:]))
        moves = operation.startswith(("mov.", "selp.")) and reads_sent
        if operation.startswith("shfl.sync.bfly") or moves:
            sent.add(operands[0])
        elif operation.startswith("fma.") and reads_sent:
            fused.append(line.strip())
    return fused


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, as the wheel's own cuobjdump tells."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2]) + int(found[3])


def over_budget(launches: list[Launch], budgets: dict[str, Budget], architectures: Sequence[int] = USUAL) -> list[str]:
    """What exceeds its kernel's budget (by the kernel's name) on any of ``architectures``; empty is good."""
    assert launches, "nothing was launched"
    return [
        line
        for launch in launches
        for arch in architectures
        for line in compiled(launch, arch).over(budgets[launch.kernel.__name__])
    ]
