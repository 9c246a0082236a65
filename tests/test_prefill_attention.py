"""Every library that prefill may attend with: how it is called (names, dtypes, layouts), and that what comes out of
such a call is right. The libraries that cannot run here are doubles that keep the names and order of the arguments of
the real ones, insist on what those insist on, and compute the answer plainly."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from icon2_rt import doctor
from icon2_rt.ops import Ops, Segment, Segments, prefill, prefill_attention, select
from icon2_rt.ops.prefill import PATHS, choose, prefill_attention_by_library, sdpa
from icon2_rt.ops.prefill.flash_attn_2 import flash_attn_2
from icon2_rt.ops.prefill.flash_attn_4 import flash_attn_4
from icon2_rt.ops.prefill.torch_varlen import torch_varlen

PAGE = 4


def pack(*runs: tuple[int, int]) -> Segments:
    """Segments of (positions before, queries) over pages in no order, some of them shared by all."""
    segments, begin, pages = [], 0, iter(torch.randperm(60, generator=torch.Generator().manual_seed(1)) + 4)
    for start, queries in runs:
        n, common = -(-(start + queries) // PAGE), min(start // PAGE, 4)
        table = torch.tensor([*range(common), *(int(next(pages)) for _ in range(n - common))])
        segments.append(Segment(begin, begin + queries, start, table))
        begin += queries
    return Segments(tuple(segments), PAGE)


def tensors(segments: Segments, heads: int, kv_heads: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(0)
    q = torch.randn(segments.runs[-1].end, heads, d, generator=noise)
    k, v = (torch.randn(64, PAGE, kv_heads, d, generator=noise) for _ in range(2))
    return q, k, v


def expected(q: Tensor, k_pages: Tensor, v_pages: Tensor, segments: Segments, scale: float) -> Tensor:
    """Query by query, in double precision."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k_pages.shape[2]
    for s in segments.runs:
        k, v = (pages[s.pages].flatten(0, 1).double().repeat_interleave(group, dim=1) for pages in (k_pages, v_pages))
        for i in range(s.end - s.begin):
            n = s.start + i + 1
            weight = (torch.einsum("hd,nhd->hn", q[s.begin + i].double(), k[:n]) * scale).softmax(dim=-1)
            out[s.begin + i] = torch.einsum("hn,nhd->hd", weight, v[:n])
    return out.flatten(1)


RUNS = [
    [(0, 1)],
    [(0, 7)],
    # A chunk that goes on, one token of it, a whole chunk on a page's edge, a prompt that begins.
    [(5, 6), (13, 1), (8, 8), (0, 3)],
]
HEADS = [(1, 1), (4, 2), (7, 1)]


# --- doubles ----------------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor, before_q: Tensor, before_k: Tensor, most_q: int, most_k: int, scale: float):
    """What all of the libraries compute, and insist on."""
    assert all(t.is_contiguous() and t.dim() == 3 for t in (q, k, v)) and k.shape == v.shape
    assert q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0
    for before, total in ((before_q, len(q)), (before_k, len(k))):
        assert before.dtype == torch.int32 and before.is_contiguous() and before.device == q.device
        assert before[0] == 0 and before[-1] == total and (before.diff() > 0).all()
    assert type(most_q) is int and most_q == before_q.diff().max()
    assert type(most_k) is int and most_k == before_k.diff().max()
    out = torch.empty_like(q)
    for (a, b), (c, d) in zip(before_q.unfold(0, 2, 1).tolist(), before_k.unfold(0, 2, 1).tolist(), strict=True):
        keys, values = (t[c:d].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        # Aligned bottom-right: the last query sees the last key.
        seen = torch.ones(b - a, d - c).tril(d - c - (b - a)).bool()
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    return out


def flash_attn_2_double() -> ModuleType:
    module = ModuleType("flash_attn")

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert causal and dropout_p == 0.0 and window_size == (-1, -1) and not return_attn_probs
        return plain(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)

    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


def flash_attn_4_double(first_beta: bool) -> ModuleType:
    module = ModuleType("flash_attn.cute")

    def answer(q, k, v, rest):
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
        assert rest["causal"] and rest["window_size"] == (None, None) and rest["page_table"] is None
        return plain(q, k, v, *(rest[name] for name in names)), None

    def first(
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        return_lse=False,
    ):
        return answer(q, k, v, locals())

    def later(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        return_lse=False,
    ):
        assert qv is None
        return answer(q, k, v, locals())

    module.flash_attn_varlen_func = first if first_beta else later
    return module


def torch_double(told_of_groups: bool) -> Callable[..., Tensor]:
    def torch_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        # torch compares with a tuple.
        assert return_aux is None and window_size == (-1, 0)
        return plain(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)

    def torch_2_13(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        assert enable_gqa or query.shape[1] == key.shape[1]
        return torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    return torch_2_13 if told_of_groups else torch_2_11


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> prefill.Attend:
    """The path of that name, its library replaced by its double."""
    if name == "sdpa":
        return sdpa
    if name == "flash-attn 2":
        monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_2_double())
        return flash_attn_2
    if name.startswith("flash-attn 4"):
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.cute", flash_attn_4_double(name.endswith("first beta")))
        return flash_attn_4
    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", torch_double(not name.endswith("2.11")))
    return torch_varlen


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize(
    "name", ["sdpa", "flash-attn 2", "flash-attn 4", "flash-attn 4, first beta", "torch varlen", "torch varlen of 2.11"]
)
def test_right_for_chunks_and_groups(
    monkeypatch: pytest.MonkeyPatch, name: str, runs: list[tuple[int, int]], heads: int, kv_heads: int
) -> None:
    attend, segments = install(monkeypatch, name), pack(*runs)
    q, k, v = tensors(segments, heads, kv_heads, 16)
    # q as the reference's rope_append gives it: heads of a wider row.
    wide = torch.cat([q, torch.full_like(q, torch.nan)], dim=1)[:, :heads]
    out = prefill_attention(wide, k, v, segments, 0.3, attend=attend)
    assert out.shape == (len(q), heads * 16)
    torch.testing.assert_close(out.double(), expected(q, k, v, segments, 0.3), rtol=1e-5, atol=1e-5)


def test_torch_varlen_is_called_as_the_installed_torch_declares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention.varlen as varlen

    real, calls = inspect.signature(varlen.varlen_attn), []

    def record(*args, **kwargs):
        calls.append(real.bind(*args, **kwargs).arguments)
        return args[0]

    record.__signature__ = real
    monkeypatch.setattr(varlen, "varlen_attn", record)
    segments = pack((5, 6), (0, 3))
    q, k, v = tensors(segments, 4, 2, 16)
    prefill_attention(q, k, v, segments, 0.3, attend=torch_varlen)
    (call,) = calls
    assert call["window_size"] == (-1, 0) and call["scale"] == 0.3
    assert call["cu_seq_q"].tolist() == [0, 6, 9] and call["cu_seq_k"].tolist() == [0, 11, 14]
    assert (call["max_q"], call["max_k"]) == (6, 11)


def test_the_installed_torch_takes_the_call() -> None:
    """Its operator checks types and gives a shape, on tensors that are not there."""
    with FakeTensorMode():
        pages = torch.empty(3, dtype=torch.int64)
        segments = Segments((Segment(0, 6, 5, pages), Segment(6, 9, 0, pages[:1])), PAGE)
        q = torch.empty(9, 4, 64, dtype=torch.bfloat16)
        k = torch.empty(64, PAGE, 2, 64, dtype=torch.bfloat16)
        out = prefill_attention(q, k, k, segments, 0.125, attend=torch_varlen)
    assert out.shape == (9, 256) and out.dtype == torch.bfloat16


def chosen(monkeypatch: pytest.MonkeyPatch, major: int, d: int = 128, dtype: torch.dtype = torch.bfloat16) -> object:
    """What is chosen on a CUDA device of that major capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    return choose.__wrapped__(torch.device("cuda"), dtype, d)


def test_choice_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert [chosen(monkeypatch, major) for major in (7, 8, 9, 10)] == [sdpa, *[torch_varlen] * 3]
    # flash-attn 4 alone has a flash_attn without the function.
    install(monkeypatch, "flash-attn 4")
    assert [chosen(monkeypatch, major) for major in (7, 8, 9, 10)] == [sdpa, torch_varlen, flash_attn_4, flash_attn_4]
    assert chosen(monkeypatch, 10, d=192) is torch_varlen and chosen(monkeypatch, 9, d=192) is flash_attn_4
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_2_double())
    assert [chosen(monkeypatch, major) for major in (8, 9)] == [flash_attn_2, flash_attn_4]
    # The folder flash_attn/cute that flash-attn 2 brings is not flash-attn 4.
    old = ModuleType("flash_attn.cute")
    old.flash_attn_varlen_func = lambda q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k: None
    monkeypatch.setitem(sys.modules, "flash_attn.cute", old)
    assert chosen(monkeypatch, 9) is flash_attn_2


def test_choice_by_what_the_libraries_take(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash-attn 2")
    assert chosen(monkeypatch, 9, dtype=torch.float32) is sdpa
    assert [chosen(monkeypatch, 9, d=d) for d in (12, 264)] == [sdpa, sdpa]
    assert chosen(monkeypatch, 8, d=80, dtype=torch.float16) is flash_attn_2
    assert choose.__wrapped__(torch.device("cpu"), torch.bfloat16, 64) is sdpa


def test_by_library_is_the_op_with_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = pack((5, 6), (0, 3))
    q, k, v = tensors(segments, 4, 2, 16)
    expected = prefill_attention(q, k, v, segments, 0.3)
    assert torch.equal(prefill_attention_by_library(q, k, v, segments, 0.3), expected)
    monkeypatch.setattr(prefill, "choose", lambda *model: lambda q, k, v, segments, scale: q + 1)
    assert torch.equal(prefill_attention_by_library(q, k, v, segments, 0.3), q.flatten(1) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_on_a_cuda_device_sdpa_is_given_what_one_of_its_fused_kernels_takes(
    monkeypatch, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    """Flash: no mask, no fp32. Memory-efficient: as many KV heads as query heads. With a CPU's tensors that say they
    are a CUDA device's."""

    class Elsewhere(Tensor):
        @property
        def device(self):
            return SimpleNamespace(type="cuda")

    real, calls = F.scaled_dot_product_attention, []

    def record(q: Tensor, k: Tensor, v: Tensor, **options):
        flash = options["attn_mask"] is None and q.dtype != torch.float32
        assert flash or not options["enable_gqa"]
        assert options["enable_gqa"] or q.shape[1] == k.shape[1] == v.shape[1]
        calls.append(flash)
        return real(q, k, v, **options)

    segments = pack(*RUNS[2])
    q, k, v = (t.to(dtype) for t in tensors(segments, heads, kv_heads, 16))
    k, v = (pages.flatten(0, 1).index_select(0, segments.slots) for pages in (k, v))
    here, ones = sdpa(q, k, v, segments, 0.3), torch.ones
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: ones(*shape, dtype=dtype))
    there = sdpa(q.as_subclass(Elsewhere), k, v, segments, 0.3).as_subclass(Tensor)
    assert calls == [False, False, False, dtype == torch.bfloat16]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(there, here, rtol=tolerance, atol=tolerance)


def test_every_backend_attends_by_the_library_that_is_there() -> None:
    assert Ops().prefill_attention is prefill_attention_by_library
    assert select("reference", torch.device("cpu")).prefill_attention is prefill_attention_by_library


def test_rocm_is_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert chosen(monkeypatch, 9) is sdpa


def test_doctor_names_every_path_that_has_not_run() -> None:
    said = {finding.name for finding in doctor.examine() if finding.section == "never run on"}
    assert {path.name for path in PATHS if not path.measured_on} <= said


def test_no_library_is_imported_before_it_is_chosen() -> None:
    code = (
        "import sys, icon2_rt.ops; print([m for m in ('flash_attn', 'torch.nn.attention.varlen') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
