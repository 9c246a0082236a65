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
def gumbel(x):
    """-log(E) of words x, for E = -log1p(-u) and u = (x + ½)·2⁻³², in fp32.

    Neither u nor 1 - u may lose digits before its logarithm is taken. Below u = ¼ the inner one is a polynomial
    (-log1p(-u)/u, relative error 7e-8 in fp32), which keeps the small draws, the winners; above, 1 - u is made from
    the word's complement, which keeps the largest draws, and lg2's absolute error of 2⁻²² is relative as well.
    """
    u = (x.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((x ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = tl.fma(u, 0.33257493, 0.090515616)
    series = tl.fma(u, series, 0.21397438)
    series = tl.fma(u, series, 0.24872594)
    series = tl.fma(u, series, 0.33338768)
    series = tl.fma(u, series, 0.49999914)
    series = tl.fma(u, series, 1.0)
    e = tl.where(x < 0x40000000, u * series, -0.6931471805599453 * tl.log2(rest))
    return -0.6931471805599453 * tl.log2(e)
