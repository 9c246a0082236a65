"""Every launch that the engine makes, as it makes it, against the reference on the same arguments: views of buffers
that are wider and longer, seats that nobody has, items beyond the count, rows that end while others go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.check import copied, poisoned, tensors
from icon2_rt import Direction, Runtime, Steering
from icon2_rt.engine.batch import Batch, BatchSizes, Manner
from icon2_rt.engine.step import decode_step
from icon2_rt.ops import Ops, triton_ops
from tests.losses import no_worse
from tests.models import random_prompts, random_vectors, tiny_qwen3

REFERENCE = Ops("reference")
KERNELS = ("begin_step", "add_steer_rmsnorm", "rope_append", "grouped_decode_attention", "silu_mul", "sample")
PAGE = 16


@dataclass
class Judge:
    """The Triton ops, each call of which is held against the reference.

    Attributes:
        calls: of each op. shapes: facts about the arguments that were met.
        running: the rows that run in the present step; what the kernels leave in the others' places is nothing.
    """

    calls: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    running: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))

    def ops(self) -> Ops:
        ops = triton_ops()
        return replace(ops, **{name: self._judged(name, getattr(ops, name)) for name in KERNELS})

    def _judged(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        reference = getattr(REFERENCE, name)

        def call(*args: Any) -> Any:
            self._look(name, args)
            as_it_is, in_fp32 = copied(args, upcast=False), copied(args, upcast=True)
            with poisoned():
                out = kernel(*args)
            expected, exact = reference(*as_it_is), reference(*in_fp32)
            for three in zip(
                tensors((out, args)), tensors((expected, as_it_is)), tensors((exact, in_fp32)), strict=True
            ):
                self._compare(name, *three)
            self.calls[name] += 1
            return out

        return call

    def _look(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "begin_step":
            state, items = args[0], args[5]
            self.running = state.running.clone()
            self.shapes["empty seats"] += int((~state.running).sum())
            self.shapes["nobody runs"] += int(not state.running.any())
            self.shapes["items beyond the count"] += int(items.count < len(items.rows))
        self.shapes["parts of wider buffers"] += sum(not x.is_contiguous() for x in tensors(args))
        self.shapes["parts of longer buffers"] += sum(
            x.untyped_storage().nbytes() > x.numel() * x.element_size() for x in tensors(args)
        )

    def _compare(self, name: str, out: Tensor, expected: Tensor, exact: Tensor) -> None:
        if out.ndim and len(out) == len(self.running) and name not in ("begin_step", "sample"):
            out, expected, exact = out[self.running], expected[self.running], exact[self.running]
        if not out.is_floating_point():
            assert torch.equal(out, expected), name
            return
        # Pages that nobody has written hold anything, and the same in all three.
        no_worse(*(x.nan_to_num(0.0) for x in (out, expected, exact)), differ=1.0 if "attention" in name else 0.02)


def judged(dtype: torch.dtype) -> tuple[Runtime, Judge]:
    judge = Judge()
    rt = Runtime(
        tiny_qwen3().to(dtype), backend="triton", device="cpu", page_size=PAGE, split_pages=2, max_rows=8,
        prefill_chunk=32, kv_memory="1MiB",
    )  # fmt: skip
    rt._engine.model = replace(rt._engine.model, ops=judge.ops())
    rt._engine._manner = Manner(fixed=True, behind=2)
    return rt, judge


def test_each_is_right() -> None:
    rt, judge = judged(torch.bfloat16)
    a, b = (Direction(f"d{seed}", random_vectors(4, 48, seed=seed)) for seed in range(2))
    rows: list[Steering | None] = [(2.0 * a[1:]).with_scope("all"), None, (a.ablated() - 3.0 * b).with_keep_norm()]
    prompts = random_prompts([1, 2 * PAGE + 5], seed=2)
    done = rt.generate_branches(
        prompts, rows, max_new_tokens=4, temperature=1.1, top_k=30, top_p=0.9, repetition_penalty=1.2,
        eos_token_id=list(range(6)), seed=5,
    )  # fmt: skip
    assert [len(each.branches) for each in done] == [3, 3]
    assert all(judge.calls[name] > 0 for name in KERNELS)
    assert judge.shapes["empty seats"] > 0
    assert judge.shapes["items beyond the count"] > 0
    assert judge.shapes["parts of longer buffers"] > 0


def test_a_step_that_nobody_is_in_writes_nothing() -> None:
    """As a graph is warmed up and captured: every seat empty."""
    rt, judge = judged(torch.bfloat16)
    engine = rt._engine
    sizes = BatchSizes(seats=4, partials=64, eos=4, terms=4, split_pages=engine.options.split_pages)
    batch = Batch(engine.model, engine.kv, engine.bank, sizes, Manner(fixed=True))
    inputs = batch._views(4)
    before = [x.clone() for x in tensors((inputs.state, inputs.sampling, engine.kv.k, engine.kv.v))]
    decode_step(engine.model, engine.kv, inputs)
    for now, then in zip(tensors((inputs.state, inputs.sampling, engine.kv.k, engine.kv.v)), before, strict=True):
        assert torch.equal(now, then) or now.isnan().any()
    assert judge.shapes["nobody runs"] == 1
    assert all(judge.calls[name] > 0 for name in KERNELS)


def test_a_wrong_element_is_seen() -> None:
    """One element of one launch, off by a hundredth."""
    rt, _ = judged(torch.float32)
    judge = Judge()

    def nearly(gate_up: Tensor) -> Tensor:
        out = REFERENCE.silu_mul(gate_up)
        out[0, 0] += 0.01 * out.norm()
        return out

    rt._engine.model = replace(rt._engine.model, ops=replace(judge.ops(), silu_mul=judge._judged("silu_mul", nearly)))
    with pytest.raises(AssertionError):
        rt.generate(random_prompts([3]), max_new_tokens=2, do_sample=False)
