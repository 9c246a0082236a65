"""The oracle for random choices: Philox4x32-10 on plain integers and the choice rule of the design, in numpy.

Written from Salmon et al. 2011 and design section 5, without the package.
"""

from __future__ import annotations

import numpy as np

MASK = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds on Python integers of any size, so that nothing can overflow."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (right >> 32) ^ x1 ^ k0, right & MASK, (left >> 32) ^ x3 ^ k1, left & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return x0, x1, x2, x3


def row_seed(seed: int, sample_id: int, branch: int | None, sample: int = 0) -> int:
    """The row seed of a branch; ``branch=None`` is common noise. ``sample`` numbers the samples of one prompt."""
    counter = (sample_id & MASK, sample_id >> 32, 0 if branch is None else branch + 1, sample)
    words = philox(counter, (seed & MASK, seed >> 32))
    return words[0] | words[1] << 32


def uniforms(seed: int, index: int, n_tokens: int) -> np.ndarray:
    """``[n_tokens]`` fp64: u of every token for the generated token number ``index`` of the row with this seed."""
    key = (seed & MASK, seed >> 32)
    words = [word for block in range((n_tokens + 3) // 4) for word in philox((block, index, 0, 0), key)]
    return (np.array(words[:n_tokens], dtype=np.float64) + 0.5) * 2.0**-32


def choose(scores: np.ndarray, seed: int, index: int) -> tuple[int, float]:
    """The chosen token for processed scores ``[vocab]`` (-inf = filtered out), and how clear the choice was.

    The margin is second / first of the race, minus 1; a tiny one means that rounding could decide.
    """
    with np.errstate(divide="ignore"):
        p = np.exp(scores.astype(np.float64) - scores.max())
        race = -np.log1p(-uniforms(seed, index, len(p))) / (p / p.sum())
    order = np.argsort(race)
    first, second = race[order[0]], race[order[1]]
    return int(order[0]), float(second / first - 1)
