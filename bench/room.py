"""Which decoders the GPU at hand has room for: a smaller card measures smaller ones, and its records say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.roofline import kv_bytes
from bench.shapes import SHAPES, all_weights
from bench.subjects import LENGTHS

# What takes the place of one that is too large: the largest of these that fits.
LADDER = ("llama3-8b", "qwen2-7b", "llama3.2-3b", "qwen2-1.5b", "llama3.2-1b")
ITEMSIZE = 2  # bf16
GIB = 2**30
# Beside weights and KV: the context, graphs, partial results of attention, logits, the matrix library's workspaces.
BESIDE = 3 * GIB
NEW_TOKENS = 128  # of the end-to-end stage


def step_needs(name: str) -> int:
    """Bytes for steps of ``name``: its weights, and the KV of 8 pairs over 2048 tokens. Larger cells may still not fit,
    and are recorded as that."""
    spec = SHAPES[name]
    return all_weights(spec) * ITEMSIZE + 8 * (2048 + 2 * 64) * kv_bytes(spec, ITEMSIZE) + BESIDE


def pairs_kv(name: str) -> int:
    """Bytes of KV for the largest end-to-end cell, each branch with its prompt."""
    lengths = max(LENGTHS.values(), key=len)
    return 2 * sum(length + NEW_TOKENS + 64 for length in lengths) * kv_bytes(SHAPES[name], ITEMSIZE)


def pairs_needs(name: str) -> int:
    """Bytes for the end-to-end comparison: two copies of the weights (transformers keeps its own), our KV, and theirs,
    padded to the longest prompt and copied as it grows."""
    spec = SHAPES[name]
    lengths = max(LENGTHS.values(), key=len)
    theirs = 2 * 2 * len(lengths) * (max(lengths) + NEW_TOKENS) * kv_bytes(spec, ITEMSIZE)
    return 2 * all_weights(spec) * ITEMSIZE + pairs_kv(name) + theirs + BESIDE


def fitting(asked: Sequence[str], needs: Callable[[str], int], free: int) -> tuple[list[str], dict[str, str]]:
    """The models that ``free`` bytes have room for, and what was done about each of the others, in words.

    One that is too large is replaced by the largest of :data:`LADDER` that fits and is not measured anyway.
    """
    chosen: list[str] = []
    told: dict[str, str] = {}
    for name in asked:
        if needs(name) <= free:
            chosen.append(name)
            continue
        why = f"needs {needs(name) / GIB:.1f} GiB, and {free / GIB:.1f} are free"
        smaller = [n for n in LADDER if needs(n) <= free and n not in (*asked, *chosen)]
        if smaller:
            chosen.append(smaller[0])
            why += f"; {smaller[0]} in its place"
        told[name] = why
    return chosen, told


def free_bytes(device: torch.device) -> int:
    """What nobody has of the device's memory, torch's own cache given back first."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
