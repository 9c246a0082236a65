"""Paged KV memory: fixed pages with reference counts, so that branches share what they have in common.

A page holds ``page_size`` positions of every block. Rows own the pages that they write and share, by reference count,
the full pages of their prompt; a partly filled page at the end of a shared prompt is copied, one per row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icon2_rt.models import DecoderSpec

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class KVPages:
    """The pool: ``k`` and ``v`` are ``[n_layers, pages, page_size, KV heads, head_dim]``; page ids are plain ints."""

    def __init__(self, spec: DecoderSpec, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        self.n_pages, self.page_size = n_pages, page_size
        shape = (spec.n_layers, n_pages, page_size, spec.n_kv_heads, spec.head_dim)
        self.k, self.v = _zeros(shape, dtype, device), _zeros(shape, dtype, device)
        self._references = [0] * n_pages
        self._spoilt: set[int] = set()
        self._free = list(range(n_pages - 1, -1, -1))  # a stack: the pages used last are the ones still in cache

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def n_bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def pages_for(self, tokens: int) -> int:
        """How many pages hold ``tokens`` positions."""
        return -(-tokens // self.page_size)

    def allocate(self, n: int) -> list[int]:
        """``n`` pages with one reference each. The caller has checked :attr:`free_pages`."""
        if n > len(self._free):
            raise MemoryError(f"{n} KV pages were asked for and {len(self._free)} of {self.n_pages} are free")
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._spoilt:
                    self._spoilt.remove(page)
                    self.k[:, page] = 0
                    self.v[:, page] = 0
                self._free.append(page)

    def spoil(self, pages: Iterable[int]) -> None:
        """They may hold numbers that are not finite: cleared before they are free again. What lies beyond a row's end
        counts nothing in its attention, but nothing times infinity is not a number."""
        self._spoilt.update(pages)

    def copy(self, source: int | Tensor, target: int | Tensor, blocks: slice = slice(None)) -> None:
        """Copy whole pages of some blocks (one, or ``[n]`` int64 on the device): what a row needs of a partly filled
        page that it will go on writing."""
        self.k[blocks, target] = self.k[blocks, source]
        self.v[blocks, target] = self.v[blocks, source]


def page_bytes(spec: DecoderSpec, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page, K and V of all blocks."""
    return 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim * page_size * dtype.itemsize


# Bytes, the least set aside for the partial results of attention, and the share of the KV memory where that is more.
LEAST_PARTIALS, PARTIALS_SHARE = 64 << 20, 64
# Rows of logits that scoring holds at once.
SCORED_ROWS = 256
# A pass may continue prompts whose KV is much longer than the pass: so many positions of it are counted on.
_GATHERED = 16384
_MARGIN, _LEAST_SHARE = 256 << 20, 0.05
_SMALL_CARD, _SMALL_CHUNK, _CHUNK = 16 * 10**9, 512, 2048


@dataclass(frozen=True)
class Reserve:
    """What a CUDA device must have left beside weights and KV, in bytes.

    Every figure is an upper estimate from sizes alone, at the moment when it is largest; activations of a pass, scores
    and a step are never there together, so the largest of the three counts.

    Attributes:
        passes: a prefill pass. A token has at most six rows of the residual stream (residual, block output, normed,
            their successors), three of the feed-forward size (gate, up, product) and its queries, keys and values twice
            (projected, rotated), all in the model's dtype; beside it lie K and V gathered from the pages, for as many
            query heads in fp32 (see :mod:`icon2_rt.ops.prefill.sdpa`).
        scoring: 256 rows of logits in the model's dtype and four times in fp32.
        step: a decode step of all seats without a graph: logits, and what sampling makes of them, at most 32 bytes an
            entry of the vocabulary.
        graphs: the graphs' own memory: a step's activations and logits, 2 MiB for each of some 20 graphs.
        seats: what every seat holds: a byte an entry of the vocabulary, steering of every block, and its page table.
        bank: the direction bank. partials: the least of attention's partial results (a share of the KV is added).
        libraries: workspaces of cuBLAS and cuBLASLt (32 MiB each, for the engine's stream and for the graphs'), and
            256 MiB of kernels, which are loaded when they are first used.
    """

    passes: int
    scoring: int
    step: int
    graphs: int
    seats: int
    bank: int
    partials: int = LEAST_PARTIALS
    libraries: int = (4 * 32 + 256) << 20

    @classmethod
    def of(
        cls,
        spec: DecoderSpec,
        dtype: torch.dtype,
        *,
        seats: int,
        prefill_chunk: int,
        max_directions: int,
        max_terms: int,
        page_size: int,
        graphs: bool,
    ) -> Reserve:
        size, d = dtype.itemsize, spec.head_dim
        token = 6 * spec.hidden_size + 3 * spec.intermediate_size + 2 * (spec.n_heads + 2 * spec.n_kv_heads) * d
        gathered_heads = spec.n_heads if dtype == torch.float32 else spec.n_kv_heads
        gathered = (prefill_chunk + min(_GATHERED, spec.max_length)) * 2 * gathered_heads * d
        table = 4 * -(-spec.max_length // page_size)
        return cls(
            passes=size * (prefill_chunk * token + gathered),
            scoring=SCORED_ROWS * spec.vocab_size * (size + 4 * 4),
            step=seats * (32 * spec.vocab_size + size * token),
            graphs=seats * (8 * spec.vocab_size + size * token) + 20 * (2 << 20) if graphs else 0,
            seats=seats * (spec.vocab_size + 12 * spec.n_layers * max_terms + table),
            bank=4 * max_directions * spec.n_layers * spec.hidden_size,
        )

    @property
    def total(self) -> int:
        at_once = max(self.passes, self.scoring, self.step)
        return at_once + self.graphs + self.seats + self.bank + self.partials + self.libraries + _MARGIN

    def kv_of(self, free: int) -> int:
        """How many of ``free`` bytes are left for KV: all but the reserve, which is at least 5 % of them; of the rest
        one part in 65 goes to partial results."""
        left = free - max(self.total, int(_LEAST_SHARE * free))
        return max(0, left) * PARTIALS_SHARE // (PARTIALS_SHARE + 1)


def default_prefill_chunk(device: torch.device) -> int:
    """Tokens of a prefill pass: 2048, but 512 on a GPU of less than 16 GB, where activations would take what KV needs.
    (A card that is sold as one of 16 GB has a little more than 16·10⁹ bytes.)"""
    if device.type != "cuda":
        return _CHUNK
    return _SMALL_CHUNK if torch.cuda.mem_get_info(device)[1] < _SMALL_CARD else _CHUNK


def plan_pages(
    spec: DecoderSpec,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_memory: int | str | None,
    reserve: Reserve | None = None,
) -> int:
    """How many pages fit ``kv_memory`` (bytes, or ``"8GiB"``). None takes half of the free RAM, or what ``reserve``
    leaves of a GPU's free memory, after torch's own cache was given back to it.

    Raises:
        ValueError: not a size, less than one page, or more than the device has in all; or a GPU with too little memory
            free.
    """
    each = page_bytes(spec, page_size, dtype)
    page = (
        f"a page of {page_size} tokens takes {each} bytes (2 · {spec.n_layers} blocks · {spec.n_kv_heads} KV heads · "
        f"{spec.head_dim} · {page_size} tokens · {dtype.itemsize} bytes)"
    )
    if kv_memory is None and device.type == "cuda":
        if reserve is None:
            raise TypeError("on a CUDA device a plan without kv_memory needs a reserve")
        # What torch keeps for itself looks taken: after a model was moved here and its weights were fused, gigabytes.
        torch.cuda.empty_cache()
        free, there = torch.cuda.mem_get_info(device)
        budget = reserve.kv_of(free)
        if budget < each:
            raise ValueError(
                f"{device} has {free / 2**30:.1f} GiB free of {there / 2**30:.1f} with the weights in place; a step, a "
                f"prefill pass and the libraries need about {reserve.total / 2**30:.1f} GiB beside the KV pages, and "
                f"{page}. End what else uses the GPU (nvidia-smi), pass a smaller max_rows= or prefill_chunk=, take a "
                f"smaller model or dtype; or set kv_memory= (as '256MiB') and see what fits"
            )
        return budget // each
    if kv_memory is None:
        budget = _free_ram() // 2
    else:
        budget = _parse_bytes(kv_memory)
        there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _all_ram()
        if budget > there:
            raise ValueError(
                f"kv_memory={kv_memory!r} ({budget} bytes) is more than {device} has in all, {there} bytes"
            )
    if budget < each:
        raise ValueError(f"kv_memory={kv_memory!r} ({budget} bytes) holds no page: {page}")
    return budget // each


def _parse_bytes(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size) if isinstance(size, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"kv_memory is a number of bytes or a size such as '8GiB', not {size!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _all_ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_ram() -> int:
    try:
        with open("/proc/meminfo") as meminfo:
            return next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return _all_ram() // 2


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed memory (a masked V must not hold a NaN). On the CPU through calloc, which commits a page of RAM only when
    it is written: a large pool costs what is used of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    words = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, dtype=words)).view(dtype)
