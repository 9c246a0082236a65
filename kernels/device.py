"""How large a grid has to be to fill a device: what a launcher needs to know of it, and nothing else."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device. Where there is none (the interpreter, a recorded launch), a small number that
    still leaves every program of a persistent grid several units."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor, for all programs on it: 164 KiB on sm_80, 228 on sm_90 and sm_100,
    100 on sm_86, sm_89 and sm_120. As on sm_90 where there is no device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 228 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
