"""What the interpreter makes of bf16 (tests/interpreter.py) is what torch makes of it, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.interpreter import round_to_bf16

# What overflows in fp32 or is NaN is meant.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def floats(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def every_bf16() -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def around_every_bf16() -> Tensor:
    """fp32: every bf16 of both signs (zeros, denormals, the largest, infinities, NaNs), the tie above it, and one step
    of fp32 to either side of both."""
    high = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    return floats(*(high + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten().tolist())


def same(got: Tensor, expected: Tensor) -> None:
    """Bit for bit, -0 and 0 told apart; one NaN is as good as another."""
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(got.isnan(), expected.isnan())
    number = ~expected.isnan()
    wrong = got[number].view(torch.int16) != expected[number].view(torch.int16)
    assert not wrong.any(), f"{int(wrong.sum())} differ: {got[number][wrong][:4]} for {expected[number][wrong][:4]}"


@triton.jit
def round_kernel(x, out, n, CUSTOM: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + at, mask=at < n)
    if CUSTOM:
        tl.store(out + at, value.to(tl.bfloat16, fp_downcast_rounding="rtne"), mask=at < n)
    else:
        tl.store(out + at, value.to(tl.bfloat16), mask=at < n)


@triton.jit
def implicit_kernel(x, out, n, N: tl.constexpr):
    """A store rounds what it is given, too."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


def test_a_cast_rounds_to_nearest_even() -> None:
    x = around_every_bf16()
    for custom in (False, True):
        out = torch.empty(len(x), dtype=torch.bfloat16)
        round_kernel[(triton.cdiv(len(x), 1 << 17),)](x, out, len(x), CUSTOM=custom, N=1 << 17)
        same(out, x.to(torch.bfloat16))
    out = torch.empty(len(x), dtype=torch.bfloat16)
    implicit_kernel[(triton.cdiv(len(x), 1 << 17),)](x, out, len(x), N=1 << 17)
    same(out, x.to(torch.bfloat16))


def test_known_answers() -> None:
    """Ties go to the even one; the largest rounds up to infinity; a NaN whose digits are all cut off stays one."""
    cases = {
        0x3F808000: 0x3F80, 0x3F818000: 0x3F82, 0x3F808001: 0x3F81, 0x7F7F7FFF: 0x7F7F, 0x7F7F8000: 0x7F80,
        0x00008000: 0x0000, 0x00008001: 0x0001, 0x80018000: 0x8002, 0x7F800000: 0x7F80, 0xFF800000: 0xFF80,
    }  # fmt: skip
    got = round_to_bf16(np.array(list(cases), dtype=np.uint32).view(np.float32))
    assert got.tolist() == list(cases.values())
    assert (
        torch.from_numpy(round_to_bf16(np.array([0x7F800001], np.uint32).view(np.float32))).view(torch.bfloat16).isnan()
    )


@triton.jit
def widen_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(tl.float32))


def test_a_load_is_exact() -> None:
    x, out = every_bf16(), torch.empty(1 << 16)
    widen_kernel[(1,)](x, out, N=1 << 16)
    same(out.to(torch.bfloat16), x)
    assert torch.equal(out.nan_to_num(), x.float().nan_to_num())


@triton.jit
def arithmetic_kernel(a, b, out, compared, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x + y)
    tl.store(out + N + at, x - y)
    tl.store(out + 2 * N + at, x * y)
    tl.store(out + 3 * N + at, (x / y).to(tl.bfloat16))
    tl.store(out + 4 * N + at, tl.minimum(x, y))
    tl.store(out + 5 * N + at, tl.maximum(x, y))
    tl.store(out + 6 * N + at, tl.where((x < y) & (x > -2.0), x, y))
    tl.store(out + 7 * N + at, tl.abs(x))
    tl.store(out + 8 * N + at, -x)
    tl.store(compared + at, x < y)
    tl.store(compared + N + at, x == y)


def test_arithmetic_is_torchs() -> None:
    n = 4096
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, n, generator=g) * 10.0 ** torch.randint(-3, 4, (2, n), generator=g)).bfloat16()
    b[::7] = a[::7]
    special = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 3.3895e38, 1e-40, 1.0, -3.0]).bfloat16()
    a[:64], b[:64] = special.repeat(8), special.repeat_interleave(8)
    out = torch.empty(9, n, dtype=torch.bfloat16)
    compared = torch.empty(2, n, dtype=torch.bool)
    arithmetic_kernel[(1,)](a, b, out, compared, N=n)
    for got, expected in zip(out, (a + b, a - b, a * b, a / b), strict=False):
        same(got, expected)
    number = ~(a.isnan() | b.isnan())  # a minimum with NaN is the other's affair in Triton
    zeros = number & (a == 0) & (b == 0)
    same(out[4][number & ~zeros], torch.minimum(a, b)[number & ~zeros])
    same(out[5][number & ~zeros], torch.maximum(a, b)[number & ~zeros])
    same(out[6], torch.where((a < b) & (a > -2.0), a, b))
    same(out[7], a.abs())
    same(out[8][a != 0], -a[a != 0])
    assert torch.equal(compared[0], a < b)
    assert torch.equal(compared[1], a == b)


@triton.jit
def reduce_kernel(x, out, index, prefix, ROWS: tl.constexpr, N: tl.constexpr):
    rows, at = tl.arange(0, ROWS), tl.arange(0, N)
    values = tl.load(x + rows[:, None] * N + at[None, :])
    tl.store(out + rows, tl.sum(values, 1))
    tl.store(out + ROWS + rows, tl.max(values, 1))
    tl.store(out + 2 * ROWS + rows, tl.min(values, 1))
    tl.store(index + rows, tl.argmax(values, 1))
    tl.store(prefix + rows[:, None] * N + at[None, :], tl.cumsum(values, 1))


def test_reductions() -> None:
    # Small integers: sums are exact in fp32 in any order, and some are ties in bf16.
    x = torch.randint(-40, 90, (4, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    out, index = torch.empty(3, 4, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int32)
    prefix = torch.empty(4, 64, dtype=torch.bfloat16)
    reduce_kernel[(1,)](x, out, index, prefix, ROWS=4, N=64)
    same(out, torch.stack((x.float().sum(1), x.amax(1).float(), x.amin(1).float())).bfloat16())
    same(prefix, x.float().cumsum(1).bfloat16())
    assert torch.equal(x.gather(1, index[:, None].long())[:, 0], x.amax(1))


@triton.jit
def dot_kernel(a, b, c, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + n[:, None] * K + k[None, :])
    at = m[:, None] * N + n[None, :]
    tl.store(out + at, tl.dot(left, tl.trans(right), tl.load(c + at), input_precision="ieee"))


def test_a_dot_takes_bf16_and_sums_in_fp32() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=g) for s in ((16, 32), (16, 32), (16, 16)))
    a, b, out = a.bfloat16(), b.bfloat16(), torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, out, M=16, K=32, N=16)
    exact = a.double() @ b.double().T + c.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert float((out.bfloat16().double() - exact).abs().max()) > 1e-3, "rounding it would have been seen"
