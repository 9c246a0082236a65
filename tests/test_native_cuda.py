"""The CUDA kernels where there is no GPU: built by the C++ compiler over an emulator of the machine
(csrc/test/emulate.h), they are held against the references; and what the bound functions refuse before any pointer is
used."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from icon2_rt.ops import RowSampling, RowState, native, native_cuda
from tests.compiler import COMPILER, build
from tests.op_inputs import close, per_row, rand, row_state, run_both, same_state, settings, strided

KERNELS = ("cuda/sample.cu", "cuda/skinny_linear.cu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALVES = [torch.bfloat16, torch.float16]
GUARD, POISON = 256, 0x5A

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = ctypes.CDLL(
        str(build(tmp_path_factory.mktemp("emulated") / "emulated.so", [*KERNELS, "test/emulated.cpp"], "-O2"))
    )
    library.emulated_sample_scratch.restype = library.emulated_linear_scratch.restype = ctypes.c_int64
    library.emulated_sample_scratch.argtypes = [ctypes.c_int64] * 2
    sizes = [ctypes.c_int64] * 3 + [ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p)]
    library.emulated_sample.argtypes = library.emulated_linear.argtypes = sizes
    return library


def pointers(*tensors: Tensor | None) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def guarded(n_bytes: int, fill: int = POISON) -> tuple[Tensor, Tensor]:
    """Memory between guard bytes, at a multiple of 64: all of it, and the part that may be written."""
    buffer = torch.full((GUARD + 64 + n_bytes + GUARD,), POISON, dtype=torch.uint8)
    begin = GUARD + -(buffer.data_ptr() + GUARD) % 64
    inner = buffer[begin : begin + n_bytes]
    inner.fill_(fill)
    return buffer, inner


def intact(buffer: Tensor, inner: Tensor) -> None:
    begin = inner.data_ptr() - buffer.data_ptr()
    assert bool((buffer[:begin] == POISON).all()) and bool((buffer[begin + inner.numel() :] == POISON).all())


# --- sample ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(emulated: ctypes.CDLL) -> Callable[[Tensor, RowSampling, RowState], None]:
    def run(logits: Tensor, how: RowSampling, state: RowState) -> None:
        rows, vocab = logits.shape
        buffer, scratch = guarded(emulated.emulated_sample_scratch(rows, vocab))
        emulated.emulated_sample(
            rows, vocab, how.eos.shape[1], DTYPES[logits.dtype], logits.stride(0),
            pointers(
                logits, how.sampled, how.seeds, how.temperature, how.top_k, how.top_p, how.min_p,
                how.repetition_penalty, how.seen, how.eos, how.min_tokens, how.budget, state.tokens, state.positions,
                state.generated, state.running, state.logprobs, scratch,
            ),
        )  # fmt: skip
        intact(buffer, scratch)

    return run


OPTIONS = [
    {},
    {"temperature": [0.7, 1.0, 1.9]},
    {"top_k": [1, 5, 975, 40, 3000]},
    {"top_p": [0.9, 0.3, 1.0, 0.0, 0.99]},
    {"min_p": [0.0, 0.2, 0.05]},
    {"temperature": [0.8], "top_k": [50, 3], "top_p": [0.95, 0.5], "min_p": [0.02]},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "spread"), [(7, 3.0), (975, 3.0), (4099, 0.5), (20011, 7.0)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "greedy")
def test_sample(sample, vocab, spread, options, dtype):
    """Distributions that are peaked and flat, so that the threshold is found among few candidates and among all."""
    torch.manual_seed(vocab)
    rows = 6
    logits = (spread * strided(rows, vocab, torch.float32)).to(dtype)
    logits[:, 1] = logits[:, 3]  # equal scores share their fate
    fields = {name: per_row(v, rows, torch.int32 if name == "top_k" else torch.float32) for name, v in options.items()}
    mine, theirs, _ = run_both(sample, logits, settings(rows, vocab, **fields), steps=3 if vocab < 100 else 1)
    same_state(mine, theirs)


def test_sample_penalty_early_eos_budget_and_seats(sample):
    torch.manual_seed(0)
    rows, vocab = 11, 301
    logits = 3 * rand(rows, vocab)
    logits[:, 2] += 9  # every row would end at once
    how = settings(
        rows, vocab, temperature=torch.full((rows,), 0.9), top_k=per_row([301, 20], rows, torch.int32),
        repetition_penalty=per_row([1.0, 1.3, 0.7], rows, torch.float32),
        seen=torch.rand(rows, vocab) < 0.3, min_tokens=per_row([0, 5, 9], rows, torch.int32),
    )  # fmt: skip
    how = replace(how, budget=per_row([50, 6, 5], rows, torch.int32))
    mine, theirs, hows = run_both(sample, logits, how, steps=4)
    same_state(mine, theirs)
    assert hows[0].seen is not None and hows[1].seen is not None
    ran = mine.generated > 3
    assert torch.equal(hows[0].seen[ran], hows[1].seen[ran])
    assert not ran.all() and mine.running.any() and not mine.running.all()


def test_a_row_of_sample_is_its_own(sample):
    """The same bytes alone, and beside others, however the threads and blocks take turns."""
    torch.manual_seed(3)
    rows, vocab = 5, 5000
    logits = (2 * rand(rows, vocab)).bfloat16()
    fields = {"temperature": torch.full((rows,), 0.9), "top_p": per_row([0.5, 0.99, 1.0], rows, torch.float32)}
    how = settings(rows, vocab, **fields)
    together = row_state([1] * rows, [True] * rows)
    sample(logits, how, together)
    for row in range(rows):
        one = {k: v[row : row + 1].contiguous() for k, v in vars(how).items() if v is not None}
        alone = row_state([1], [True])
        sample(logits[row : row + 1], replace(how, **one), alone)
        assert alone.tokens == together.tokens[row] and alone.logprobs == together.logprobs[row]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": [1.0]}, {"top_k": [5]}, {"top_p": [0.5]}], ids=str)
def test_sample_shows_logits_that_are_not_finite(sample, options, value):
    logits = rand(2, 300)
    logits[:, 7] = value
    if value == -torch.inf:
        logits[:] = value
    fields = {name: per_row(v, 2, torch.int32 if name == "top_k" else torch.float32) for name, v in options.items()}
    state = row_state([1, 1], [True, True])
    sample(logits, settings(2, 300, **fields), state)
    assert not torch.isfinite(state.logprobs).any()
    assert bool((state.tokens >= 0).all()) and bool((state.tokens < 300).all())


# --- linear ----------------------------------------------------------------------------------------------------------

Linear = Callable[..., Tensor]


@pytest.fixture(scope="module")
def linear(emulated: ctypes.CDLL) -> Linear:
    outer, scratch = guarded(emulated.emulated_linear_scratch(), fill=0)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        (rows, n_in), n_out = x.shape, weight.shape[0]
        buffer, y = guarded(rows * n_out * 2)
        emulated.emulated_linear(
            rows, n_in, n_out, DTYPES[x.dtype], x.stride(0), pointers(x, weight, bias, y, residual, scratch)
        )
        intact(buffer, y)
        intact(outer, scratch)
        return y.view(x.dtype).view(rows, n_out)

    return run


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n_in", "n_out"), [(8, 1), (136, 65), (256, 64), (1032, 131), (2048, 72)])
def test_linear(linear, n_in, n_out, dtype):
    """Tiles that are not full, and inner dimensions that one block reads, or two, or four."""
    torch.manual_seed(n_in)
    weight, bias = rand(n_out, n_in, dtype=dtype), rand(n_out, dtype=dtype)
    x, residual = rand(16, n_in + 8, dtype=dtype)[:, :n_in], rand(16, n_out, dtype=dtype)
    product = x.double() @ weight.double().T
    together = linear(x, weight, bias)
    close(together, (product + bias.double()).to(dtype))
    for rows in (1, 2, 7, 8, 9, 15):
        assert torch.equal(linear(x[:rows], weight, bias), together[:rows])  # a row's bytes are its own
    close(linear(x[:3], weight), product[:3].to(dtype))
    close(linear(x[:9], weight, bias, residual[:9]), (product + bias.double() + residual.double())[:9].to(dtype))


def test_linear_reads_no_weight_beyond_its_end(linear):
    """What lies behind the last row, and behind the rows that there are, is not part of the sum."""
    memory = torch.full((70 * 136,), torch.nan, dtype=torch.bfloat16)
    weight = memory[: 65 * 136].view(65, 136)
    weight.copy_(rand(65, 136))
    x = torch.full((16, 136), torch.nan, dtype=torch.bfloat16)
    x[:3] = rand(3, 136)
    assert torch.isfinite(linear(x[:3], weight)).all()


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels_are_clean(sanitizers: str, tmp_path: Path) -> None:
    """No address outside a buffer, and no two threads at one place without a barrier between them."""
    flags = ("-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    program = build(tmp_path / "check", [*KERNELS, "test/check_cuda.cpp"], *flags)
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=os.environ | options)
    assert done.returncode == 0, done.stderr[-4000:]
    if sanitizers == "thread":  # a checker that sees no race where there is one proves nothing
        planted = subprocess.run([str(program), "planted"], capture_output=True, text=True, env=os.environ | options)
        assert planted.returncode != 0 and "data race" in planted.stderr


# --- the bound functions ---------------------------------------------------------------------------------------------

needs_build = pytest.mark.skipif(
    not hasattr(native.extension, "cuda_linear"), reason="the extension was built without nvcc"
)


@contextmanager
def pretending() -> Iterator[None]:
    """Tensors of the CPU say that they are on CUDA device 0: what is checked behind that can be seen here."""
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    lend = torch.Tensor.__dlpack_c_exchange_api__
    name = api.PyCapsule_GetName(lend)
    words = (ctypes.c_uint64 * 7).from_address(api.PyCapsule_GetPointer(lend, name))
    view_type = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    true_view = view_type(words[5])

    def view(tensor: int, out: int) -> int:
        status = true_view(tensor, out)
        ctypes.c_int32.from_address(out + 8).value = 2  # device_type: kDLCUDA
        return status

    mine = view_type(view)
    changed = (ctypes.c_uint64 * 7)(*words)
    changed[5] = ctypes.cast(mine, ctypes.c_void_p).value
    native.extension.use_exchange(api.PyCapsule_New(ctypes.addressof(changed), name, None))
    try:
        yield
    finally:
        native.extension.use_exchange(lend)


@needs_build
def test_the_cpu_is_refused():
    x, weight = rand(2, 16, dtype=torch.bfloat16), rand(8, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        native_cuda.skinny_linear(x, weight)
    with pytest.raises(ValueError, match="logits must be on a CUDA device"):
        native_cuda.sample(rand(2, 40), settings(2, 40), row_state([1, 1], [True, True]))
    with pytest.raises(ValueError, match="x must be on the CPU"), pretending():
        native.linear(x, weight)


@needs_build
def test_mistakes_are_named_before_anything_is_launched():
    x, weight = rand(2, 16, dtype=torch.bfloat16), rand(8, 16, dtype=torch.bfloat16)
    cases: list[tuple[tuple[Tensor | None, ...], type[Exception], str]] = [
        ((x.float(), weight.float()), TypeError, "x must be bfloat16 or float16, not float32"),
        ((x, weight.half()), TypeError, "weight is float16 and x is bfloat16"),
        ((x, weight[:, :8]), ValueError, r"weight must be \[any, 16\], not \[8, 8\]"),
        ((x[:, :12], weight[:, :12].contiguous()), ValueError, "multiple of 8 columns"),
        ((x.repeat(9, 1), weight), ValueError, "at most 16 rows, not 18"),
        ((rand(2, 17, dtype=x.dtype)[:, :16], weight), ValueError, "rows of x must begin at multiples of 16 bytes"),
        ((x, rand(17, 8, dtype=x.dtype).T[:, :16]), ValueError, r"weight \[8, 16\] must be contiguous"),
        ((x, weight, rand(7, dtype=x.dtype)), ValueError, r"bias must be \[8\], not \[7\]"),
        ((x, weight, None, rand(3, 8, dtype=x.dtype)), ValueError, r"residual must be \[2, 8\], not \[3, 8\]"),
    ]
    with pretending():
        for arguments, error, message in cases:
            with pytest.raises(error, match=message):
                native_cuda.skinny_linear(*arguments)
        y = rand(2, 8, dtype=x.dtype)
        scratch = torch.zeros(native.extension.cuda_linear_scratch // 8, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"scratch must have .* elements, not 3"):
            native.extension.cuda_linear(x, weight, None, None, y, scratch[:3], 0)
        with pytest.raises(ValueError, match="y is written and overlaps residual"):
            native.extension.cuda_linear(x, weight, None, y, y, scratch, 0)
        logits, state = rand(2, 40), row_state([1, 1], [True, True])
        with pytest.raises(ValueError, match=r"the vocabulary must have 1 to 1048576 entries, not 1048577"):
            native_cuda.sample(torch.empty(1, 2**20 + 1), settings(1, 40), row_state([1], [True]))
        with pytest.raises(ValueError, match=r"tokens must be \[2\], not \[1\]"):
            native_cuda.sample(logits, settings(2, 40), replace(state, tokens=state.tokens[:1]))
        with pytest.raises(TypeError, match="top_k must be int32, not int64"):
            native_cuda.sample(logits, settings(2, 40, top_k=torch.ones(2, dtype=torch.int64)), state)
        with pytest.raises(ValueError, match="positions is written and overlaps generated"):
            native_cuda.sample(logits, settings(2, 40), replace(state, positions=state.generated))


@needs_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_launch_without_a_device_says_so():
    x, weight = rand(2, 16, dtype=torch.bfloat16), rand(8, 16, dtype=torch.bfloat16)
    with pretending(), pytest.raises(RuntimeError, match="CUDA: "):
        native_cuda.skinny_linear(x, weight)
    assert "cpu+cuda" in str(native_cuda.why_not(torch.device("cuda:0")))


def test_every_graph_zeroes_scratch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs never count in the same memory, and a replay that was cut short spoils no other."""
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(native_cuda, "extension", SimpleNamespace(cuda_linear_scratch=64))
    monkeypatch.setattr(native_cuda, "_scratch", {})
    made: list[Tensor] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: made.append(zeros(*args, **options)) or made[-1])
    device = torch.device("cuda", 0)
    with FakeTensorMode():
        with native_cuda.one_graph():
            first = [native_cuda._linear_scratch(device, 7) for _ in range(3)]
        with native_cuda.one_graph():
            second = native_cuda._linear_scratch(device, 7)
        foreign = [native_cuda._linear_scratch(device, 7) for _ in range(2)]
        capturing = False
        with native_cuda.one_graph():
            outside = [native_cuda._linear_scratch(device, stream) for stream in (7, 7, 8)]
    assert first[0] is first[1] is first[2]
    assert outside[0] is outside[1]
    different = [first[0], second, *foreign, outside[0], outside[2]]
    assert len({id(tensor) for tensor in different}) == len(made) == 6
    assert all(tensor.shape == (8,) for tensor in made)
