"""Prefill attention: packed prompts, each over its own pages. K and V are gathered from the pages and packed; what then
attends is the best of several libraries, each behind one function of one signature, chosen once per runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from icon2_rt.ops.prefill import flash_attn_2, flash_attn_4
from icon2_rt.ops.prefill.sdpa import sdpa
from icon2_rt.ops.prefill.segments import Segment, Segments
from icon2_rt.ops.prefill.torch_varlen import torch_varlen

# (q [queries, H, d], k and v [keys, KV, d], segments, scale) → [queries, H, d] in q's dtype, all contiguous: softmax
# attention of each segment's queries over that segment's keys, of which query i sees all but the last
# ``queries - 1 - i``. H is a multiple of KV.
Attend = Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]


def prefill_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, segments: Segments, scale: float, attend: Attend = sdpa
) -> Tensor:
    """Causal attention of packed prompts, each over its own pages.

    Args:
        q: ``[tokens, H, d]``, the segments one after the other. k_pages, v_pages: ``[pages, page_size, KV, d]``, this
            call's K and V already written. scale: 1/√d. attend: see :func:`choose`.

    Returns:
        ``[tokens, H · d]`` in q's dtype.
    """
    k, v = (pages.flatten(0, 1).index_select(0, segments.slots) for pages in (k_pages, v_pages))
    return attend(q.contiguous(), k, v, segments, scale).reshape(len(q), -1)


@dataclass(frozen=True)
class Path:
    """One way to attend on a CUDA device, in fp16 or bf16.

    Attributes:
        takes: whether a device of that major compute capability can, with heads of that size.
        why_not: None where its library is there, else what is in the way.
        measured_on: the devices of which a run is recorded.
    """

    name: str
    attend: Attend
    takes: Callable[[int, int], bool]
    why_not: Callable[[], str | None] = lambda: None
    measured_on: tuple[str, ...] = ()


def _flash_heads(major: int, d: int) -> bool:
    return major >= 8 and d % 8 == 0 and d <= 256


# In the order in which they are tried.
PATHS = (
    # It also has a kernel for sm_80, where flash-attn 2 is the one that was made for it.
    Path(
        "flash-attn 4",
        flash_attn_4.flash_attn_4,
        lambda major, d: _flash_heads(major, d) and (major == 9 or (major in (10, 11) and (d <= 128 or d == 256))),
        flash_attn_4.why_not,
    ),
    Path("flash-attn 2", flash_attn_2.flash_attn_2, _flash_heads, flash_attn_2.why_not),
    Path("torch varlen_attn", torch_varlen, _flash_heads),
)


# The one that runs everywhere, and defines the others.
SDPA = Path("sdpa", sdpa, lambda major, d: True)


def path(name: str) -> Path:
    """The path of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    found = next((p for p in (*PATHS, SDPA) if p.name == name), None)
    if found is None:
        raise ValueError(f"prefill path {name!r} does not exist; there are {[p.name for p in (*PATHS, SDPA)]}")
    return found


@cache
def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attend:
    """The best way to attend that is here for a model of ``dtype`` and ``head_dim`` on ``device``."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return sdpa
    if dtype not in (torch.float16, torch.bfloat16):
        return sdpa
    major, _ = torch.cuda.get_device_capability(device)
    return next((p.attend for p in PATHS if p.takes(major, head_dim) and p.why_not() is None), sdpa)


def prefill_attention_by_library(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, segments: Segments, scale: float
) -> Tensor:
    """:func:`prefill_attention` as fast as what is installed can; looked for once, see :func:`choose`."""
    return prefill_attention(q, k_pages, v_pages, segments, scale, choose(q.device, q.dtype, q.shape[2]))


def path_of(attention: Callable, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the path that ``attention``, an ``Ops.prefill_attention``, takes for such a model."""
    if attention is prefill_attention_by_library:
        attend = choose(device, dtype, head_dim)
    elif attention is prefill_attention:
        attend = sdpa
    else:  # one that a path was handed to
        attend = getattr(attention, "keywords", {}).get("attend", attention)
    return next((p.name for p in (*PATHS, SDPA) if p.attend is attend), attend.__module__)


__all__ = [
    "PATHS",
    "SDPA",
    "Attend",
    "Path",
    "Segment",
    "Segments",
    "choose",
    "path",
    "path_of",
    "prefill_attention",
    "prefill_attention_by_library",
    "sdpa",
]
