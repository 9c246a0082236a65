"""A device that runs out of memory costs speed and a warning, not the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from icon2_rt import Direction, Runtime
from icon2_rt.engine import Engine, EngineOptions, prefill
from icon2_rt.ops import Ops
from tests.models import random_prompts, random_vectors, tiny_llama

A = Direction("a", random_vectors(4, 48, seed=0))
PROMPTS = random_prompts([70, 3, 33, 9, 50], seed=1)


def runtime() -> Runtime:
    return Runtime(tiny_llama(), device="cpu", page_size=8, split_pages=2, prefill_chunk=64)


def of_at_most(tokens: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Let a prefill pass of more tokens than that fail half way; returns the sizes that were tried."""
    run, tried = prefill._run_pack, []

    def limited(model: Any, kv: Any, bank: Any, jobs: Any, pieces: Any, *rest: Any) -> Any:
        tried.append(sum(end - start for _, start, end in pieces))
        if tried[-1] > tokens:
            run(
                model, kv, bank, jobs, pieces, rest[0], rest[1], False, *rest[3:]
            )  # pages are written, states are shown
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(model, kv, bank, jobs, pieces, *rest)

    patch.setattr(prefill, "_run_pack", limited)
    return tried


CALLS = {
    "generate": lambda rt: [
        [b.token_ids for b in o.branches]
        for o in rt.generate_branches(
            PROMPTS, [None, (2.0 * A[1:]).with_scope("all")], do_sample=False, max_new_tokens=6
        )
    ],
    "hidden_states": lambda rt: rt.hidden_states(PROMPTS),
    "score": lambda rt: [s.logprobs for s in rt.score(PROMPTS, [[1, 2, 3, 4] * 9] * 5)],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_prefill_pass_that_does_not_fit_is_repeated_in_smaller_ones(name, monkeypatch):
    expected = CALLS[name](runtime())
    tried = of_at_most(20, monkeypatch)
    with pytest.warns(UserWarning, match="passes of 16 are tried.*prefill_chunk="):
        got = CALLS[name](runtime())
    assert max(tried) > 32
    assert tried[-1] <= 16
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    elif name == "score":
        for one, two in zip(got, expected, strict=True):
            assert one == pytest.approx(two, abs=1e-4)
    else:
        assert got == expected


@pytest.mark.filterwarnings("ignore:no memory for a prefill pass")
def test_what_fits_in_no_pass_is_an_error_that_gives_every_page_back(monkeypatch):
    rt = runtime()
    pages = rt.free_kv_pages
    of_at_most(4, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        rt.generate(PROMPTS, do_sample=False, max_new_tokens=4)
    assert rt.free_kv_pages == pages


def test_a_model_with_more_heads_than_the_kernels_tile_is_refused_before_it_runs():
    rt = Runtime(tiny_llama(num_attention_heads=24, num_key_value_heads=1, head_dim=8), device="cpu")
    model = replace(rt._engine.model, ops=Ops("triton", fixed=True))
    with pytest.raises(ValueError, match=r"24 query heads for each KV head.*backend='reference'"):
        Engine(model, EngineOptions())
