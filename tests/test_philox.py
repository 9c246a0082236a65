"""The random words themselves: known answers, an independent implementation, and row seeds as the design fixes them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from icon2_rt.ops.philox import exponential_noise, philox, row_seeds
from tests import noise

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(counter, key) -> tuple[int, ...]:
    def tensors(values):
        return tuple(torch.tensor(v, dtype=torch.int64) for v in values)

    return tuple(int(w) for w in philox(tensors(counter), tensors(key)))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert noise.philox(counter, key) == expected
    assert words(counter, key) == expected


def test_random_words_equal_the_independent_implementation():
    rng = random.Random(0)
    counters = [tuple(rng.getrandbits(32) for _ in range(4)) for _ in range(200)]
    keys = [tuple(rng.getrandbits(32) for _ in range(2)) for _ in range(200)]
    got = philox(
        tuple(torch.tensor(column) for column in zip(*counters, strict=True)),
        tuple(torch.tensor(column) for column in zip(*keys, strict=True)),
    )
    expected = [noise.philox(c, k) for c, k in zip(counters, keys, strict=True)]
    assert torch.stack(got, dim=-1).tolist() == [list(e) for e in expected]


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 5, 128, 130])
def test_noise_follows_the_counter_layout(n_tokens):
    seeds = [0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF]
    index = [0, 1, 7, 2**31, 500]
    pairs = torch.tensor([[s & noise.MASK, s >> 32] for s in seeds])
    drawn = exponential_noise(pairs, torch.tensor(index), n_tokens)
    expected = np.stack([-np.log1p(-noise.uniforms(s, i, n_tokens)) for s, i in zip(seeds, index, strict=True)])
    assert drawn.dtype == torch.float64
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=1e-14, atol=0)
    assert bool(torch.isfinite(drawn).all())
    assert bool((drawn > 0).all())


def test_row_seeds():
    ids = [0, 1, 5, 2**32, 2**40 + 3, 2**64 - 1]
    branches = [0, 1, None, 2, 30, None]
    for seed in (0, 1, 2**32 + 17, 2**64 - 1):
        expected = [noise.row_seed(seed, i, b) for i, b in zip(ids, branches, strict=True)]
        assert row_seeds(seed, ids, branches) == expected
        assert all(0 <= s < 2**64 for s in expected)


def test_row_seeds_do_not_collide():
    n = 3000
    seeds = row_seeds(0, list(range(n)) * 3, [0] * n + [1] * n + [None] * n) + row_seeds(1, list(range(n)), [0] * n)
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(("seed", "sample_id"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_seeds_out_of_range_raise(seed, sample_id):
    with pytest.raises(ValueError, match=r"2\*\*64"):
        row_seeds(seed, [sample_id], [0])


def test_the_exponentials_are_exponential():
    """Mean, variance and the share below ln 2, over 200 thousand draws (standard errors 0.0022, 0.006, 0.0011)."""
    drawn = exponential_noise(torch.tensor([[7, 9]]).expand(1000, 2), torch.arange(1000), 200)
    assert abs(float(drawn.mean()) - 1) < 0.01
    assert abs(float(drawn.var()) - 1) < 0.03
    assert abs(float((drawn < np.log(2)).double().mean()) - 0.5) < 0.005
    flat = drawn - drawn.mean()
    assert abs(float((flat[:, 1:] * flat[:, :-1]).mean())) < 0.01  # neighbours in the vocabulary
    assert abs(float((flat[1:] * flat[:-1]).mean())) < 0.01  # neighbours in time
