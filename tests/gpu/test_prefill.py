"""Prefill attention by every library that is installed, at real head sizes: fresh prompts and ones that go on."""

from __future__ import annotations

import pytest
import torch

from icon2_rt.ops import Segment, Segments, prefill_attention
from icon2_rt.ops.prefill import PATHS, sdpa
from tests.gpu.lane import DEVICE, ON_GPU

PAGE = 32
WAYS = {"SDPA": None, **{path.name: path for path in PATHS}}
# (positions before, queries): fresh, going on inside a page and at its edge, one token.
RUNS = [(0, 300), (64, 129), (75, 1), (0, 1), (1000, 17)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(32, 8, 128), (28, 4, 128), (12, 2, 128), (4, 2, 32), (5, 5, 80)])
@pytest.mark.parametrize("way", WAYS)
def test_prefill_attention(way, heads, kv_heads, d, dtype):
    path = WAYS[way]
    if path is not None:
        if not ON_GPU:
            pytest.skip(f"{way} runs on a CUDA GPU only")
        if (why_not := path.why_not()) is not None:
            pytest.skip(f"{way}: {why_not}")
        if not path.takes(torch.cuda.get_device_capability()[0], d):
            pytest.skip(f"{way} does not take this device with heads of {d}")
    generator = torch.Generator(DEVICE).manual_seed(0)
    segments, begin = [], 0
    n_pages = sum(-(-(start + n) // PAGE) for start, n in RUNS)
    free = iter(torch.randperm(n_pages, generator=torch.Generator().manual_seed(0)).tolist())
    for start, n in RUNS:
        table = torch.tensor([next(free) for _ in range(-(-(start + n) // PAGE))], device=DEVICE)
        segments.append(Segment(begin, begin + n, start, table))
        begin += n
    q, k, v = (
        torch.empty(shape, device=DEVICE).normal_(generator=generator).to(dtype)
        for shape in ((begin, heads, d), *[(n_pages, PAGE, kv_heads, d)] * 2)
    )
    packed = Segments(tuple(segments), PAGE)
    expected = prefill_attention(q.float(), k.float(), v.float(), packed, d**-0.5, sdpa)
    got = prefill_attention(q, k, v, packed, d**-0.5, sdpa if path is None else path.attend)
    assert got.dtype == dtype
    assert float((got.float() - expected).norm() / expected.norm()) < (1e-2 if dtype == torch.bfloat16 else 2e-3)
