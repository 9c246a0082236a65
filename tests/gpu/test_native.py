"""The CUDA C++ ops: against the reference, each row by itself, and in a graph.

In a dry run on a CPU the reference stands in their place, which shows that the tests are right.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.check import compare
from icon2_rt.ops import Ops, RowSampling, RowState, native_cuda
from tests.gpu.lane import DEVICE, ON_GPU, needs_graphs
from tests.gpu.test_kernels import REFERENCE, SPECS, TOLERANCE, Draw, right, state

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


@pytest.fixture(scope="module")
def native() -> Ops:
    if not ON_GPU:
        return REFERENCE
    if (why_not := native_cuda.why_not(DEVICE)) is not None:
        pytest.skip(f"no CUDA C++ here: {why_not}")
    return Ops("native", linear=native_cuda.linear, sample=native_cuda.sample)


@HALVES
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16])
@pytest.mark.parametrize("name", ["llama3-8b", "qwen2-7b", "qwen2-1.5b", "dry"])
def test_linear(native, name, rows, dtype):
    spec, draw = SPECS[name], Draw(dtype)
    heads = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
    for n_in, n_out in [
        (spec.hidden_size, heads),
        (spec.hidden_size, 2 * spec.intermediate_size),
        (spec.intermediate_size, spec.hidden_size),
        (8 * 129, 131),
    ]:
        arguments = (draw(rows, n_in), draw(n_out, n_in), draw(n_out))
        right(compare(native.linear, REFERENCE.linear, arguments), dtype)


@HALVES
def test_a_row_of_linear_is_its_own(native, dtype):
    draw = Draw(dtype)
    x, weight = draw(16, 4096), draw(1000, 4096)
    together = native.linear(x, weight)
    for rows in (1, 2, 7, 8, 9, 15):
        alone = native.linear(x[:rows], weight)
        if ON_GPU:
            assert torch.equal(alone, together[:rows])
        else:
            torch.testing.assert_close(alone, together[:rows], atol=0.5, rtol=TOLERANCE[dtype])


def test_the_residual_is_added_before_the_rounding(native):
    if not ON_GPU:
        pytest.skip("the reference op has no residual")
    draw = Draw(torch.bfloat16)
    x, weight, residual = draw(3, 256), draw(72, 256), draw(3, 72)
    expected = (x.double() @ weight.double().T + residual.double()).bfloat16()
    got = native_cuda.skinny_linear(x, weight, None, residual)
    torch.testing.assert_close(got, expected, atol=0.02, rtol=1e-2)


def settings(rows: int, vocab: int) -> RowSampling:
    def column(values: list[float], of: torch.dtype) -> Tensor:
        return torch.tensor([values[n % len(values)] for n in range(rows)], dtype=of, device=DEVICE)

    return RowSampling(
        sampled=column([True, True, True, False], torch.bool),
        seeds=torch.arange(2 * rows, device=DEVICE).view(rows, 2) * 1_000_003,
        temperature=column([0.7, 1.0, 1.5], torch.float32),
        top_k=column([vocab, 50, vocab, 1, 5000], torch.int32),
        top_p=column([1.0, 0.9, 0.5, 1.0], torch.float32),
        min_p=column([0.0, 0.0, 0.02], torch.float32),
        repetition_penalty=column([1.0, 1.3], torch.float32),
        seen=torch.zeros(rows, vocab, dtype=torch.bool, device=DEVICE),
        eos=torch.full((rows, 1), -1, dtype=torch.int32, device=DEVICE),
        min_tokens=column([0, 100], torch.int32),
        budget=torch.full((rows,), 1 << 30, dtype=torch.int32, device=DEVICE),
    )


def run(ops: Ops, logits: Tensor, how: RowSampling, rows: int, steps: int = 1) -> RowState:
    rows_state = state(rows)
    assert how.seen is not None
    how = replace(how, seen=how.seen.clone())
    for _ in range(steps):
        ops.sample(logits, how, rows_state)
    return rows_state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0], ids=["flat", "middling", "peaked"])
@pytest.mark.parametrize("vocab", [975, 128256, 152064])
def test_sample(native, vocab, spread, dtype):
    rows, draw = 12, Draw(dtype)
    logits, how = spread * draw(rows, vocab), settings(rows, vocab)
    ours, theirs = run(native, logits, how, rows, 3), run(REFERENCE, logits, how, rows, 3)
    for name in ("tokens", "positions", "generated", "running"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-5)


def test_a_row_of_sample_is_its_own(native):
    rows, vocab, draw = 12, 128256, Draw(torch.bfloat16)
    logits, how = 3 * draw(rows, vocab), settings(rows, vocab)
    together = run(native, logits, how, rows)
    for row in (0, 1, 5, 11):
        one = {name: value[row : row + 1].contiguous() for name, value in vars(how).items() if value is not None}
        alone = state(1)
        alone.generated.fill_(row)
        native.sample(logits[row : row + 1], replace(how, **one), alone)
        assert alone.tokens[0] == together.tokens[row] and alone.logprobs[0] == together.logprobs[row]


@needs_graphs
def test_ten_thousand_replays_give_the_same_tokens(native):
    """A product whose parts are merged by whoever is last, and the tokens that follow from it."""
    rows, vocab, draw = 2, 32000, Draw(torch.bfloat16)
    x, weight, down = draw(rows, 4096) / 8, draw(vocab, 512) / 8, draw(512, 4096) / 8
    how, row_state = settings(rows, vocab), state(rows)
    began = [getattr(row_state, name).clone() for name in ("tokens", "positions", "generated", "running", "logprobs")]

    def step() -> None:
        for name, value in zip(("tokens", "positions", "generated", "running", "logprobs"), began, strict=True):
            getattr(row_state, name).copy_(value)
        native.sample(native.linear(native.linear(x, down), weight), how, row_state)

    step()
    expected = (row_state.tokens.clone(), row_state.logprobs.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    how.seen.zero_()
    with torch.cuda.graph(graph):
        step()
    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(10_000):
        how.seen.zero_()
        graph.replay()
        differ += (row_state.tokens != expected[0]).sum() + (row_state.logprobs != expected[1]).sum()
    assert int(differ) == 0
