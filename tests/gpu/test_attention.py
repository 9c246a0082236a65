"""Attention where rows share KV: mixed scopes in one list, the same bytes shared and unshared, alone and in company;
and every library that prefill can attend with, as far as it is installed."""

from __future__ import annotations

import pytest
import torch

from icon2_rt.ops.prefill import PATHS, Path, Segment, Segments, prefill_attention
from tests.gpu.lane import DEVICE, ON_GPU, ops
from tests.items import Group, Scene, scene

# ‖out − expected‖ / ‖expected‖
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MIXED = (
    Group(prefix=300, own=(70, 1), fork=2),
    Group(prefix=256, own=(1, 1, 1, 50), idle=(1,)),
    Group(prefix=0, own=(1,)),
    Group(prefix=140, own=tuple(range(1, 10))),
    Group(prefix=129, own=(200, 2), fork=1),
)
SIZES = [(8, 2, 64), (7, 1, 128), (6, 6, 80), (4, 2, 256), (16, 1, 32)]


def make(heads: int, kv_heads: int, d: int, dtype: torch.dtype, groups: tuple[Group, ...] = MIXED, **more) -> Scene:
    # The reference multiplies what it must not see by 0: nothing there may be NaN.
    sizes = {"heads": heads, "kv_heads": kv_heads, "d": d, "dtype": dtype, "page_size": 32, "split_pages": 4}
    return scene(groups, **sizes, hidden=torch.nan if ON_GPU else 0.0, **more)


def run(s: Scene) -> torch.Tensor:
    return ops().grouped_decode_attention(*s.on(DEVICE, s.q.dtype).arguments())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), SIZES)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_scopes_mixed_in_one_list(heads: int, kv_heads: int, d: int, layer: int, dtype: torch.dtype) -> None:
    s = make(heads, kv_heads, d, dtype, layer=layer)
    out, expected, running = run(s).cpu().double(), s.expected(), s.state.running
    assert (out - expected)[running].norm() <= TOLERANCE[dtype] * expected.norm()
    assert not ON_GPU or not out[~running].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), SIZES)
def test_shared_is_unshared(heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    shared, unshared = (make(heads, kv_heads, d, dtype, shared=each) for each in (True, False))
    running = shared.state.running
    a, b = run(shared).cpu()[running], run(unshared).cpu()[running]
    if ON_GPU:
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(8, 2, 64), (28, 4, 128), (32, 8, 128), (4, 4, 256)])
def test_every_library_of_prefill(path: Path, heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    if not ON_GPU:
        pytest.skip(f"{path.name} needs a CUDA GPU")
    reason = path.why_not()
    if reason is None and not path.takes(torch.cuda.get_device_capability()[0], d):
        reason = f"{path.name} takes no heads of {d} on this device"
    if reason is not None:
        pytest.skip(reason)
    noise = torch.Generator(DEVICE).manual_seed(0)
    pages = torch.randperm(64, generator=noise, device=DEVICE)
    runs = [(0, 33, pages[:2]), (100, 70, pages[2:8]), (64, 1, pages[8:11]), (0, 300, pages[11:21])]
    segments, begin = [], 0
    for start, queries, table in runs:
        segments.append(Segment(begin, begin + queries, start, table))
        begin += queries
    packed = Segments(tuple(segments), 32)
    q, k, v = (
        torch.randn(shape, generator=noise, device=DEVICE).to(dtype)
        for shape in ((begin, heads, d), *[(64, 32, kv_heads, d)] * 2)
    )
    out = prefill_attention(q, k, v, packed, d**-0.5, path.attend).float()
    expected = prefill_attention(q.float(), k.float(), v.float(), packed, d**-0.5)
    assert (out - expected).norm() <= TOLERANCE[dtype] * expected.norm()
