"""The random words and the draws made of them, as a kernel sees them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from icon2_rt.kernels.philox import exponential, philox
from icon2_rt.ops import philox as reference
from tests import noise


@triton.jit
def words_kernel(counters, keys, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    inside = at < n
    c0 = tl.load(counters + 4 * at, mask=inside).to(tl.uint32)
    c1 = tl.load(counters + 4 * at + 1, mask=inside).to(tl.uint32)
    c2 = tl.load(counters + 4 * at + 2, mask=inside).to(tl.uint32)
    c3 = tl.load(counters + 4 * at + 3, mask=inside).to(tl.uint32)
    k0 = tl.load(keys + 2 * at, mask=inside).to(tl.uint32)
    k1 = tl.load(keys + 2 * at + 1, mask=inside).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    tl.store(out + 4 * at, w0.to(tl.int64), mask=inside)
    tl.store(out + 4 * at + 1, w1.to(tl.int64), mask=inside)
    tl.store(out + 4 * at + 2, w2.to(tl.int64), mask=inside)
    tl.store(out + 4 * at + 3, w3.to(tl.int64), mask=inside)


@triton.jit
def scalars_kernel(out, index, k0, k1):
    zero = tl.full((), 0, tl.uint32)
    at = tl.arange(0, 64)
    w0, w1, w2, w3 = philox(at.to(tl.uint32), index.to(tl.uint32), zero, zero, k0.to(tl.uint32), k1.to(tl.uint32))
    tl.store(out + 4 * at, w0.to(tl.int64))
    tl.store(out + 4 * at + 1, w1.to(tl.int64))
    tl.store(out + 4 * at + 2, w2.to(tl.int64))
    tl.store(out + 4 * at + 3, w3.to(tl.int64))


@triton.jit
def exponential_kernel(words, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, exponential(tl.load(words + at, mask=at < n).to(tl.uint32)), mask=at < n)


def test_words_are_the_references_and_the_known_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(2**32, (100, 4), generator=generator)
    keys = torch.randint(2**32, (100, 2), generator=generator)
    counters[0], keys[0] = 0, 0
    counters[1], keys[1] = noise.MASK, noise.MASK
    counters[2] = torch.tensor([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344])
    keys[2] = torch.tensor([0xA4093822, 0x299F31D0])
    out = torch.empty(100, 4, dtype=torch.int64)
    words_kernel[(1,)](counters, keys, out, 100, N=128)
    assert torch.equal(out, torch.stack(reference(tuple(counters.T), tuple(keys.T)), dim=-1))
    assert out[:3].tolist() == [  # Random123 1.14, tests/kat_vectors
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


def test_words_that_do_not_depend_on_the_token_may_be_scalars() -> None:
    out = torch.empty(64, 4, dtype=torch.int64)
    # Values of 2³¹ and more come as int64 arguments.
    scalars_kernel[(1,)](out, 513, 0xDEADBEEF, 2**32 - 1)
    for block in (0, 1, 63):
        assert tuple(out[block].tolist()) == noise.philox((block, 513, 0, 0), (0xDEADBEEF, 2**32 - 1))


def test_draws_keep_their_digits_at_both_ends() -> None:
    edges = [0, 1, 2, 1000, 2**23, 2**24 + 1, 2**30 - 1, 2**30, 2**30 + 129, 2**31 - 1, 2**31, 2**31 + 77]
    edges += [2**32 - 2**24, 2**32 - 2**20 - 1, 2**32 - 3, 2**32 - 2, 2**32 - 1]
    spread = torch.randint(2**32, (4096 - len(edges),), generator=torch.Generator().manual_seed(0))
    words = torch.cat((torch.tensor(edges), spread))
    out = torch.empty(len(words))
    exponential_kernel[(1,)](words, out, len(words), N=4096)
    exact = -torch.log1p(-(words.double() + 0.5) * 2.0**-32)
    error = (out.double() / exact - 1).abs()
    assert float(error.max()) < 3.5e-7, words[error.argmax()]
