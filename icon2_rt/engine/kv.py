"""Paged KV memory: fixed pages with reference counts, so that branches share what they have in common.

A page holds ``page_size`` positions of every block. Rows own the pages that they write and share, by reference count,
the full pages of their prompt; a partly filled page at the end of a shared prompt is copied, one per row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

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
                self._free.append(page)

    def copy(self, source: int | Sequence[int], target: int | Sequence[int], blocks: slice = slice(None)) -> None:
        """Copy whole pages of some blocks: what a row needs of a partly filled page that it will go on writing."""
        self.k[blocks, target] = self.k[blocks, source]
        self.v[blocks, target] = self.v[blocks, source]


def page_bytes(spec: DecoderSpec, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page, K and V of all blocks."""
    return 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim * page_size * dtype.itemsize


def plan_pages(
    spec: DecoderSpec, page_size: int, dtype: torch.dtype, device: torch.device, kv_memory: int | str | None
) -> int:
    """How many pages fit ``kv_memory`` (bytes, or ``"8GiB"``); None takes half of the free RAM or 90 % of a free GPU.

    Raises:
        ValueError: not a size, less than one page, or more than the device has in all.
    """
    each = page_bytes(spec, page_size, dtype)
    if kv_memory is None:
        budget = int(0.9 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else _free_ram() // 2
    else:
        budget = _parse_bytes(kv_memory)
        there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _all_ram()
        if budget > there:
            raise ValueError(
                f"kv_memory={kv_memory!r} ({budget} bytes) is more than {device} has in all, {there} bytes"
            )
    if budget < each:
        raise ValueError(
            f"kv_memory={kv_memory!r} ({budget} bytes) holds no page: a page of {page_size} tokens takes {each} bytes "
            f"(2 · {spec.n_layers} blocks · {spec.n_kv_heads} KV heads · {spec.head_dim} · {page_size} tokens · "
            f"{dtype.itemsize} bytes)"
        )
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
