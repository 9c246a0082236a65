"""The ops in CUDA C++ (csrc/cuda): same names, argument order and layout as the references beside this file.

As in :mod:`icon2_rt.ops.native`, what is here finds memory and the stream; the extension checks the tensors before it
uses a pointer. A call enqueues and returns, and can be captured in a CUDA graph. Built, and tested on an emulator;
never run on hardware, so it has to be asked for (``backend="native"`` on a CUDA device).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from icon2_rt.ops.native import extension
from icon2_rt.ops.native import why_not as why_no_extension
from icon2_rt.ops.sample import RowSampling
from icon2_rt.ops.state import RowState

# Up to so many rows a weight is read by our own kernel; above, a matrix product by torch.
FEW_ROWS = 16

# What the blocks of a product leave for the last of them, zero at first and left so: by device and stream. Graphs have
# their own, see one_graph.
_scratch: dict[tuple[int, int], Tensor] = {}
# Of the graph that is being captured; a list of one once a product needed it.
_of_graph: ContextVar[list[Tensor] | None] = ContextVar("_of_graph", default=None)


@contextmanager
def one_graph() -> Iterator[None]:
    """What is captured inside is one CUDA graph: its products share scratch memory, which lies in the graph's own pool
    and is zeroed at the beginning of every replay, so that no other graph and no abandoned replay can spoil it."""
    token = _of_graph.set([])
    try:
        yield
    finally:
        _of_graph.reset(token)


def why_not(device: torch.device) -> str | None:
    """None where the CUDA kernels can run on ``device``, else the reason."""
    if why_no_extension is not None:
        return why_no_extension
    if not hasattr(extension, "cuda_linear"):
        return "the extension was built without nvcc, for CPUs only"
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index) if torch.cuda.is_available() else nullcontext():
        error = extension.cuda_why_not(index)  # without any device it says so itself
    return None if error is None else f"{error} (the extension is {extension.build})"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`icon2_rt.ops.linear`: by our own kernel up to 16 rows of bf16 or fp16, by torch else."""
    n_in = x.shape[1]
    if x.shape[0] > FEW_ROWS or x.dtype == torch.float32 or n_in % 8 or x.stride(0) % 8 or x.data_ptr() % 16:
        return F.linear(x, weight, bias)
    return skinny_linear(x, weight, bias)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """``x Wᵀ (+ bias) (+ residual)``, summed in fp32 and rounded once. A row's bytes do not depend on the other rows.

    Args:
        x: ``[rows, in]``, 1 to 16 rows, bf16 or fp16; ``in`` is a multiple of 8, rows begin at multiples of 16 bytes.
        weight: ``[out, in]``. bias: ``[out]``. residual: ``[rows, out]``. All of x's dtype and on its CUDA device.

    Raises:
        TypeError, ValueError: what is not so, by the argument's name. RuntimeError: CUDA refuses the launch.
    """
    rows, n_out = x.shape[0], weight.shape[0]
    out = torch.empty((rows, n_out), dtype=x.dtype, device=x.device)
    with _current(x.device) as stream:
        extension.cuda_linear(x, weight, bias, residual, out, _linear_scratch(x.device, stream), stream)
    return out


def sample(logits: Tensor, how: RowSampling, state: RowState) -> None:
    """:func:`icon2_rt.ops.sample`. The vocabulary has at most 2**20 entries."""
    scratch = how.scratch
    if scratch is None:
        scratch = torch.empty(sample_scratch(*logits.shape), dtype=torch.uint8, device=logits.device)
    with _current(logits.device) as stream:
        extension.cuda_sample(
            logits, how.sampled, how.seeds, how.temperature, how.top_k, how.top_p, how.min_p, how.repetition_penalty,
            how.seen, how.eos, how.min_tokens, how.budget, state.tokens, state.positions, state.generated,
            state.running, state.logprobs, scratch.view(torch.int64), stream,
        )  # fmt: skip


def sample_scratch(rows: int, vocab: int) -> int:
    """Bytes that :func:`sample` needs, a multiple of 8."""
    return -(-int(extension.cuda_sample_scratch(rows, vocab)) // 8) * 8


@contextmanager
def _current(device: torch.device) -> Iterator[int]:
    """Inside, ``device`` is the current one, as the extension demands; gives its current stream as CUDA knows it. On
    another kind of device there is none, and the extension says what is wrong."""
    if device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _linear_scratch(device: torch.device, stream: int) -> Tensor:
    n = extension.cuda_linear_scratch // 8
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        shared = _of_graph.get()
        if not shared:
            zeroed = torch.zeros(n, dtype=torch.int64, device=device)  # a node of the graph
            if shared is None:  # somebody else's graph: each of its products has scratch memory of its own
                return zeroed
            shared.append(zeroed)
        return shared[0]
    key = (device.index or 0, stream)
    if key not in _scratch:
        _scratch[key] = torch.zeros(n, dtype=torch.int64, device=device)
    return _scratch[key]


__all__ = ["linear", "one_graph", "sample", "sample_scratch", "skinny_linear", "why_not"]
