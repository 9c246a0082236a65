"""Philox4x32-10, the counter-based generator behind every random choice (Salmon et al., SC 2011).

Counter-based, so that a row's draws depend on its seed, the token and its place in the response alone: not on the
batch, the order of work or the backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words; all shapes broadcast.

    Returns:
        Four int64 tensors of words in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product may wrap in int64; its bits 32..63 are still the high word once masked.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.broadcast_tensors(c0, c1, c2, c3)


def row_seeds(
    seed: int, sample_ids: list[int], branches: list[int | None], samples: list[int] | None = None
) -> list[int]:
    """One 64-bit seed per row: Philox with key = ``seed`` and counter = (sample id low, high, branch + 1, sample).

    A branch of None (common random numbers) leaves it out: 0 stands there. ``samples`` numbers the samples of one
    prompt; without it all are 0. Words 0 and 1 are the row seed.

    Raises:
        ValueError: a seed or sample id outside [0, 2⁶⁴).
    """
    for name, value in (("seed", seed), *(("sample id", i) for i in sample_ids)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} must be in [0, 2**64), not {value}")
    words = philox(
        (
            _words([i & _MASK for i in sample_ids]),
            _words([i >> 32 for i in sample_ids]),
            _words([0 if b is None else b + 1 for b in branches]),
            _words(samples if samples is not None else [0]),
        ),
        (_words([seed & _MASK]), _words([seed >> 32])),
    )
    return [low | high << 32 for low, high in zip(words[0].tolist(), words[1].tolist(), strict=True)]


def _words(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def exponential_noise(seeds: Tensor, index: Tensor, n_tokens: int) -> Tensor:
    """The noise of one generated token per row: an Exp(1) draw for every entry of the vocabulary.

    Counter (token >> 2, index of the generated token, 0, 0), key = row seed, lane token & 3, u = (x + ½)·2⁻³²,
    draw = -log1p(-u).

    Args:
        seeds: ``[rows, 2]`` int64, low and high word. index: ``[rows]`` int64. n_tokens: the vocabulary's size.

    Returns:
        ``[rows, n_tokens]`` float64.
    """
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    block = torch.arange((n_tokens + 3) // 4, device=seeds.device)
    words = philox((block, index[:, None], zero, zero), (seeds[:, :1], seeds[:, 1:]))
    x = torch.stack(words, dim=-1).flatten(1)[:, :n_tokens].double()
    return -torch.log1p(-(x + 0.5) * 2.0**-32)
