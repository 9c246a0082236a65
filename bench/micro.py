"""The cases of the micro benchmarks: every op at the shapes of real models, with the bytes it has to move.

Each case holds several sets of arguments and goes through them in turn, so that what is larger than the caches is
measured from memory, as in a decode step, and not from a weight that was read a moment ago. A step's own activations
are small and are found in the cache there too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.seats import attention_items
from bench.shapes import SHAPES
from icon2_rt.engine.bank import DirectionBank
from icon2_rt.models import DecoderSpec
from icon2_rt.ops import Ops, RowSampling, RowState, available, native_cuda, rotary, select
from icon2_rt.steering import Direction, compile_steering

# As many sets of arguments as make this many bytes (far more than a cache has), but no more than so many sets.
ROTATE_BYTES = 256 * 2**20
MOST_SETS = 64

SPECS = {
    "tiny": DecoderSpec("llama", 6, 128, 4, 2, 32, 384, 1024, 1024, None, 1e-6, 1.0, False),
    **SHAPES,
}


@dataclass(frozen=True)
class Bench:
    """What is measured on a device: the models and numbers of rows, and (pairs, prompt tokens) for attention."""

    device: torch.device
    dtype: torch.dtype
    models: tuple[str, ...]
    rows: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]
    page_size: int
    split_pages: int

    @cached_property
    def ops(self) -> Ops:
        return select("triton" if self.device.type == "cuda" else "auto", self.device)

    @cached_property
    def native(self) -> Ops | None:
        """CUDA C++ beside them, in the same run; None where it is not built."""
        here = self.device.type == "cuda" and available(self.device)["native"] is None
        return select("native", self.device) if here else None


CPU = Bench(torch.device("cpu"), torch.float32, ("tiny", "random100m"), (2, 16, 64), ((1, 192), (8, 192)), 32, 4)
GPU = Bench(
    torch.device("cuda"), torch.bfloat16, ("llama3-8b", "qwen2-7b", "qwen2-1.5b"), (2, 16, 64, 256, 4096),
    ((8, 2048), (32, 2048), (8, 8192), (128, 2048), (1, 2048), (8, 256)), 32, 4,
)  # fmt: skip
HERE = GPU if torch.cuda.is_available() else CPU
# 4096 rows are a prefill's, where only these ops see all of them.
PREFILL_OPS = ("add_rmsnorm", "add_steer_rmsnorm", "rope_append", "silu_mul")


@dataclass(frozen=True)
class Case:
    """One op (its name in :class:`icon2_rt.ops.Ops`) at one shape. ``n_bytes``: what it reads and writes at least, once
    each."""

    name: str
    model: str
    rows: int
    op: str
    function: Callable[..., Any]
    arguments: list[tuple[Any, ...]]
    n_bytes: int

    def calls(self) -> Callable[[], Any]:
        """A function that runs the op on the next set of arguments at each call."""
        turn = cycle(self.arguments)
        return lambda: self.function(*next(turn))


@dataclass(frozen=True)
class Subject:
    """What a case is made for."""

    bench: Bench
    model: str
    rows: int

    @property
    def spec(self) -> DecoderSpec:
        return SPECS[self.model]

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.bench.device).manual_seed(self.rows)

    def rand(self, *shape: int) -> Tensor:
        drawn = torch.empty(shape, device=self.bench.device, dtype=self.bench.dtype)
        return drawn.normal_(generator=self.generator)

    def case(self, name: str, op: str, make: Callable[[], tuple[Any, ...]], n_bytes: int) -> Case:
        """``make``: one more set of arguments."""
        n_sets = min(MOST_SETS, max(1, ROTATE_BYTES // n_bytes))
        arguments = [make() for _ in range(n_sets)]
        return Case(name, self.model, self.rows, op, getattr(self.bench.ops, op), arguments, n_bytes)


def add_rmsnorm(s: Subject) -> Case:
    hidden = s.spec.hidden_size
    row = s.rows * hidden * s.bench.dtype.itemsize
    make = lambda: (s.rand(s.rows, hidden), s.rand(s.rows, hidden), s.rand(hidden), 1e-6)  # noqa: E731
    return s.case("add_rmsnorm", "add_steer_rmsnorm", make, 4 * row)


def add_steer_rmsnorm(s: Subject) -> Case:
    """Half of the rows pushed one way, half the other, by one direction: a batch of pairs."""
    hidden, n_layers = s.spec.hidden_size, s.spec.n_layers
    bank = DirectionBank(2, 1, n_layers, hidden, s.bench.device)
    d = Direction("d", s.rand(n_layers, hidden).float().cpu())
    sides = [compile_steering(alpha * d, n_layers, hidden) for alpha in (0.1, -0.05)]
    bank.pin(sides)
    chosen = bank.row_steering(sides * (s.rows // 2))
    row = s.rows * hidden * s.bench.dtype.itemsize
    make = lambda: (s.rand(s.rows, hidden), s.rand(s.rows, hidden), s.rand(hidden), 1e-6, chosen, 1)  # noqa: E731
    return s.case("add_steer_rmsnorm", "add_steer_rmsnorm", make, 4 * row + 4 * hidden)


def silu_mul(s: Subject) -> Case:
    ffn = s.spec.intermediate_size
    make = lambda: (s.rand(s.rows, 2 * ffn),)  # noqa: E731
    return s.case("silu_mul", "silu_mul", make, 3 * s.rows * ffn * s.bench.dtype.itemsize)


def rope_append(s: Subject) -> Case:
    spec, d, size = s.spec, s.spec.head_dim, s.bench.page_size
    heads = spec.n_heads + 2 * spec.n_kv_heads
    device = s.bench.device
    inv_freq = 1e4 ** -(torch.arange(0, d, 2, device=device) / d)
    cos, sin = rotary(torch.arange(s.rows, device=device), inv_freq, 1.0, s.bench.dtype)
    n_pages = -(-s.rows // size)
    slots = torch.arange(s.rows, device=device)

    def make() -> tuple[Any, ...]:
        pages = (n_pages, size, spec.n_kv_heads, d)
        return s.rand(s.rows, heads * d), cos, sin, None, None, 1e-6, s.rand(*pages), s.rand(*pages), slots

    moved = 2 * s.rows * heads * d * s.bench.dtype.itemsize
    return s.case("rope_append", "rope_append", make, moved)


def linear(name: str) -> Callable[[Subject], Case]:
    def build(s: Subject) -> Case:
        spec = s.spec
        heads = spec.n_heads + 2 * spec.n_kv_heads
        n_out, n_in = {
            "qkv": (heads * spec.head_dim, spec.hidden_size),
            "gate_up": (2 * spec.intermediate_size, spec.hidden_size),
            "down": (spec.hidden_size, spec.intermediate_size),
            "lm_head": (spec.vocab_size, spec.hidden_size),
        }[name]
        moved = s.bench.dtype.itemsize * (n_out * n_in + s.rows * (n_in + n_out))
        return s.case(f"linear_{name}", "linear", lambda: (s.rand(s.rows, n_in), s.rand(n_out, n_in)), moved)

    return build


def sample(s: Subject, how: dict[str, Any], name: str, spread: float = 1.0) -> Case:
    device, vocab, rows = s.bench.device, s.spec.vocab_size, s.rows
    settings = dict.fromkeys(
        ("sampled", "seeds", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seen", "min_tokens")
    )
    none = torch.full((rows, 1), -1, dtype=torch.int32, device=device)
    budget = torch.full((rows,), 2**30, dtype=torch.int32, device=device)
    sampling = RowSampling(**{**settings, **how}, eos=none, budget=budget)

    def make() -> tuple[Any, ...]:
        def per_row(dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        state = RowState(
            tokens=per_row(torch.int64), positions=per_row(torch.int32), generated=per_row(torch.int32),
            running=torch.ones(rows, dtype=torch.bool, device=device), logprobs=per_row(torch.float32),
        )  # fmt: skip
        return spread * s.rand(rows, vocab), sampling, state

    return s.case(name, "sample", make, rows * vocab * s.bench.dtype.itemsize)


def sample_greedy(s: Subject) -> Case:
    return sample(s, {}, "sample_greedy")


def drawing(s: Subject, **more: Any) -> dict[str, Any]:
    device, rows = s.bench.device, s.rows
    return {
        "sampled": torch.ones(rows, dtype=torch.bool, device=device),
        "seeds": torch.arange(2 * rows, device=device).view(rows, 2),
        "temperature": torch.full((rows,), 0.8, device=device),
        **more,
    }


def sample_draw(s: Subject) -> Case:
    return sample(s, drawing(s), "sample_draw")


def sample_top_p(s: Subject) -> Case:
    """Over random logits, which are flat: three quarters of the vocabulary are kept."""
    return sample(s, drawing(s, top_p=torch.full((s.rows,), 0.95, device=s.bench.device)), "sample_top_p")


def sample_top_p_peaked(s: Subject) -> Case:
    """As a model is: some dozens of tokens are kept."""
    how = drawing(s, top_p=torch.full((s.rows,), 0.95, device=s.bench.device))
    return sample(s, how, "sample_top_p_peaked", spread=6.0)


def native(build: Callable[[Subject], Case]) -> Callable[[Subject], Case]:
    """The same case by the CUDA C++ op, to stand beside Triton's or torch's."""

    def build_native(s: Subject) -> Case:
        assert s.bench.native is not None
        case = build(s)
        return replace(case, name=f"native_{case.name}", function=getattr(s.bench.native, case.op))

    return build_native


CASES: dict[str, Callable[[Subject], Case]] = {
    "add_rmsnorm": add_rmsnorm,
    "add_steer_rmsnorm": add_steer_rmsnorm,
    "silu_mul": silu_mul,
    "rope_append": rope_append,
    **{f"linear_{name}": linear(name) for name in ("qkv", "gate_up", "down", "lm_head")},
    "sample_greedy": sample_greedy,
    "sample_draw": sample_draw,
    "sample_top_p": sample_top_p,
    "sample_top_p_peaked": sample_top_p_peaked,
}
NATIVE_CASES = {
    f"native_{name}": native(build) for name, build in CASES.items() if name.startswith(("linear", "sample"))
}
if HERE.native is not None:
    CASES |= NATIVE_CASES
MOST_ROWS = {name: native_cuda.FEW_ROWS for name in NATIVE_CASES if name.startswith("native_linear")}


def attention(bench: Bench, model: str, pairs: int, prompt: int) -> Case:
    """Pairs over prompts that each pair's rows share, 64 tokens on."""
    spec, size = SPECS[model], bench.page_size
    s = Subject(bench, model, 2 * pairs)
    items, n_pages, read = attention_items(spec, pairs, 2, prompt, 64, size, bench.split_pages, bench.device)
    shape = (n_pages, size, spec.n_kv_heads, spec.head_dim)
    q = s.rand(s.rows, spec.n_heads, spec.head_dim)
    scale = spec.head_dim**-0.5
    moved = 2 * read * spec.n_kv_heads * spec.head_dim * bench.dtype.itemsize
    make = lambda: (q, s.rand(*shape), s.rand(*shape), items, scale, 0)  # noqa: E731
    return s.case(f"attention_{prompt}", "grouped_decode_attention", make, moved)


def copy(bench: Bench) -> Case:
    """The device copy that every GB/s is read beside: a buffer far larger than the caches, read and written."""
    source = _large(bench)
    target = torch.empty_like(source)
    return Case("device_copy", "-", 0, "copy", target.copy_, [(source,)], 2 * source.numel() * source.element_size())


def read(bench: Bench) -> Case:
    """The same buffer read alone, as attention reads KV: its sum."""
    source = _large(bench).view(torch.float32)
    return Case("device_read", "-", 0, "read", torch.sum, [(source,)], source.numel() * source.element_size())


def _large(bench: Bench) -> Tensor:
    if bench.device.type == "cpu":  # numpy's ones: torch's would touch every page twice
        return torch.from_numpy(np.ones(ROTATE_BYTES // 4, dtype=np.float32))
    return torch.empty(2**30, dtype=torch.uint8, device=bench.device).random_()
