"""Decode steps under CUDA graphs: what must not change a row, to the last bit, and what must."""

from __future__ import annotations

import pytest
import torch

from bench.roofline import LAUNCHES_AROUND, LAUNCHES_PER_BLOCK
from bench.sanitize import kernel_names
from bench.seats import without_steering
from icon2_rt import Direction, Runtime
from icon2_rt.engine import graphs as engine_graphs
from icon2_rt.engine.batch import Manner
from tests.gpu.lane import DEVICE, PAGE, decoded, held, medium_llama, needs_graphs, runtime, same, seats, steps
from tests.models import random_prompts, random_vectors, tiny_llama

PROMPT = 5 * PAGE + 3  # two whole splits, and a third one that is going on
N_PAGES = 7


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def rt(request) -> Runtime:
    made = runtime(medium_llama(request.param), max_rows=8)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for pages in (made._engine.kv.k, made._engine.kv.v):
        pages.normal_(generator=generator)
    return made


@pytest.fixture(scope="module")
def d(rt) -> Direction:
    return Direction("d", random_vectors(rt.spec.n_layers, rt.spec.hidden_size, seed=0), torch.ones(rt.spec.n_layers))


def own_tables(n: int) -> list[list[int]]:
    """Pages of ``n`` rows that have nothing in common, 0 left out."""
    return [list(range(1 + row * N_PAGES, 1 + (row + 1) * N_PAGES)) for row in range(n)]


def test_unsteered_rows_and_zero_are_the_engine_without_steering(rt, d):
    engine, tables = rt._engine, own_tables(6)
    plain = decoded(engine, seats(engine, tables, PROMPT, [None] * 6), 6, make=without_steering)
    mixed = [None, 0.0 * d, 3.0 * d, d.ablated(), None, (2.0 * d).with_keep_norm()]
    for steerings in ([None] * 6, [0.0 * d] * 6):
        same(decoded(engine, seats(engine, tables, PROMPT, steerings), 6), plain)
    tokens, logprobs = decoded(engine, seats(engine, tables, PROMPT, mixed), 6)
    quiet, loud = [0, 1, 4], [2, 3, 5]
    same((tokens[:, quiet], logprobs[:, quiet]), (plain[0][:, quiet], plain[1][:, quiet]))
    assert not (logprobs[0, loud] == plain[1][0, loud]).any()


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_shared_pages_and_copies_of_them_give_the_same(rt, d, rows):
    engine, copies = rt._engine, own_tables(rows)
    shared = PROMPT // PAGE  # full pages; the one that rows write is their own anyway
    together = [copies[0][:shared] + table[shared:] for table in copies]
    steerings = [None, *(0.3 * n * d for n in range(1, rows))]
    for table in copies[1:]:
        engine.kv.copy(copies[0][:shared], table[:shared])
    expected = decoded(engine, seats(engine, copies, PROMPT, steerings), 6)
    same(decoded(engine, seats(engine, together, PROMPT, steerings), 6), expected)
    assert len(set(map(tuple, expected[1].T.tolist()))) == rows  # they are different rows


def test_a_row_is_the_same_alone_and_in_company(rt, d):
    """Within a bucket: the matrix products have the same shape, and everything else is the row's own."""
    engine, tables = rt._engine, own_tables(8)
    steerings = [0.5 * n * d for n in range(8)]
    tokens, logprobs = decoded(engine, seats(engine, tables, PROMPT, steerings), 6)
    rows = seats(engine, tables, PROMPT, steerings)
    with held(engine, rows) as batch:
        for row in rows[:7]:
            row.finish = "stop_string"  # an end that the device does not see by itself
        batch.leave(rows[:7])
        alone = steps(batch, 6)
    same(alone, (tokens[:, 7:], logprobs[:, 7:]))


def test_the_same_again_gives_the_same(rt, d):
    engine, tables = rt._engine, own_tables(8)
    steerings = [0.5 * n * d for n in range(8)]
    first, second = (decoded(engine, seats(engine, tables, PROMPT, steerings, seed=3), 8) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_directions_read_from_the_bank_are_the_rows_own(rt):
    """As many distinct steerings as rows: each row is as it is beside nobody but itself."""
    engine, tables = rt._engine, own_tables(8)
    sizes = (rt.spec.n_layers, rt.spec.hidden_size)
    steerings = [3.0 * Direction(f"d{n}", random_vectors(*sizes, seed=n)) for n in range(8)]
    tokens, logprobs = decoded(engine, seats(engine, tables, PROMPT, steerings), 6)
    for n in (0, 3, 7):
        others = [steerings[n] if k == n else None for k in range(8)]
        one = decoded(engine, seats(engine, tables, PROMPT, others), 6)
        same((one[0][:, n], one[1][:, n]), (tokens[:, n], logprobs[:, n]))


@needs_graphs
def test_a_graph_gives_what_its_step_gives(rt, d):
    engine, tables = rt._engine, own_tables(5)
    rows = [None, 1.0 * d, -1.0 * d, 2.0 * d[1:], d.ablated()]
    expected = decoded(engine, seats(engine, tables, PROMPT, rows), 6)
    manner, batches = engine._manner, engine._batches
    engine._manner, engine._batches = Manner(fixed=True, behind=manner.behind, graphs=False), []
    try:
        same(decoded(engine, seats(engine, tables, PROMPT, rows), 6), expected)
    finally:
        engine._manner, engine._batches = manner, batches


@needs_graphs
def test_a_step_in_steady_state_never_waits(rt, d):
    engine = rt._engine
    with held(engine, seats(engine, own_tables(4), PROMPT, [1.0 * d] * 4)) as batch:
        batch.launch()  # lays out steering and items
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert torch.cuda.get_sync_debug_mode() == 2  # a wait raises
            for _ in range(3):
                batch.launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_graphs
def test_a_step_is_no_more_launches_than_are_counted_on(rt, d):
    engine = rt._engine
    with held(engine, seats(engine, own_tables(4), PROMPT, [1.0 * d] * 4)) as batch:
        batch.launch()
        torch.cuda.synchronize()
        assert batch._graphs is not None and 4 in batch._graphs._graphs
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            batch._graphs.run(4, batch._run)
            torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    kernels = [name for name in kernels if not name.startswith(("Memcpy", "Memset"))]
    ours = [name for name in kernels if name in kernel_names()]
    n_layers, products = rt.spec.n_layers, 4
    assert ours
    assert len(ours) <= (LAUNCHES_PER_BLOCK - products) * n_layers + LAUNCHES_AROUND - 2, ours
    # A product of few rows may be split, and then it is two launches.
    assert len(kernels) - len(ours) <= 2 * products * n_layers + 3, kernels


def test_changed_strengths_take_effect_without_a_capture(d, rt, monkeypatch):
    """Strengths, directions, sampling and who sits where are contents of buffers."""
    prompts = random_prompts([5, 40, 17])
    options = {"do_sample": False, "max_new_tokens": 12}
    rt.generate(prompts, 1.0 * d, **options)
    batch = rt._engine._batches[0]

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a graph was captured")

    monkeypatch.setattr(engine_graphs.StepGraphs, "__init__", refuse)
    found = [rt.generate(prompts, alpha * d, **options) for alpha in (0.0, 4.0, 12.0)]
    other = Direction("other", random_vectors(rt.spec.n_layers, rt.spec.hidden_size, seed=9))
    found.append(rt.generate(prompts, 12.0 * other, **options))
    found.append(rt.generate(prompts, 12.0 * other, temperature=1.5, top_k=5, seed=1, max_new_tokens=12))
    assert batch in rt._engine._batches
    logprobs = [tuple(tuple(c.logprobs) for c in completions) for completions in found]
    assert len(set(logprobs)) == len(found)
    assert [c.logprobs for c in found[0]] == [c.logprobs for c in rt.generate(prompts, None, **options)]


def test_padding_rows_leave_the_canary_alone():
    """Three rows in a bucket of four, beside seats that rows had and left: no other page changes."""
    rt = runtime(tiny_llama().to(torch.bfloat16), max_rows=8)
    kv = rt._engine.kv
    prompts, options = random_prompts([3, 20, 50]), {"do_sample": False, "max_new_tokens": 10}
    rt.generate(random_prompts([30] * 8), **options)
    used: set[int] = set()
    allocate = kv.allocate
    kv.allocate = lambda n: used.update(pages := allocate(n)) or pages
    kv.k.fill_(7.0)
    kv.v.fill_(7.0)
    rt.generate(prompts, **options)
    others = sorted(set(range(kv.n_pages)) - used)
    assert used
    assert others
    assert bool((kv.k[:, others] == 7.0).all())
    assert bool((kv.v[:, others] == 7.0).all())
