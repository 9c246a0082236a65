"""Every kernel against the reference in fp32 on the same numbers: real sizes, odd ones, poisoned outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.check import compare, poisoned
from bench.seats import attention_items
from bench.shapes import SHAPES
from icon2_rt.engine.bank import DirectionBank
from icon2_rt.models import DecoderSpec
from icon2_rt.ops import Ops, RowSampling, RowState, RowSteering, rotary
from icon2_rt.steering import Direction, compile_steering
from tests.gpu.lane import DEVICE, ops

REFERENCE = Ops("reference")
# ‖out − expected‖ / ‖expected‖: a few roundings of the storage type; TF32 in place of fp32 would be 3e-4.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ODD = DecoderSpec("llama", 3, 80, 7, 1, 24, 112, 975, 512, None, 1e-5, 1.0, False)
SPECS = {name: SHAPES[name] for name in ("llama3-8b", "qwen2-7b", "qwen2-1.5b", "dry")} | {"odd": ODD}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


class Draw:
    """Random tensors on the device, from one seed."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.generator = torch.Generator(DEVICE).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.empty(shape, device=DEVICE, dtype=torch.float32).normal_(generator=self.generator)
        return drawn.to(dtype or self.dtype)


def row_steering(draw: Draw, rows: int, hidden: int, n_layers: int = 3) -> RowSteering:
    """Rows in turn: all blocks, none, zero strength, two terms with a norm that is kept, an ablation, one block."""
    a, b = (Direction(f"d{n}", draw(n_layers, hidden, dtype=torch.float32).cpu()) for n in range(2))
    kinds = [2.0 * a, None, 0.0 * a, (1.5 * a - 0.5 * b).with_keep_norm(), a.ablated(), 3.0 * b[0]]
    compiled = [compile_steering(kind, n_layers, hidden) for kind in kinds]
    bank = DirectionBank(4, 3, n_layers, hidden, DEVICE)
    bank.pin(compiled)
    found = bank.row_steering([compiled[n % len(compiled)] for n in range(rows)])
    assert found is not None
    return replace(found, rows=None, rescale=True, additive=False)  # what a graph knows of its rows: nothing


def state(rows: int, positions: Tensor | None = None, running: Tensor | None = None) -> RowState:
    def per_row(dtype: torch.dtype) -> Tensor:
        return torch.arange(rows, device=DEVICE).to(dtype)

    running = torch.ones(rows, dtype=torch.bool, device=DEVICE) if running is None else running
    return RowState(
        tokens=per_row(torch.int64), positions=per_row(torch.int32) if positions is None else positions,
        generated=per_row(torch.int32), running=running, logprobs=per_row(torch.float32),
    )  # fmt: skip


def right(found: dict[str, float], dtype: torch.dtype) -> None:
    assert found["error"] <= TOLERANCE[dtype]  # NaN is not
    assert found["unequal"] == 0.0


@every_dtype
@every_spec
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("first", [True, False], ids=["no-x", "x"])
def test_add_steer_rmsnorm(spec, dtype, rows, first):
    draw, hidden = Draw(dtype), spec.hidden_size
    x = None if first else draw(rows, hidden)
    plain = (x, draw(rows, hidden), draw(hidden), spec.rms_norm_eps)
    right(compare(ops().add_steer_rmsnorm, REFERENCE.add_steer_rmsnorm, plain), dtype)
    steering = row_steering(draw, rows, hidden)
    for layer in (0, 1):
        measured = torch.full((rows, 1 + steering.index.shape[2]), torch.nan, device=DEVICE)
        steered = (*plain, steering, layer, measured)
        right(compare(ops().add_steer_rmsnorm, REFERENCE.add_steer_rmsnorm, steered), dtype)


@every_dtype
@pytest.mark.parametrize("hidden", [48, 1536, 3584, 4096])
def test_rows_without_terms_have_the_same_bytes_with_steering_or_without(dtype, hidden):
    draw, rows = Draw(dtype), 12
    plain = (draw(rows, hidden), draw(rows, hidden), draw(hidden), 1e-6)
    steering = row_steering(draw, rows, hidden)
    expected = ops().add_steer_rmsnorm(*plain)
    for layer in (0, 1):
        got = ops().add_steer_rmsnorm(*plain, steering, layer)
        acts = [n % 6 in ((0, 3, 4, 5) if layer == 0 else (0, 3, 4)) for n in range(rows)]
        for out, right_one in zip(got, expected, strict=True):
            same = (out == right_one).all(dim=1).tolist()
            assert same == [not a for a in acts]


@every_dtype
@every_spec
@pytest.mark.parametrize("rows", [1, 7])
def test_silu_mul(spec, dtype, rows):
    right(compare(ops().silu_mul, REFERENCE.silu_mul, (Draw(dtype)(rows, 2 * spec.intermediate_size),)), dtype)


@every_dtype
@every_spec
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk-norm"])
def test_rope_append(spec, dtype, normed):
    draw, rows, size, d = Draw(dtype), 6, 16, spec.head_dim
    inv_freq = 1e4 ** -(torch.arange(0, d, 2, device=DEVICE) / d)
    cos, sin = rotary(torch.arange(rows, device=DEVICE) * 97, inv_freq, 1.0, dtype)
    norms = (1 + 0.1 * draw(d), 1 + 0.1 * draw(d)) if normed else (None, None)
    pages = (4, size, spec.n_kv_heads, d)
    slots = torch.tensor([3, -1, 63, 0, -1, 17], device=DEVICE)
    arguments = (
        draw(rows, (spec.n_heads + 2 * spec.n_kv_heads) * d), cos, sin, *norms, 1e-6, draw(*pages), draw(*pages), slots,
    )  # fmt: skip
    right(compare(ops().rope_append, REFERENCE.rope_append, arguments), dtype)


@every_dtype
def test_a_row_of_slot_minus_one_writes_nothing(dtype):
    draw, d = Draw(dtype), 64
    cos, sin = rotary(torch.arange(4, device=DEVICE), 1e4 ** -(torch.arange(0, d, 2, device=DEVICE) / d), 1.0, dtype)
    k, v = (torch.full((5, 16, 2, d), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    # The pages before and after the two that the op is given, and every slot that no row has, are the canary.
    slots = torch.tensor([-1, 5, -1, 31], device=DEVICE)
    ops().rope_append(draw(4, 8 * d), cos, sin, None, None, 1e-6, k[1:3], v[1:3], slots)
    for pages in (k, v):
        changed = (pages != 7.0).view(-1, 2 * d).any(dim=1).nonzero()[:, 0].tolist()
        assert changed == [16 + 5, 16 + 31]


@every_dtype
@every_spec
@pytest.mark.parametrize(("groups", "branches", "prompt"), [(1, 1, 1), (1, 2, 200), (3, 2, 130), (2, 20, 70)])
def test_grouped_decode_attention(spec, dtype, groups, branches, prompt):
    draw, size = Draw(dtype), 16
    items, n_pages, _ = attention_items(spec, groups, branches, prompt, 21, size, 4, DEVICE)
    rows = groups * branches
    q, k, v = (
        draw(rows, spec.n_heads, spec.head_dim), *(draw(n_pages, size, spec.n_kv_heads, spec.head_dim) for _ in "kv"),
    )  # fmt: skip
    arguments = (q, k, v, items, spec.head_dim**-0.5, 0)
    right(compare(ops().grouped_decode_attention, REFERENCE.grouped_decode_attention, arguments), dtype)


@every_dtype
@pytest.mark.parametrize("name", ["llama3-8b", "qwen2-7b", "qwen2-1.5b"])
def test_what_attention_may_not_see_has_no_influence(dtype, name):
    """Positions that do not exist yet, and pages that nobody has, hold NaN."""
    spec, draw, size = SPECS[name], Draw(dtype), 16
    items, n_pages, _ = attention_items(spec, 2, 2, 100, 21, size, 4, DEVICE)
    q = draw(4, spec.n_heads, spec.head_dim)
    k, v = (draw(n_pages + 2, size, spec.n_kv_heads, spec.head_dim) for _ in "kv")
    scale = spec.head_dim**-0.5
    expected = ops().grouped_decode_attention(q, k, v, items, scale, 0)
    # Each row's last page is its own; 121 positions fill 9 of its 16.
    last = items.pages[(items.splits == items.splits.max()).nonzero()[:, 0], (121 - 1) // size % 4].long()
    for pages in (k, v):
        pages[n_pages:] = torch.nan
        pages[last, 121 % size :] = 1e4 if DEVICE.type == "cpu" else torch.nan
    with poisoned():
        assert torch.equal(ops().grouped_decode_attention(q, k, v, items, scale, 0), expected)


@every_dtype
@pytest.mark.parametrize("vocab", [975, 128256, 152064])
@pytest.mark.parametrize("kind", ["greedy", "dense"])
def test_sample(dtype, vocab, kind):
    """Settings as a graph has them, one for every row; and the greedy form that knows there are none."""
    draw, rows = Draw(dtype), 12
    i32, f32 = torch.int32, torch.float32

    def column(values: list[float], of: torch.dtype) -> Tensor:
        return torch.tensor([values[n % len(values)] for n in range(rows)], dtype=of, device=DEVICE)

    seen = torch.rand(rows, vocab, generator=draw.generator, device=DEVICE) < 0.1
    dense = {
        "sampled": column([True, True, True, True, True, False], torch.bool),
        "seeds": torch.arange(2 * rows, device=DEVICE).view(rows, 2) * 1_000_003,
        "temperature": column([0.7, 1.0, 1.5], f32),
        "top_k": column([vocab, 50, vocab, 1], i32),
        "top_p": column([1.0, 0.9, 0.5, 1.0], f32),
        "min_p": column([0.0, 0.0, 0.02], f32),
        "repetition_penalty": column([1.0, 1.3], f32),
        "seen": seen,
        "min_tokens": column([0, 100], i32),
    }
    how = RowSampling(
        **(dense if kind == "dense" else dict.fromkeys(dense)),
        eos=torch.tensor([[3, 11, -1]] * rows, dtype=i32, device=DEVICE),
        budget=column([1 << 30, 8], i32),
    )
    logits = 3 * draw(rows, vocab)
    running = torch.arange(rows, device=DEVICE) != 4
    ours, theirs = (state(rows, running=running.clone()) for _ in range(2))
    kept = state(rows, running=running.clone())
    ops().sample(logits, replace(how, seen=None if how.seen is None else seen.clone()), ours)
    REFERENCE.sample(logits, replace(how, seen=None if how.seen is None else seen.clone()), theirs)
    for name in ("tokens", "positions", "generated", "running"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name)[4] == getattr(kept, name)[4]
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-5)
    assert ours.logprobs[4] == kept.logprobs[4]


def test_top_p_is_a_share_of_what_top_k_left():
    """Of 40 nearly equal tokens about 20; of the whole row's mass they have less than half. One draw a row could hide
    it: a row's only difference from the others is its seed."""
    rows, vocab = 24, 4000
    logits = (0.3 * Draw(torch.float32)(1, vocab)).repeat(rows, 1)
    how = RowSampling(
        sampled=torch.ones(rows, dtype=torch.bool, device=DEVICE),
        seeds=torch.arange(2 * rows, device=DEVICE).view(rows, 2) * 1_000_003,
        temperature=None,
        top_k=torch.full((rows,), 40, dtype=torch.int32, device=DEVICE),
        top_p=torch.full((rows,), 0.5, device=DEVICE),
        min_p=None,
        repetition_penalty=None,
        seen=None,
        min_tokens=None,
        eos=torch.full((rows, 1), -1, dtype=torch.int32, device=DEVICE),
        budget=torch.full((rows,), 1 << 30, dtype=torch.int32, device=DEVICE),
    )
    ours, theirs = state(rows), state(rows)
    ops().sample(logits, how, ours)
    REFERENCE.sample(logits, how, theirs)
    assert torch.equal(ours.tokens, theirs.tokens)
    order = logits[0].argsort(descending=True)[:40].tolist()
    assert {order.index(token) for token in ours.tokens.tolist()} <= set(range(20))


@every_dtype
@every_spec
def test_begin_step(spec, dtype):
    """Slots, rotary factors, how much of every item exists; a seat that nobody has is at slot -1."""
    rows, size = 6, 16
    items, n_pages, _ = attention_items(spec, 3, 2, 100, 21, size, 4, DEVICE)
    running = torch.tensor([True, True, False, True, True, False], device=DEVICE)
    positions = torch.tensor([120, 121, 110, 127, 112, 119], dtype=torch.int32, device=DEVICE)
    tables = torch.arange(rows * 8, dtype=torch.int32, device=DEVICE).view(rows, 8) % n_pages
    d = spec.head_dim
    inv_freq = 1e4 ** -(torch.arange(0, d, 2, device=DEVICE) / d)
    arguments = (state(rows, positions, running), tables, size, inv_freq, 1.0, items, dtype)
    found = compare(ops().begin_step, REFERENCE.begin_step, arguments)
    assert found["unequal"] == 0.0
    assert found["error"] <= (1e-4 if dtype == torch.float32 else TOLERANCE[dtype])
    slots, _, _ = ops().begin_step(*arguments)
    assert slots[[2, 5]].tolist() == [-1, -1]
