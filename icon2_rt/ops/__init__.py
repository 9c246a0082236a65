"""The operations of a step, one a file. What is here is plain PyTorch and is the definition; :func:`select` picks the
backend's version of each and does nothing else."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch

from icon2_rt.ops import launching, native, native_cuda, prefill
from icon2_rt.ops.add_steer_rmsnorm import RowSteering, add_steer_rmsnorm
from icon2_rt.ops.attention import AttentionItems, grouped_decode_attention
from icon2_rt.ops.begin_step import begin_step, rotary
from icon2_rt.ops.embed import embed
from icon2_rt.ops.linear import linear
from icon2_rt.ops.philox import exponential_noise, philox, row_seeds
from icon2_rt.ops.prefill import Segment, Segments, prefill_attention, prefill_attention_by_library
from icon2_rt.ops.rope_append import rope_append
from icon2_rt.ops.sample import RowSampling, sample
from icon2_rt.ops.silu_mul import silu_mul
from icon2_rt.ops.state import RowState

Backend = Literal["reference", "triton", "native"]
# Tensor cores with bf16, and asynchronous copies.
OLDEST_CUDA = (8, 0)
BACKENDS: tuple[Backend, ...] = ("reference", "triton", "native")


@dataclass(frozen=True)
class Ops:
    """One implementation of every op; same names, argument order and layout in all of them.

    ``fixed``: their launches need buffers of one shape for every step, as a graph does, and pass over rows and items
    without work. ``capture``, where a backend has it, runs a step of its ops and returns what repeats it on the same
    memory without Python (or None: this one cannot be repeated so). ``attention_partials``: attention leaves partial
    results in memory (:class:`AttentionItems`). ``sample_scratch(rows, vocab)``: bytes that ``sample`` needs for as
    many rows or fewer.
    """

    backend: Backend = "reference"
    begin_step: Callable = begin_step
    embed: Callable = embed
    add_steer_rmsnorm: Callable = add_steer_rmsnorm
    rope_append: Callable = rope_append
    grouped_decode_attention: Callable = grouped_decode_attention
    prefill_attention: Callable = prefill_attention_by_library
    silu_mul: Callable = silu_mul
    linear: Callable = linear
    sample: Callable = sample
    fixed: bool = False
    capture: Callable[[Callable[[], object]], Callable[[], None] | None] | None = None
    attention_partials: bool = False
    sample_scratch: Callable[[int, int], int] = lambda rows, vocab: 0


def available(device: torch.device) -> dict[Backend, str | None]:
    """Every backend, with None where it can run on ``device`` and the reason where it cannot."""
    return {backend: _why_not(backend, device) for backend in BACKENDS}


def _why_not(backend: Backend, device: torch.device) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton":
        return _why_no_triton(device)
    return native.why_not if device.type == "cpu" else _why_no_native_cuda(device)


def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton kernels need a CUDA device (or, to try them slowly on a CPU, TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        return f"this torch is built for ROCm {torch.version.hip}, and the kernels are for CUDA"
    if torch.cuda.get_device_capability(device) < OLDEST_CUDA:
        return f"Triton kernels need compute capability {'.'.join(map(str, OLDEST_CUDA))} or newer"
    return launching.why_not()


def _why_no_native_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it has kernels for CPUs and CUDA devices, not for {device.type!r}"
    return _why_no_triton(device) or native_cuda.why_not(device)


def select(backend: str, device: torch.device) -> Ops:
    """The ops of ``backend``. ``"auto"`` is on a CPU the native ones, which ``bench/results`` shows right and faster
    there, and else the reference: what a CUDA device has proven is asked of :mod:`icon2_rt.qualify`.

    Raises:
        ValueError: an unknown backend, or one that cannot run here; the message says why.
    """
    if backend == "auto":
        backend = "native" if device.type == "cpu" and native.why_not is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, not {backend!r}")
    why_not = _why_not(backend, device)
    if why_not is not None:
        raise ValueError(f"backend {backend!r} cannot run here: {why_not}. Use backend='auto' or 'reference'.")
    native_here = native_ops if device.type == "cpu" else native_cuda_ops
    return {"reference": Ops, "triton": triton_ops, "native": native_here}[backend]()


def triton_ops() -> Ops:
    """The Triton kernels; what is a matrix product is torch's."""
    from icon2_rt.kernels.add_steer_rmsnorm import add_steer_rmsnorm
    from icon2_rt.kernels.begin_step import begin_step
    from icon2_rt.kernels.grouped_decode_attention import grouped_decode_attention
    from icon2_rt.kernels.rope_append import rope_append
    from icon2_rt.kernels.sample import sample, scratch_bytes
    from icon2_rt.kernels.silu_mul import silu_mul

    return Ops(
        "triton",
        begin_step=begin_step,
        add_steer_rmsnorm=add_steer_rmsnorm,
        rope_append=rope_append,
        grouped_decode_attention=grouped_decode_attention,
        silu_mul=silu_mul,
        sample=sample,
        fixed=True,
        attention_partials=True,
        sample_scratch=scratch_bytes,
    )


def native_ops() -> Ops:
    """The C++ kernels for CPUs; matrix products of more than a few rows are torch's, and so is prefill attention."""
    return Ops(
        "native",
        begin_step=native.begin_step,
        embed=native.embed,
        add_steer_rmsnorm=native.add_steer_rmsnorm,
        rope_append=native.rope_append,
        grouped_decode_attention=native.grouped_decode_attention,
        silu_mul=native.silu_mul,
        linear=native.linear,
        sample=native.sample,
        capture=native.capture,
    )


def native_cuda_ops() -> Ops:
    """The Triton kernels, with the CUDA C++ ones in their place where there are any: ``linear`` and ``sample``."""
    return replace(
        triton_ops(),
        backend="native",
        linear=native_cuda.linear,
        sample=native_cuda.sample,
        sample_scratch=native_cuda.sample_scratch,
    )


def forms(device: torch.device) -> dict[str, dict[Backend, Callable]]:
    """Every form that an op has on ``device``, by op and by the backend that brings it; a form that a backend takes
    from another one stands under that one alone. Prefill attention is chosen apart (:data:`prefill.PATHS`)."""
    there = available(device)
    found: dict[str, dict[Backend, Callable]] = {}
    makers: dict[Backend, Callable[[], Ops]] = {"reference": Ops, "triton": triton_ops, "native": native_cuda_ops}
    for backend, make in makers.items():
        if there[backend] is not None or (backend == "native" and device.type != "cuda"):
            continue
        ops = make()
        for op in _OPS:
            here = found.setdefault(op, {})
            if getattr(ops, op) not in here.values():
                here[backend] = getattr(ops, op)
    return found


def assemble(chosen: Mapping[str, Backend], path: str | None = None) -> Ops:
    """Ops put together from several backends, to be run as Triton's are.

    Args:
        chosen: op → the backend whose form it takes; ops that are not named are Triton's. path: the name of one of
            :data:`prefill.PATHS`, or None for the library that :func:`prefill.choose` finds.

    Raises:
        ValueError: an op, a backend or a path that does not exist, or a backend that has no form of the op.
    """
    changes: dict[str, Any] = {}
    for op, backend in chosen.items():
        if op not in _OPS or backend not in BACKENDS:
            raise ValueError(f"op {op!r} in form {backend!r}: ops are {list(_OPS)}, forms {list(BACKENDS)}")
        if backend != "triton":
            source = Ops() if backend == "reference" else native_cuda_ops()
            # With all that is said of it beside: the field sample_scratch, say, belongs to the field sample.
            belongs = (f.name for f in fields(Ops) if f.name == op or f.name.startswith(f"{op}_"))
            changes |= {name: getattr(source, name) for name in belongs}
    if path is not None:
        changes["prefill_attention"] = partial(prefill_attention, attend=prefill.path(path).attend)
    name: Backend = "native" if "native" in chosen.values() else "triton"
    return replace(triton_ops(), backend=name, **changes)


# What a backend may bring a form of, but for prefill attention.
_OPS = tuple(f.name for f in fields(Ops) if f.type == "Callable" and f.name != "prefill_attention")

__all__ = [
    "BACKENDS",
    "OLDEST_CUDA",
    "AttentionItems",
    "Backend",
    "Ops",
    "RowSampling",
    "RowState",
    "RowSteering",
    "Segment",
    "Segments",
    "add_steer_rmsnorm",
    "assemble",
    "available",
    "begin_step",
    "embed",
    "exponential_noise",
    "forms",
    "grouped_decode_attention",
    "linear",
    "philox",
    "prefill_attention",
    "rope_append",
    "rotary",
    "row_seeds",
    "sample",
    "select",
    "silu_mul",
]
