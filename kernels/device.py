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
