"""Philox4x32-10 and its exponential draws inside a Triton kernel: the words are those of ``icon2_rt.ops.philox``.

A word that does not depend on the token (the generated token's index, the zeros, the key) may be a scalar: it stays
one, and the first rounds cost half.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words, tensors or scalars; returns the four words of every counter."""
    left = tl.full((), 0xD2511F53, tl.uint32)
    right = tl.full((), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, left), c0 * left
        high1, low1 = tl.umulhi(c2, right), c2 * right
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def exponential(x):
    """E = -log1p(-u) of words x, for u = (x + ½)·2⁻³², in fp32 with a relative error of at most 3e-7.

    The logarithm is that of (1 + f)·2ᵉ = 1 - u with 1 + f in [¾, 1½). Where u < ¼, e is 0 and f is -u, which keeps the
    digits of the smallest draws, the winners; elsewhere 1 - u is made from the word's complement, which keeps those of
    the largest. The polynomial is log1p(f)/f, relative error 3e-8 before rounding.
    """
    rest = ((x ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    bits = rest.to(tl.int32, bitcast=True)
    e = (bits - 0x3F400000) >> 23
    scaled = (bits - (e << 23)).to(tl.float32, bitcast=True)
    f = tl.where(x < 0x40000000, (x.to(tl.float32) + 0.5) * -2.3283064365386963e-10, scaled - 1.0)
    series = tl.fma(f, 0.054132495, -0.12067372)
    series = tl.fma(f, series, 0.14983919)
    series = tl.fma(f, series, -0.16822812)
    series = tl.fma(f, series, 0.19977078)
    series = tl.fma(f, series, -0.24993442)
    series = tl.fma(f, series, 0.3333355)
    series = tl.fma(f, series, -0.5000006)
    series = tl.fma(f, series, 1.0)
    return tl.fma(e.to(tl.float32), -0.6931471805599453, -f * series)
