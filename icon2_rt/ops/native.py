"""The ops in C++ for CPUs (csrc/): same names, argument order and layout as the references beside this file.

What is here only finds the memory for the results. The extension itself checks dtypes, devices, sizes, strides, indices
and overlaps, from the tensors, before it uses any pointer; it raises TypeError, ValueError or IndexError with the
argument's name. Threads are those of torch's OpenMP runtime, as many as ``torch.get_num_threads()`` says.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icon2_rt.ops.add_steer_rmsnorm import RowSteering
from icon2_rt.ops.attention import AttentionItems
from icon2_rt.ops.sample import RowSampling
from icon2_rt.ops.state import RowState

# Of what is called here (csrc/bind.cpp, kInterface); both change together.
_INTERFACE = 2


def _load() -> tuple[Any, str | None]:
    """The extension, ready for use, or None and why it is not there."""
    try:
        _native: Any = importlib.import_module("icon2_rt._native")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            return None, "a pure Python installation: it was installed without a C++ compiler or without pybind11"
        return None, f"the extension does not load: {error}"
    if getattr(_native, "interface", None) != _INTERFACE:
        return None, (
            "the extension was built from other sources than this package's: build it again, with "
            "`pip install .` or, in a checkout, `python setup.py build_ext --inplace`"
        )
    lend = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if lend is None:
        return None, f"torch {torch.__version__} does not lend its tensors to C (DLPack's exchange interface)"
    _native.use_exchange(lend)
    _native.use_openmp(str(Path(torch.__file__).resolve().parent))
    return _native, None


extension, why_not = _load()


def describe() -> str:
    """What was built, and what of it this process uses."""
    if extension is None:
        return "not built"
    threads = "torch's OpenMP threads" if extension.openmp_path() else "one thread: no OpenMP runtime was found"
    return f"{extension.instruction_set()} in use ({', '.join(extension.instruction_sets())} can be); {threads}"


# Up to so many rows our own kernel, which reads a weight once. Alone, with one thread, it is faster than torch's matrix
# product up to some 20 rows; but a step that has none of torch's is captured, and is faster with 64 rows too.
FEW_ROWS = 64


def capture(step: Callable[[], object]) -> Callable[[], None] | None:
    """Run ``step``, whose ops are these; returns what runs its kernels again on the same memory, a CPU's counterpart of
    a CUDA graph. None where a part of it was torch's. Whatever the step read and wrote must stay where it is.

    What is captured is what this thread runs; other threads may run and capture steps of other memory meanwhile."""
    program = extension.Program()
    program.begin()
    whole = False
    try:
        step()
    finally:
        whole = program.end()
    return program.repeat if whole else None


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """:func:`icon2_rt.ops.embed`."""
    out = torch.empty((tokens.shape[0], weight.shape[1]), dtype=weight.dtype, device=weight.device)
    extension.embed(tokens, weight, out)
    return out


def add_steer_rmsnorm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    steering: RowSteering | None = None,
    layer: int = -1,
    measured: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`icon2_rt.ops.add_steer_rmsnorm`."""
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    normed = torch.empty_like(out, dtype=weight.dtype)
    s = steering
    # What the host knows spares the kernel a look at every row.
    if s is None or (measured is None and s.rows is not None and s.rows[layer] is None):
        extension.add_steer_rmsnorm(
            x, residual, weight, eps, None, None, None, None, None, None, None, -1, None, out, normed
        )
    else:
        extension.add_steer_rmsnorm(
            x, residual, weight, eps, s.bank, s.count, s.index, s.alpha, s.beta, s.keep_norm, s.which, layer, measured,
            out, normed,
        )  # fmt: skip
    return out, normed


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
) -> Tensor:
    """:func:`icon2_rt.ops.rope_append`."""
    _, _, kv_heads, d = k_pages.shape
    rows, width = qkv.shape
    q = torch.empty((rows, width // d - 2 * kv_heads, d), dtype=qkv.dtype, device=qkv.device)
    extension.rope_append(qkv, cos, sin, q_norm, k_norm, eps, k_pages, v_pages, slots, q)
    return q


def begin_step(
    state: RowState,
    tables: Tensor,
    page_size: int,
    inv_freq: Tensor,
    rope_scaling: float,
    items: AttentionItems,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`icon2_rt.ops.begin_step`."""
    rows, d = state.positions.shape[0], 2 * inv_freq.shape[0]
    slots = torch.empty(rows, dtype=torch.int64, device=tables.device)
    cos, sin = torch.empty((2, rows, 1, d), dtype=dtype, device=tables.device)
    extension.begin_step(
        state.positions, state.running, tables, page_size, inv_freq, rope_scaling, items.rows, items.splits,
        items.count, items.lengths, items.n_splits, items.split, slots, cos, sin,
    )  # fmt: skip
    return slots, cos, sin


def grouped_decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, items: AttentionItems, scale: float, layer: int
) -> Tensor:
    """:func:`icon2_rt.ops.grouped_decode_attention`."""
    batch, heads, d = q.shape
    out = torch.empty((batch, heads * d), dtype=q.dtype, device=q.device)
    extension.grouped_decode_attention(
        q, k_pages, v_pages, items.rows, items.pages, items.splits, items.layers, items.count, items.starts,
        items.lengths, items.n_splits, items.n_partials, scale, layer, out,
    )  # fmt: skip
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """:func:`icon2_rt.ops.silu_mul`."""
    rows, width = gate_up.shape
    out = torch.empty((rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
    extension.silu_mul(gate_up, out)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`icon2_rt.ops.linear`."""
    rows = x.shape[0]
    if rows > FEW_ROWS:
        extension.Program.spoil()
        return F.linear(x, weight, bias)
    out = torch.empty((rows, weight.shape[0]), dtype=x.dtype, device=x.device)
    extension.linear(x, weight, bias, out)
    return out


def sample(logits: Tensor, how: RowSampling, state: RowState) -> None:
    """:func:`icon2_rt.ops.sample`."""
    extension.sample(
        logits, how.sampled, how.seeds, how.temperature, how.top_k, how.top_p, how.min_p, how.repetition_penalty,
        how.seen, how.eos, how.min_tokens, how.budget, state.tokens, state.positions, state.generated, state.running,
        state.logprobs,
    )  # fmt: skip
