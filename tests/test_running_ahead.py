"""Fixed buffers, and a device that is some steps ahead of the host: what comes out is what the exact way gives.

On a GPU a step is a graph over fixed buffers. All of that but the graph itself runs here, with the reference ops: seats
that are taken and left, overshoot that is trimmed, settings that change in place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from icon2_rt import Direction, Runtime, Steering
from icon2_rt.engine import batch as engine_batch
from icon2_rt.engine.batch import Manner
from icon2_rt.engine.graphs import buckets
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_qwen3, tiny_tokenizer

PAGE = 8
A, B = (Direction(f"d{seed}", random_vectors(4, 48, seed=seed), torch.ones(4)) for seed in range(2))
BRANCHES: list[Steering | None] = [None, 3.0 * A[1:], (-2.0 * A + 1.0 * B[2:]).with_scope("generated"), B[2].ablated()]
MANNERS = [Manner(fixed=True, behind=n) for n in (0, 3)]
PROMPTS = random_prompts([1, 2, PAGE, 3 * PAGE + 2, 40, 5, 17], seed=1)


def runtime(manner: Manner | None = None, build: Any = tiny_llama, **options: Any) -> Runtime:
    options = {"page_size": PAGE, "split_pages": 2, "prefill_chunk": 16, "device": "cpu", "max_rows": 8, **options}
    rt = Runtime(build(), tiny_tokenizer(), backend="reference", **options)
    if manner is not None:
        rt._engine._manner = manner
    return rt


@pytest.fixture(params=MANNERS, ids=lambda m: f"behind{m.behind}")
def manner(request) -> Manner:
    return request.param


def same(got: list, expected: list) -> None:
    assert [o.index for o in got] == [o.index for o in expected]
    for one, two in zip(got, expected, strict=True):
        for a, b in zip(one.branches, two.branches, strict=True):
            assert (a.token_ids, a.text, a.finish_reason, a.seed) == (b.token_ids, b.text, b.finish_reason, b.seed)
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
        {"temperature": 1.5, "top_k": 0, "eos_token_id": list(range(12)), "min_new_tokens": 4},
        {"temperature": 1.5, "top_k": 0, "stop_strings": ["e", "on", " "]},
    ],
    ids=["greedy", "filters", "eos", "stop-strings"],
)
@pytest.mark.parametrize("scope", ["as they are", "all"])
def test_a_device_that_is_ahead_changes_nothing(manner, options, scope):
    branches = BRANCHES if scope != "all" else [None if b is None else b.with_scope("all") for b in BRANCHES]
    expected = runtime().generate_branches(PROMPTS, branches, seed=4, max_new_tokens=23, **options)
    rt = runtime(manner)
    pages = rt.free_kv_pages
    same(rt.generate_branches(PROMPTS, branches, seed=4, max_new_tokens=23, **options), expected)
    assert rt.free_kv_pages == pages
    # The same buffers again, with whatever the first call left in them.
    same(rt.generate_branches(PROMPTS, branches, seed=4, max_new_tokens=23, **options), expected)
    assert len(rt._engine._batches) == 1


def test_a_group_larger_than_the_seats_gets_larger_buffers(manner):
    branches = [0.3 * n * A for n in range(11)]
    options = {"temperature": 1.0, "top_k": 0, "seed": 1, "max_new_tokens": 9}
    same(
        runtime(manner).generate_branches(PROMPTS[:3], branches, **options),
        runtime().generate_branches(PROMPTS[:3], branches, **options),
    )


def test_many_short_rows_take_each_others_seats(manner):
    prompts = random_prompts([3 + n % 19 for n in range(40)], seed=5)
    options = {"temperature": 1.5, "top_k": 0, "seed": 2, "max_new_tokens": 21, "eos_token_id": list(range(16))}
    expected = runtime(build=tiny_qwen3).generate_branches(prompts, [None, 2.0 * A], **options)
    same(runtime(manner, tiny_qwen3, kv_memory=None).generate_branches(prompts, [None, 2.0 * A], **options), expected)


def test_calls_that_nest_do_not_share_buffers(manner):
    rt = runtime(manner)
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = [
        pair.positive.token_ids
        for pair in runtime().generate_pairs(PROMPTS, positive=1.0 * A, negative=-1.0 * A, **options)
    ]
    got = {}
    for pair in rt.stream_pairs(PROMPTS, positive=1.0 * A, negative=-1.0 * A, **options):
        got[pair.index] = pair.positive.token_ids
        assert rt.generate(PROMPTS[:1], 1.0 * A, **options)[0].token_ids == expected[0]
    assert [got[n] for n in range(len(PROMPTS))] == expected
    assert len(rt._engine._batches) == 2


def test_a_stream_that_is_dropped_gives_everything_back(manner):
    rt = runtime(manner)
    pages = rt.free_kv_pages
    options = {"do_sample": False, "max_new_tokens": 12}
    stream = rt.stream_pairs(PROMPTS, positive=1.0 * A, negative=-1.0 * A, **options)
    next(stream)
    stream.close()
    assert rt.free_kv_pages == pages
    assert not bool(rt._engine._batches[0].buffers.state.running.any())
    expected = runtime().generate_branches(PROMPTS, [1.0 * A, -1.0 * A], **options)
    same(rt.generate_branches(PROMPTS, [1.0 * A, -1.0 * A], **options), expected)


def test_every_buffer_keeps_its_address_and_size(manner):
    """What a graph has captured is an address: joins, other strengths, other samplings only change what is there."""
    rt = runtime(manner)
    rt.generate(PROMPTS[:2], do_sample=False, max_new_tokens=3)
    batch = rt._engine._batches[0]

    def addresses() -> list[tuple[int, tuple[int, ...]]]:
        parts = [batch.buffers.state, batch.buffers.items, batch.buffers.steering, batch.buffers.sampling]
        tensors = [batch.buffers.tables, *(t for part in parts for t in vars(part).values())]
        return [(t.data_ptr(), tuple(t.shape)) for t in tensors if isinstance(t, torch.Tensor)]

    before = addresses()
    assert len(before) > 25
    rt.generate_branches(PROMPTS, BRANCHES, temperature=0.7, top_p=0.5, seed=0, max_new_tokens=30)
    rt.generate(PROMPTS, [7.0 * B[n % 4 :] for n in range(len(PROMPTS))], repetition_penalty=1.5, max_new_tokens=20)
    assert rt._engine._batches == [batch]
    assert addresses() == before


def test_a_seat_that_nobody_has_writes_nothing(manner):
    """KV memory outside the pages of the rows that run: a canary."""
    rt = runtime(manner, kv_memory="1MiB")
    kv = rt._engine.kv
    rt.generate(PROMPTS[:3], 1.0 * A, do_sample=False, max_new_tokens=10)  # its buffers stay behind, full of old rows
    used: set[int] = set()
    allocate = kv.allocate
    kv.allocate = lambda n: used.update(pages := allocate(n)) or pages
    kv.k.fill_(7.0)
    kv.v.fill_(7.0)
    rt.generate(PROMPTS[:3], [None, 1.0 * A, 1.0 * B], do_sample=False, max_new_tokens=10)  # 3 rows in a bucket of 4
    others = [page for page in range(kv.n_pages) if page not in used]
    assert used
    assert others
    assert bool((kv.k[:, others] == 7.0).all())
    assert bool((kv.v[:, others] == 7.0).all())


@pytest.mark.parametrize("ends", [{"stop_strings": ["e", "on", " "]}, {"eos_token_id": list(range(12))}])
def test_a_seat_that_a_row_has_left_does_not_run(manner, ends):
    """Its pages may be somebody else's by then. Of a stop string the device learns only from the host."""
    rt = runtime(manner)
    rt.generate(PROMPTS[:1], do_sample=False, max_new_tokens=2, **ends)
    batch = rt._engine._batches[0]
    launch, left = batch.launch, []

    def watched() -> None:
        seats = [n for n in range(8) if n >= len(batch.rows) or batch.rows[n] is None]
        left.append(len(seats))
        assert not bool(batch.buffers.state.running[seats].any())
        launch()

    batch.launch = watched
    found = rt.generate(PROMPTS, temperature=1.5, top_k=0, seed=4, max_new_tokens=23, **ends)
    assert len({len(c.token_ids) for c in found}) > 2
    assert len(set(left)) > 3


def test_a_layout_is_made_anew_before_it_ends(manner):
    """Nobody joins or leaves for longer than attention items are laid out ahead."""
    prompts, steps = PROMPTS[2:4], 2 * engine_batch.HORIZON + 5
    options = {"do_sample": False, "max_new_tokens": steps}
    same(
        runtime(manner).generate_branches(prompts, [1.0 * A], **options),
        runtime().generate_branches(prompts, [1.0 * A], **options),
    )


def test_rows_end_in_buckets_and_close_ranks(manner, monkeypatch):
    """One row outlives seven: the steps shrink to its bucket once what is under way has come back."""
    rt = runtime(manner)
    widths: list[int] = []
    step = engine_batch.decode_step
    monkeypatch.setattr(
        engine_batch,
        "decode_step",
        lambda m, kv, inputs: widths.append(len(inputs.state.tokens)) or step(m, kv, inputs),
    )
    # The last seat's row is the longest: the prompt itself decides, through max_length.
    prompts = random_prompts([30] * 7 + [2], seed=3)
    expected = runtime().generate(prompts, do_sample=False, max_length=40)
    widths.clear()
    got = rt.generate(prompts, do_sample=False, max_length=40)
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]
    assert set(widths) <= set(buckets(8))
    assert widths[0] == 8
    assert widths[-1] == 1
    assert len(widths) == 38


def test_buckets_reach_every_number_of_rows():
    for seats in (1, 2, 3, 7, 8, 64, 65, 200, 256, 300, 1000):
        sizes = buckets(seats)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == seats
        assert sizes[0] == 1


def test_attention_workspace_bounds_what_runs_at_once(manner):
    """Places for partial results are counted before a group is let in, as pages are."""
    rt = runtime(manner)
    options = {"do_sample": False, "max_new_tokens": 20}
    expected = runtime().generate(PROMPTS, **options)
    rt.generate(PROMPTS[:1], **options)
    batch = rt._engine._batches[0]
    batch.sizes = replace(batch.sizes, partials=5)
    most = 0
    launch = batch.launch

    def counted() -> None:
        nonlocal most
        most = max(most, 5 - batch.free_partials)
        launch()

    batch.launch = counted
    taken = rt._engine._take_batch
    rt._engine._take_batch = lambda requests: rt._engine._batches.pop() if requests else taken(requests)
    assert [c.token_ids for c in rt.generate(PROMPTS, **options)] == [c.token_ids for c in expected]
    assert 3 <= most <= 5
