"""What the tests of the GPU lane share: the device, runtimes on it, and rows that are seated by hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from icon2_rt import Runtime, Steering
from icon2_rt.engine import Branch, Engine, Request, Row, Sampling
from icon2_rt.engine.batch import Batch, Manner
from icon2_rt.ops import Ops, select
from icon2_rt.steering import compile_steering
from tests.models import tiny_llama

ON_GPU = os.environ.get("GPU_LANE_DEVICE") != "cpu"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKEND = "triton" if ON_GPU or os.environ.get("TRITON_INTERPRET") == "1" else "reference"
needs_graphs = pytest.mark.skipif(not ON_GPU, reason="there are no CUDA graphs without a CUDA GPU")
PAGE, SPLIT_PAGES = 16, 2


def ops() -> Ops:
    return select(BACKEND, DEVICE)


def medium_llama(dtype: torch.dtype) -> PreTrainedModel:
    """Hidden 256, 8 query and 2 KV heads of 64: sizes whose loads are 16 bytes wide."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    return tiny_llama(std=0.08, head_dim=64, **sizes).to(dtype)


def runtime(model: PreTrainedModel, **options: Any) -> Runtime:
    """Small pages, so that short prompts have several splits."""
    options = {"page_size": PAGE, "split_pages": SPLIT_PAGES, "prefill_chunk": 64, "kv_memory": "16MiB", **options}
    rt = Runtime(model, device=DEVICE, backend=BACKEND, **options)
    if not ON_GPU:
        rt._engine._manner = Manner(fixed=True, behind=3)
    return rt


def seats(
    engine: Engine,
    tables: Sequence[list[int]],
    prompt: int,
    steerings: Sequence[Steering | None],
    budget: int = 8,
    seed: int | None = None,
) -> list[Row]:
    """One row for each page table, over ``prompt`` positions that are in its pages already."""
    spec = engine.model.spec
    rows = []
    for n, (table, steering) in enumerate(zip(tables, steerings, strict=True)):
        branch = Branch(compile_steering(steering, spec.n_layers, spec.hidden_size), None if seed is None else seed + n)
        sampling = Sampling(do_sample=seed is not None)
        request = Request(n, tuple(k % spec.vocab_size for k in range(prompt)), (branch,), sampling, budget)
        rows.append(Row(request, 0, table, table, spec.n_layers - 1, prompt - 1, (7 * n + 3) % spec.vocab_size))
    return rows


@contextmanager
def held(engine: Engine, rows: Sequence[Row], make: Callable[[Engine, Batch], Batch] | None = None) -> Iterator[Batch]:
    """A batch with ``rows`` in its seats, and the KV memory as it was when they leave."""
    k, v = engine.kv.k.clone(), engine.kv.v.clone()
    pinned = engine.bank.pin(row.request.branches[0].steering for row in rows)
    usual = engine._take_batch([row.request for row in rows])
    batch = usual if make is None else make(engine, usual)
    batch.join(rows)
    try:
        yield batch
    finally:
        batch.clear()
        engine._batches.append(usual)
        engine.bank.unpin(pinned)
        engine.kv.k.copy_(k)
        engine.kv.v.copy_(v)


def steps(batch: Batch, n: int) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities ``[n, rows]`` of ``n`` steps of the rows that sit in the batch."""
    found = []
    for _ in range(n):
        batch.launch()
    while batch.under_way:
        found.append(batch.results())
    tokens = torch.tensor([[token for _, token, _ in step] for step in found])
    logprobs = torch.tensor([[logprob for *_, logprob in step] for step in found], dtype=torch.float64)
    return tokens, logprobs


def decoded(engine: Engine, rows: Sequence[Row], n: int, **how: Any) -> tuple[Tensor, Tensor]:
    with held(engine, rows, **how) as batch:
        return steps(batch, n)


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Bitwise on a GPU. The CPU's matrix products may round differently where they are laid out differently."""
    assert torch.equal(got[0], expected[0])
    if ON_GPU:
        assert torch.equal(got[1], expected[1])
    else:
        torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=0)
