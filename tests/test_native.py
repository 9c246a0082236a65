"""The native ops against the references: odd shapes, strides and alignments, with guard bytes around every result."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from icon2_rt import Direction, Runtime, ops
from icon2_rt.ops import native
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_tokenizer
from tests.op_inputs import (
    attention_items,
    close,
    per_row,
    rand,
    row_state,
    row_steering,
    run_both,
    same_state,
    settings,
    step_of,
    strided,
)

pytestmark = pytest.mark.skipif(native.why_not is not None, reason=f"no native extension here: {native.why_not}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD, POISON = 64, 0x5A


class GuardedMemory:
    """What ``native`` sees instead of torch when it allocates: results lie between guard bytes, at odd addresses."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int, int]] = []
        self.int64, self.contiguous_format = torch.int64, torch.contiguous_format

    def empty(self, shape: int | tuple[int, ...], dtype: torch.dtype, device: object = None) -> Tensor:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        n = math.prod(shape) * dtype.itemsize
        buffer = torch.full((GUARD + n + GUARD,), POISON, dtype=torch.uint8)
        begin = GUARD + dtype.itemsize  # not a multiple of a vector's size
        self.buffers.append((buffer, begin, begin + n))
        return buffer[begin : begin + n].view(dtype).view(shape)

    def empty_like(self, other: Tensor, dtype: torch.dtype | None = None, memory_format: object = None) -> Tensor:
        return self.empty(tuple(other.shape), dtype or other.dtype)

    def check(self) -> None:
        for buffer, begin, end in self.buffers:
            assert bool((buffer[:begin] == POISON).all()) and bool((buffer[end:] == POISON).all())


@pytest.fixture(params=native.extension.instruction_sets() if native.extension else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.extension.instruction_set()
    native.extension.use_instruction_set(request.param)
    yield request.param
    native.extension.use_instruction_set(before)


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuardedMemory]:
    memory = GuardedMemory()
    monkeypatch.setattr(native, "torch", memory)
    yield memory
    assert memory.buffers
    memory.check()


# --- the ops, one by one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 8), (5, 48), (3, 131), (6, 896)])
def test_add_steer_rmsnorm(isa, guards, rows, hidden, dtype):
    torch.manual_seed(rows)
    x, weight = strided(rows, hidden, dtype), rand(hidden, dtype=dtype)
    for residual_dtype in {dtype, torch.float32}:
        residual = strided(rows, hidden, residual_dtype)
        for first in (None, x):
            for mine, theirs in zip(
                native.add_steer_rmsnorm(first, residual, weight, 1e-6),
                ops.add_steer_rmsnorm(first, residual, weight, 1e-6),
                strict=True,
            ):
                close(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden", "terms"), [(1, 8, 1), (5, 48, 3), (9, 131, 2), (4, 896, 4)])
def test_steering(isa, guards, rows, hidden, terms, dtype):
    torch.manual_seed(rows)
    x, residual, weight = strided(rows, hidden, dtype), strided(rows, hidden, dtype), rand(hidden, dtype=dtype)
    plain = native.add_steer_rmsnorm(x, residual, weight, 1e-6)
    for host_knows in (False, True):
        steering = row_steering(rows, 3, hidden, terms, host_knows)
        for layer in range(3):
            measured, expected = torch.full((2, rows, 1 + terms), 7.0)
            mine = native.add_steer_rmsnorm(x, residual, weight, 1e-6, steering, layer, measured)
            theirs = ops.add_steer_rmsnorm(x, residual, weight, 1e-6, steering, layer, expected)
            close(measured, expected)
            acts = (steering.which >= 0) & (steering.count[steering.which.clamp(min=0).long(), layer] > 0)
            for a, b, without in zip(mine, theirs, plain, strict=True):
                close(a, b)
                assert torch.equal(a[~acts], without[~acts])  # the same bytes as with no steering at all


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "norms"), [(4, 2, 8, False), (7, 1, 32, True), (6, 2, 80, False), (2, 2, 34, True)]
)
def test_rope_append(isa, guards, heads, kv_heads, d, norms, dtype):
    torch.manual_seed(d)
    rows = 5
    qkv = strided(rows, (heads + 2 * kv_heads) * d, dtype)
    cos, sin = ops.rotary(torch.tensor([0, 3, 1000, 7, 9]), 10000.0 ** -(torch.arange(0, d, 2) / d), 1.0, dtype)
    q_norm, k_norm = (rand(d, dtype=dtype), rand(d, dtype=dtype)) if norms else (None, None)
    slots = torch.tensor([11, -1, 0, 5, -1])
    pages = [rand(4, 3, kv_heads, d, dtype=dtype) for _ in range(2)]
    others = [p.clone() for p in pages]
    mine = native.rope_append(qkv, cos, sin, q_norm, k_norm, 1e-6, *pages, slots)
    theirs = ops.rope_append(qkv, cos, sin, q_norm, k_norm, 1e-6, *others, slots)
    close(mine, theirs)
    for mine, theirs in zip(pages, others, strict=True):
        close(mine, theirs)
        untouched = torch.ones(12, dtype=torch.bool).index_fill_(0, slots[slots >= 0], False)
        assert torch.equal(mine.view(12, -1)[untouched], theirs.view(12, -1)[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 48), (2, 1000)])
def test_silu_mul(isa, guards, rows, width, dtype):
    torch.manual_seed(width)
    gate_up = 20 * strided(rows, 2 * width, dtype)
    close(native.silu_mul(gate_up), ops.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (7, 3), (48, 131), (896, 29)])
def test_linear(isa, guards, n_in, n_out, dtype):
    torch.manual_seed(n_in)
    weight, bias = rand(n_out, n_in, dtype=dtype), rand(n_out, dtype=dtype)
    x = strided(native.FEW_ROWS, n_in, dtype)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 13, native.FEW_ROWS):
        for b in (None, bias):
            exact = x[:rows].double() @ weight.double().T + (0.0 if b is None else b.double())
            close(native.linear(x[:rows], weight, b), exact.to(dtype))
    # A row's result is its own: the same bytes whatever the other rows are, and however many.
    together = native.linear(x, weight, bias)
    for row in range(native.FEW_ROWS):
        assert torch.equal(native.linear(x[row : row + 1], weight, bias)[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(guards, dtype):
    tokens, weight = torch.tensor([3, 0, 3, 6]), rand(7, 131, dtype=dtype)
    assert torch.equal(native.embed(tokens, weight), ops.embed(tokens, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("running", [[True] * 6, [True, False, True, False, False, True], [False] * 6])
def test_begin_step(isa, guards, running, dtype):
    torch.manual_seed(0)
    state, tables = step_of(running)
    inv_freq = 10000.0 ** -(torch.arange(0, 34, 2) / 34)
    mine, theirs = (attention_items(state, tables, 8, 4, 4) for _ in range(2))
    got = native.begin_step(state, tables, 8, inv_freq, 1.25, mine, dtype)
    expected = ops.begin_step(state, tables, 8, inv_freq, 1.25, theirs, dtype)
    assert torch.equal(got[0], expected[0])
    close(got[1], expected[1])
    close(got[2], expected[2])
    assert torch.equal(mine.lengths, theirs.lengths) and torch.equal(mine.n_splits, theirs.n_splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 32), (7, 1, 80), (6, 6, 8), (8, 2, 128), (6, 1, 34)])
@pytest.mark.parametrize("running", [[True] * 6, [True, False, True, False, False, True]])
def test_grouped_decode_attention(isa, guards, heads, kv_heads, d, running, dtype):
    torch.manual_seed(d)
    state, tables = step_of(running)
    pages = [rand(72, 8, kv_heads, d, dtype=dtype) for _ in range(2)]
    q = rand(6, heads + 2, d, dtype=dtype)[:, 1 : 1 + heads]
    inv_freq = torch.ones(4)
    results = []
    for width in (3, 1):  # rows that share an item, and each with its own
        items = attention_items(state, tables, 8, 4, width)
        ops.begin_step(state, tables, 8, inv_freq, 1.0, items, dtype)
        results += [native.grouped_decode_attention(q, *pages, items, d**-0.5, layer) for layer in (0, 5)]
    for other in results[1:]:
        assert torch.equal(results[0], other)  # sharing does not change a byte
    for row in range(6):
        if not running[row]:
            assert not results[0][row].any()
            continue
        length = int(state.positions[row]) + 1
        k, v = (p[tables[row].long()].flatten(0, 1)[:length].double() for p in pages)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        weights = torch.einsum("hd,shd->hs", q[row].double(), k).mul(d**-0.5).softmax(dim=-1)
        close(results[0][row], torch.einsum("hs,shd->hd", weights, v).to(dtype).flatten())


def test_attention_reads_nothing_beyond_the_length(isa):
    """Positions that do not exist yet may hold anything, NaN too."""
    state, tables = step_of([True] * 6)
    k, v = rand(72, 8, 2, 32), rand(72, 8, 2, 32)
    items = attention_items(state, tables, 8, 4, 3)
    ops.begin_step(state, tables, 8, torch.ones(4), 1.0, items, torch.float32)
    q = rand(6, 4, 32)
    expected = native.grouped_decode_attention(q, k, v, items, 0.2, 0)
    exists = torch.zeros(72 * 8, dtype=torch.bool)
    for row in range(6):
        at = torch.arange(int(state.positions[row]) + 1)
        exists[tables[row][at // 8].long() * 8 + at % 8] = True
    for pages in (k, v):
        pages.view(72 * 8, -1)[~exists] = torch.nan
    assert torch.equal(native.grouped_decode_attention(q, k, v, items, 0.2, 0), expected)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 975, 32003])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": [0.7, 1.0, 1.9]},
        {"top_k": [1, 5, 975, 40]},
        {"top_p": [0.9, 0.3, 1.0, 0.0]},
        {"min_p": [0.0, 0.2, 0.05]},
        {"temperature": [0.8], "top_k": [50, 3], "top_p": [0.95, 0.5], "min_p": [0.02]},
    ],
    ids=lambda options: "+".join(options) or "greedy",
)
def test_sample(isa, vocab, options, dtype):
    torch.manual_seed(vocab)
    rows = 11
    logits = (3 * strided(rows, vocab, torch.float32)).to(dtype)
    logits[:, 1] = logits[:, 3]  # equal scores share their fate
    kinds = {"top_k": torch.int32}
    fields = {name: per_row(values, rows, kinds.get(name, torch.float32)) for name, values in options.items()}
    mine, theirs, _ = run_both(native.sample, logits, settings(rows, vocab, **fields), steps=3 if vocab < 1000 else 1)
    same_state(mine, theirs)


def test_top_p_is_a_share_of_what_top_k_left(isa):
    """Of 40 nearly equal tokens about 20; of the whole row's mass they have less than half. One draw a row could hide
    it: a row's only difference from the others is its seed."""
    torch.manual_seed(0)
    rows, vocab = 24, 975
    logits = (0.3 * rand(1, vocab)).repeat(rows, 1)
    fields = {"top_k": per_row([40], rows, torch.int32), "top_p": per_row([0.5], rows, torch.float32)}
    how = replace(settings(rows, vocab, **fields), sampled=torch.ones(rows, dtype=torch.bool))
    mine, theirs, _ = run_both(native.sample, logits, how)
    same_state(mine, theirs)
    ran = torch.arange(rows) % 5 != 4
    order = logits[0].argsort(descending=True)[:40].tolist()
    assert {order.index(token) for token in mine.tokens[ran].tolist()} <= set(range(20))


def test_sample_penalty_early_eos_budget_and_seats(isa):
    torch.manual_seed(0)
    rows, vocab = 11, 301
    logits = 3 * rand(rows, vocab)
    logits[:, 2] += 9  # every row would end at once
    how = settings(
        rows, vocab, temperature=torch.full((rows,), 0.9),
        repetition_penalty=per_row([1.0, 1.3, 0.7], rows, torch.float32),
        seen=torch.rand(rows, vocab) < 0.3, min_tokens=per_row([0, 5, 9], rows, torch.int32),
    )  # fmt: skip
    how = replace(how, budget=per_row([50, 6, 5], rows, torch.int32))
    mine, theirs, hows = run_both(native.sample, logits, how, steps=4)
    same_state(mine, theirs)
    assert hows[0].seen is not None and hows[1].seen is not None
    ran = mine.generated > 3
    assert torch.equal(hows[0].seen[ran], hows[1].seen[ran])
    assert not ran.all() and mine.running.any() and not mine.running.all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_sample_shows_logits_that_are_not_finite(isa, value):
    logits = rand(2, 40)
    logits[:, 7] = value
    state = row_state([1, 1], [True, True])
    native.sample(logits, settings(2, 40), state)
    assert not torch.isfinite(state.logprobs).any()


def test_the_draws_follow_the_distribution(isa):
    """The race is cut short where it can be: what is left must still be the softmax."""
    probabilities = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])
    n = 20000
    how = replace(settings(n, 6, temperature=torch.ones(n)), sampled=torch.ones(n, dtype=torch.bool))
    state = row_state([0] * n, [True] * n)
    native.sample(probabilities.log().repeat(n, 1), how, state)
    shares = torch.bincount(state.tokens, minlength=6) / n
    assert float(((shares - probabilities).abs() / (probabilities * (1 - probabilities) / n).sqrt()).max()) < 5


def test_philox_known_answers():
    """The vectors that come with the generator's own distribution."""
    full = 0xFFFFFFFF
    assert native.extension.philox(0, 0, 0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert native.extension.philox(full, full, full, full, full, full) == (
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    )


# --- what is refused -------------------------------------------------------------------------------------------------


def test_mistakes_are_named_before_any_pointer_is_used():
    x, weight = rand(2, 8), rand(8)
    with pytest.raises(TypeError, match="weight must be float32, bfloat16 or float16, not float64"):
        native.add_steer_rmsnorm(x, x, weight.double(), 1e-6)
    with pytest.raises(TypeError, match="x is bfloat16 and weight is float32"):
        native.add_steer_rmsnorm(x.bfloat16(), x, weight, 1e-6)
    with pytest.raises(ValueError, match=r"weight must be \[8\], not \[7\]"):
        native.add_steer_rmsnorm(x, x, weight[:7], 1e-6)
    with pytest.raises(ValueError, match=r"x must be \[2, 8\], not \[3, 8\]"):
        native.add_steer_rmsnorm(rand(3, 8), x, weight, 1e-6)
    with pytest.raises(ValueError, match=r"residual .* must have dense rows"):
        native.add_steer_rmsnorm(None, rand(8, 2).T, weight, 1e-6)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor with memory, not list"):
        native.add_steer_rmsnorm([1.0], x, weight, 1e-6)
    with pytest.raises((TypeError, ValueError), match=r"weight must be (a torch.Tensor with memory|on the CPU)"):
        native.add_steer_rmsnorm(x, x, weight.to("meta"), 1e-6)
    with pytest.raises(ValueError, match="even width"):
        native.silu_mul(rand(2, 7))
    state, tables = step_of([True] * 6)
    items = attention_items(state, tables, 8, 4, 3)
    for page_size, d in ((8, 0), (0, 8)):
        pages = rand(72, page_size, 2, d)
        with pytest.raises(ValueError, match="must not be empty"):
            native.grouped_decode_attention(rand(6, 4, d), pages, pages, items, 1.0, 0)


def test_indices_outside_are_refused():
    x, weight = rand(4, 8), rand(8)
    steering = row_steering(4, 2, 8, 2)
    with pytest.raises(IndexError, match="which has 3 at place 0"):
        native.add_steer_rmsnorm(x, x, weight, 1e-6, replace(steering, which=steering.which + 4), 0)
    with pytest.raises(IndexError, match=r"steering 0 at block 1: .* index in \[0, 5\)"):
        native.add_steer_rmsnorm(x, x, weight, 1e-6, replace(steering, index=steering.index + 5), 1)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\), not 2"):
        native.add_steer_rmsnorm(x, x, weight, 1e-6, steering, 2)
    k, v = rand(2, 4, 1, 8), rand(2, 4, 1, 8)
    cos, sin = rand(1, 1, 8), rand(1, 1, 8)
    with pytest.raises(IndexError, match=r"slots has 8 at place 0, which is outside \[-1, 8\)"):
        native.rope_append(rand(1, 24), cos, sin, None, None, 1e-6, k, v, torch.tensor([8]))
    with pytest.raises(ValueError, match="k_pages is written and overlaps v_pages"):
        native.rope_append(rand(1, 24), cos, sin, None, None, 1e-6, k, k, torch.tensor([0]))
    state, tables = step_of([True] * 6)
    with pytest.raises(IndexError, match="row 0 is at position 70, its table has 8 pages"):
        native.begin_step(
            state, tables[:, :8].contiguous(), 8, torch.ones(4), 1.0, attention_items(state, tables, 8, 4, 3),
            torch.float32,
        )  # fmt: skip
    items = attention_items(state, tables, 8, 4, 3)
    native.begin_step(state, tables, 8, torch.ones(4), 1.0, items, torch.float32)
    few = [rand(40, 8, 2, 32) for _ in range(2)]
    with pytest.raises(IndexError, match="pages has"):
        native.grouped_decode_attention(rand(6, 4, 32), *few, items, 1.0, 0)
    with pytest.raises(IndexError, match="eos has 301"):
        native.sample(rand(2, 301), replace(settings(2, 301), eos=torch.full((2, 1), 301, dtype=torch.int32)),
                      row_state([0, 0], [True, True]))  # fmt: skip
    state = row_state([0, 0], [True, True])
    with pytest.raises(ValueError, match="is written and overlaps"):
        native.sample(rand(2, 9), settings(2, 9), replace(state, generated=state.positions))


# --- threads and the process -----------------------------------------------------------------------------------------


def test_a_captured_step_repeats_its_kernels_on_the_same_memory():
    tokens, weight, gain = torch.tensor([3, 1]), rand(7, 16), rand(16)
    made: list[Tensor] = []

    def step() -> None:
        h = native.embed(tokens, weight)
        made[:] = native.add_steer_rmsnorm(None, h, gain, 1e-5)
        made.append(native.linear(made[1], weight))

    repeat = native.capture(step)
    assert repeat is not None
    first = [x.clone() for x in made]
    tokens.copy_(torch.tensor([6, 0]))
    repeat()
    again = [x.clone() for x in made]
    for x in made:
        x.fill_(torch.nan)
    del step  # what the kernels read and write stays, whoever else lets go of it
    repeat()
    assert all(torch.equal(x, y) and not torch.equal(x, z) for x, y, z in zip(made, again, first, strict=True))
    assert torch.equal(made[2], native.linear(native.add_steer_rmsnorm(None, weight[tokens], gain, 1e-5)[1], weight))


def test_a_step_that_is_partly_torchs_or_fails_is_not_captured():
    x, weight = rand(native.FEW_ROWS + 1, 8), rand(3, 8)
    assert native.capture(lambda: (native.silu_mul(x), native.linear(x, weight), native.silu_mul(x))) is None
    with pytest.raises(ValueError, match="even width"):
        native.capture(lambda: native.silu_mul(rand(2, 3)))
    native.silu_mul(x)  # captured by nobody
    repeat = native.capture(lambda: native.silu_mul(x))
    assert repeat is not None and len(repeat.__self__) == 1


@pytest.mark.parametrize("pairs", [1, 3, native.FEW_ROWS // 3 + 1])
def test_steps_that_are_repeated_give_what_steps_of_single_ops_give(pairs):
    steered = Direction("d", random_vectors(4, 48, seed=0), torch.ones(4))
    repeated: list[int] = []

    def generate(rt: Runtime) -> list:
        return rt.generate_branches(
            random_prompts([1, 7, 30, 60] * pairs, seed=2)[:pairs],
            [None, 2.0 * steered, -2.0 * steered],
            max_new_tokens=45,
            temperature=1.2,
            top_p=0.9,
            repetition_penalty=1.1,
            seed=4,
        )

    def capture(step: Callable[[], object]) -> Callable[[], None] | None:
        repeat = native.capture(step)

        def counted() -> None:
            repeated.append(1)
            repeat()

        return counted if repeat is not None else None

    def runtime(capture: Callable | None) -> Runtime:
        rt = Runtime(tiny_llama(), tiny_tokenizer(), backend="native", page_size=8, split_pages=2, max_rows=256)
        rt._engine.model = replace(rt._engine.model, ops=replace(rt._engine.model.ops, capture=capture))
        return rt

    captured, single = generate(runtime(capture)), generate(runtime(None))
    assert repeated  # of the last one, the steps after some rows had left
    for one, two in zip(captured, single, strict=True):
        for a, b in zip(one.branches, two.branches, strict=True):
            assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_in_the_process_with_torchs_threads():
    out = python(
        """
        import os, re, torch
        from icon2_rt.ops import native
        for n in (1, 3, 2):
            torch.set_num_threads(n)
            assert native.extension.max_threads() == n, (n, native.extension.max_threads())
        x, weight = torch.randn(4, 512), torch.randn(4096, 512)
        native.linear(x, weight)
        before = len(os.listdir("/proc/self/task"))
        torch.mm(torch.randn(512, 512), torch.randn(512, 512))
        (torch.randn(1 << 20) + 1).sum()
        native.linear(x, weight)
        print(before, len(os.listdir("/proc/self/task")))
        maps = open("/proc/self/maps").read()
        print(*sorted(set(re.findall(r"\\S*/lib(?:gomp|omp|iomp5)[^/\\s]*", maps))), sep="\\n")
        """,
        OMP_NUM_THREADS="2",
    )
    counts, *runtimes = out.splitlines()
    before, after = map(int, counts.split())
    assert before == after  # torch's work came after ours and brought no threads of its own
    assert len(runtimes) == 1 and "/torch/lib/" in runtimes[0]


def test_threads_do_not_change_a_byte():
    torch.manual_seed(0)
    x, weight, bias, scale = torch.randn(5, 512), torch.randn(4099, 512), torch.randn(4099), torch.randn(4099)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert native.extension.max_threads() == threads
            h = native.linear(x, weight, bias)
            h, g = native.add_steer_rmsnorm(h, h, scale, 1e-6)
            found.append(native.silu_mul(torch.cat((g, h, h, g), dim=0).view(10, -1)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_what_is_built():
    assert native.extension.instruction_sets()[0] == "portable"
    assert (
        native.extension.instruction_set() in native.extension.instruction_sets()
        and native.extension.instruction_set() != "avx512"
    )
    with pytest.raises(ValueError, match="is not one of"):
        native.extension.use_instruction_set("mmx")
    assert native.extension.build == "cpu" or native.extension.build.startswith("cpu+cuda (sm_80")
