"""KV memory and the schedule: planned, shared, waited for, always given back; and none of it changes a token."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from icon2_rt import Direction, Runtime, Steering
from icon2_rt.engine import engine
from tests import hooks
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_qwen3, tiny_tokenizer

PAGE = 8
PAGE_BYTES = 2 * 4 * 2 * 8 * PAGE * 4  # K and V × blocks × KV heads × head size × positions × fp32
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


def runtime(pages: int, **options: Any) -> Runtime:
    return Runtime(
        tiny_llama(),
        **{"page_size": PAGE, "split_pages": 2, "kv_memory": pages * PAGE_BYTES, "device": "cpu", **options},
    )


def direction(seed: int) -> Direction:
    return Direction(f"d{seed}", random_vectors(4, 48, seed=seed), torch.ones(4))


A, B = direction(0), direction(1)
PROMPTS = random_prompts([5, 17, 1, 30, 8, 9, 2, 24], seed=1)


@pytest.fixture(scope="module")
def oracle():
    return tiny_llama()


@pytest.fixture(scope="module")
def roomy() -> Runtime:
    return runtime(1000)


# --- planning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_memory", "pages"),
    [
        (10 * PAGE_BYTES, 10),
        (11 * PAGE_BYTES - 1, 10),
        ("1MiB", 2**20 // PAGE_BYTES),
        ("0.5 MB", 500_000 // PAGE_BYTES),
        ("64kib", 2**16 // PAGE_BYTES),
    ],
)
def test_kv_memory_becomes_pages(kv_memory, pages):
    rt = Runtime(tiny_llama(), page_size=PAGE, kv_memory=kv_memory, device="cpu")
    assert (rt.kv_pages, rt.free_kv_pages, rt.page_size) == (pages, pages, PAGE)


def test_without_kv_memory_there_is_plenty():
    assert Runtime(tiny_llama(), page_size=PAGE, device="cpu").kv_pages > 1000


def test_half_precision_pages_are_half_as_large():
    rt = Runtime(tiny_llama().bfloat16(), page_size=PAGE, kv_memory=10 * PAGE_BYTES, device="cpu")
    assert rt.kv_pages == 20


# --- refused, waiting ------------------------------------------------------------------------------------------------


def pages_needed(prompt: int, new: int, branches: int, *, versions: int = 1) -> int:
    """Full pages of all prompt tokens but the last, once a version; the rest of the row's life, once a branch."""
    shared = (prompt - 1) // PAGE
    return shared * versions + branches * (-(-(prompt + new - 1) // PAGE) - shared)


def test_sharing_saves_exactly_the_prompts_full_pages(oracle):
    """20 branches of 60 + 12 tokens: 7 + 20 × 2 pages; unshared they would be 180."""
    prompt = random_prompts([60])[0]
    need = pages_needed(60, 12, 20)
    assert need == 47
    steerings: list[Steering | None] = [None, *(c * A for c in range(1, 20))]
    rt = runtime(need)
    [output] = rt.generate_branches([prompt], steerings, **GREEDY)
    for branch, steering in list(zip(output.branches, steerings, strict=True))[::6]:
        assert branch.token_ids == hooks.greedy(oracle, prompt, 12, steering, branch.token_ids).token_ids
    assert rt.free_kv_pages == need
    small = runtime(need - 1)
    with pytest.raises(ValueError, match=rf"(?s)\b{need}\b.*\b{need - 1}\b"):
        small.generate_branches([prompt], steerings, **GREEDY)
    assert small.free_kv_pages == need - 1


def test_pages_of_a_prefix_are_counted_once(oracle):
    """Three pages of the seven that two branches share are the prefix's: they are there already."""
    prompt = random_prompts([60])[0]
    need = pages_needed(60, 12, 2)
    rt = runtime(need)
    with rt.prefix(prompt[:24]) as prefix:
        assert rt.free_kv_pages == need - 3
        [output] = rt.generate_branches([prompt[24:]], [None, 4.0 * A], prefix=prefix, **GREEDY)
    for branch, steering in zip(output.branches, (None, 4.0 * A), strict=True):
        assert branch.token_ids == hooks.greedy(oracle, prompt, 12, steering, branch.token_ids).token_ids
    small = runtime(need - 1)
    with small.prefix(prompt[:24]) as prefix, pytest.raises(ValueError, match=rf"(?s)\b{need}\b.*\b{need - 1}\b"):
        small.generate_branches([prompt[24:]], [None, 4.0 * A], prefix=prefix, **GREEDY)


def test_scope_all_needs_a_version_of_the_later_blocks_for_each_steering(oracle):
    """Two different steerings of the prompt: its pages twice. Equal ones, or ones that part after the last: once."""
    prompt = random_prompts([60])[0]
    for steerings, versions in [
        ([4.0 * A, -4.0 * A], 2),
        ([4.0 * A, -4.0 * A, 4.0 * A], 2),
        ([4.0 * A, 4.0 * A], 1),
        ([4.0 * A, 4.0 * A + 3.0 * B[-1]], 1),
    ]:
        branches = [s.with_scope("all") for s in steerings]
        need = pages_needed(60, 12, len(branches), versions=versions)
        rt = runtime(need)
        [output] = rt.generate_branches([prompt], branches, **GREEDY)
        for branch, steering in zip(output.branches, branches, strict=True):
            assert branch.token_ids == hooks.greedy(oracle, prompt, 12, steering, branch.token_ids).token_ids
        with pytest.raises(ValueError, match=str(need)):
            runtime(need - 1).generate_branches([prompt], branches, **GREEDY)


def test_the_one_that_can_never_fit_is_named_before_anything_is_decoded():
    rt = runtime(6)
    with pytest.raises(ValueError, match=r"(?s)prompt\D{0,2}2.*kv_memory"):
        rt.stream_pairs([PROMPTS[0], PROMPTS[2], PROMPTS[3]], positive=A * 3, negative=None, **GREEDY)
    with pytest.raises(ValueError, match="kv_memory"):
        rt.hidden_states([random_prompts([49])[0]])
    with pytest.raises(ValueError, match="kv_memory"):
        rt.score([random_prompts([30])[0]], [random_prompts([30])[0]])
    with pytest.raises(ValueError, match="kv_memory"), rt.prefix(random_prompts([49])[0]):
        pass
    assert rt.free_kv_pages == 6


@pytest.mark.parametrize("pages", [14, 20, 33])
@pytest.mark.parametrize("scope", ["response", "all"])
def test_groups_wait_for_memory_and_come_out_the_same(roomy, pages, scope):
    steerings = [4.0 * A, None, -5.0 * B[1:]]
    branches = [s and s.with_scope(scope) for s in steerings]
    rt = runtime(pages if scope == "response" else pages + 8)
    total, expected = rt.kv_pages, roomy.generate_branches(PROMPTS, branches, **GREEDY)
    got = rt.generate_branches(PROMPTS, branches, **GREEDY)
    for one, two in zip(got, expected, strict=True):
        assert [b.token_ids for b in one.branches] == [b.token_ids for b in two.branches]
    assert rt.free_kv_pages == total


@pytest.mark.parametrize("max_rows", [1, 2, 3, 5, 7])
def test_max_rows_does_not_change_what_comes_out(roomy, max_rows):
    """Groups of 3: larger than max_rows, equal to it, two or more at a time; of different lengths (eos)."""
    branches = [4.0 * A, None, -5.0 * B[1:]]
    options = {"temperature": 1.0, "top_k": 0, "seed": 3, "max_new_tokens": 16, "eos_token_id": list(range(12))}
    expected = roomy.generate_branches(PROMPTS, branches, **options)
    assert {b.finish_reason for o in expected for b in o.branches} == {"eos", "length"}
    for one, two in zip(
        runtime(200, max_rows=max_rows).generate_branches(PROMPTS, branches, **options), expected, strict=True
    ):
        for got, wanted in zip(one.branches, two.branches, strict=True):
            assert (got.token_ids, got.seed, got.finish_reason) == (wanted.token_ids, wanted.seed, wanted.finish_reason)
            torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(wanted.logprobs), atol=1e-4, rtol=0)


def test_the_steps_of_a_batch_are_as_many_as_its_longest_rows():
    """No row is fed once it is finished, and what waits joins as soon as there is room: counted in rows fed."""
    rt = runtime(400, max_rows=4)
    prompts = random_prompts([6] * 10, seed=3)
    options = {"temperature": 1.5, "top_k": 0, "seed": 1, "max_new_tokens": 30, "eos_token_id": list(range(10))}
    fed = []
    from icon2_rt.engine import batch

    original = batch.Batch.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch.Batch, "launch", lambda self: fed.append(len(self.rows)) or original(self))
        completions = rt.generate(prompts, **options)
    lengths = [len(c.token_ids) for c in completions]
    assert sum(fed) == sum(lengths)
    assert max(fed) == 4
    assert len(fed) <= sum(lengths) / 4 + max(lengths)
    assert len(set(lengths)) > 2


# --- given back ------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_an_interrupt_in_the_middle_gives_every_page_back():
    rt = runtime(60)
    from icon2_rt.engine import batch, items, prefill

    expected = rt.generate_branches(PROMPTS, [None, (3.0 * A).with_scope("all")], **GREEDY)
    for owner, name, calls in [
        (batch.Batch, "launch", 5),
        (batch.Batch, "launch", 1),
        (batch.Batch, "join", 1),
        (items.ItemPlanner, "_versions_of", 1),
        (items.ItemPlanner, "_make", 2),
        (prefill, "_run_pack", 1),
    ]:
        original, left = getattr(owner, name), [calls]

        def interrupted(*args: Any, original: Any = original, left: list[int] = left, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Stop
            return original(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(Stop):
                rt.generate_branches(PROMPTS, [None, (3.0 * A).with_scope("all")], **GREEDY)
        assert rt.free_kv_pages == 60
        assert rt.generate_branches(PROMPTS, [None, (3.0 * A).with_scope("all")], **GREEDY) == expected


def test_an_error_before_the_rows_sit_gives_the_pages_of_all_their_groups_back(monkeypatch):
    rt = Runtime(tiny_llama(), tiny_tokenizer(), page_size=PAGE, kv_memory=60 * PAGE_BYTES, device="cpu")

    def broken(*args: Any) -> None:
        raise Stop

    monkeypatch.setattr(engine, "StopText", broken)
    with pytest.raises(Stop):
        rt.generate(PROMPTS[:4], stop_strings=["x"], **GREEDY)
    assert rt.free_kv_pages == 60


def test_an_error_while_reading_or_scoring_gives_every_page_back():
    rt = runtime(60)
    from icon2_rt.engine import prefill

    def broken(*args: Any, **kwargs: Any) -> None:
        raise Stop

    calls = [
        lambda: rt.hidden_states(PROMPTS),
        lambda: rt.project(PROMPTS, [A]),
        lambda: rt.score(PROMPTS, [[1, 2]] * len(PROMPTS), 0.1 * A),
        lambda: rt.prefix(PROMPTS[3]).__enter__(),
    ]
    for call in calls:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prefill, "_run_pack", broken)
            with pytest.raises(Stop):
                call()
        assert rt.free_kv_pages == 60


def test_a_decoder_that_fails_in_the_middle_gives_every_page_back():
    tokenizer = tiny_tokenizer()
    rt = Runtime(tiny_llama(), tokenizer, page_size=PAGE, kv_memory=60 * PAGE_BYTES, device="cpu")
    left = [7]

    def decode(*args: Any, **kwargs: Any) -> str:
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "decode", decode)
        with pytest.raises(Stop):
            rt.generate(PROMPTS[:4], stop_strings=["x"], **GREEDY)
    assert rt.free_kv_pages == 60


def test_a_stream_left_at_any_moment_gives_every_page_back():
    rt = runtime(30)
    for taken in range(len(PROMPTS) + 1):
        stream = rt.stream_pairs(PROMPTS, positive=3.0 * A, negative=(2.0 * B).with_scope("all"), **GREEDY)
        for _ in range(taken):
            next(stream)
        stream.close()
        assert rt.free_kv_pages == 30
    forgotten = rt.stream_pairs(PROMPTS, positive=3.0 * A, negative=None, **GREEDY)
    next(forgotten)
    del forgotten
    assert rt.free_kv_pages == 30


def test_pages_held_by_a_stream_or_a_prefix_are_named_when_they_are_missed(roomy):
    rt = runtime(14)
    short, other, long = PROMPTS[1], PROMPTS[7], random_prompts([70])[0]
    eos = roomy.generate([short], **GREEDY)[0].token_ids[0]
    stream = rt.stream_pairs([short, other], positive=None, negative=None, eos_token_id=eos, **GREEDY)
    assert next(stream).index == 0  # over at once; the other pair goes on and holds its pages
    assert 0 < rt.free_kv_pages < 14
    with pytest.raises(RuntimeError, match="stream"):
        rt.generate([long], **GREEDY)
    with pytest.raises(RuntimeError, match="stream"):
        rt.hidden_states([random_prompts([96])[0]])
    [last] = stream  # the stream itself goes on
    assert last.positive.token_ids == roomy.generate([other], **GREEDY)[0].token_ids
    with rt.prefix(random_prompts([30])[0]), pytest.raises(RuntimeError, match="prefix"):
        rt.generate([long], **GREEDY)
    assert len(rt.generate([long], **GREEDY)[0].token_ids) == 12


def test_directions_of_an_open_stream_are_not_overwritten(oracle):
    rt = runtime(200, max_directions=2, max_rows=2)
    stream = rt.stream_pairs(PROMPTS, positive=4.0 * A, negative=None, **GREEDY)
    pairs = [next(stream)]
    for seed in range(10, 14):
        rt.generate(PROMPTS[:1], 4.0 * direction(seed), **GREEDY)
    with pytest.raises(ValueError, match="max_directions"):
        rt.generate(PROMPTS[:2], [4.0 * B, 4.0 * direction(9)], **GREEDY)
    pairs += list(stream)
    for pair in pairs:
        assert (
            pair.positive.token_ids == hooks.greedy(oracle, pair.prompt, 12, 4.0 * A, pair.positive.token_ids).token_ids
        )
    rt.generate(PROMPTS[:2], [4.0 * B, 4.0 * direction(9)], **GREEDY)


def test_what_a_page_held_before_does_not_matter():
    """Large finite garbage in every page between calls: bitwise the same results."""
    rt = runtime(80)
    branches = [4.0 * A, None, (-5.0 * B[1:]).with_scope("all")]

    def everything():
        return (
            rt.generate_branches(PROMPTS, branches, **GREEDY),
            rt.score(PROMPTS, [[1, 2, 3]] * len(PROMPTS), 2.0 * A),
            rt.hidden_states(PROMPTS).tolist(),
        )

    expected = everything()
    for garbage in (1e4, -3e3):
        rt._engine.kv.k.fill_(garbage)
        rt._engine.kv.v.fill_(garbage)
        assert everything() == expected


# --- everything at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", range(10))
def test_random_shapes_against_the_oracle(trial):
    """Random sizes of everything, random steerings and scopes per row; greedy tokens as the oracle's."""
    rng = random.Random(trial)
    build = rng.choice([tiny_llama, tiny_qwen3])
    oracle = build(num_hidden_layers=3)
    page_size = rng.choice([1, 2, 4, 7, 16])
    rt = Runtime(
        build(num_hidden_layers=3),
        page_size=page_size,
        split_pages=rng.choice([1, 2, 3]),
        prefill_chunk=rng.choice([1, 5, 16, 64]),
        max_rows=rng.choice([1, 3, 8, 64]),
        kv_memory=f"{rng.choice([700, 1000, 4000])}kib",
        device="cpu",
    )
    new = rng.choice([1, 5, 9])
    directions = [Direction(f"r{i}", random_vectors(3, 48, seed=50 + i), torch.ones(3)) for i in range(4)]

    def steering() -> Steering | None:
        kind = rng.randrange(6)
        if kind == 0:
            return None
        d, e = rng.sample(directions, 2)
        low = rng.randrange(3)
        made = {
            1: lambda: rng.uniform(-6, 6) * d[low:],
            2: lambda: d[low:].ablated() + e.ablated(),
            3: lambda: d[: low + 1].clamped(rng.uniform(-5, 5)) + rng.uniform(-4, 4) * e[low],
            4: lambda: (rng.uniform(-6, 6) * d + rng.uniform(-6, 6) * e[low]).with_keep_norm(),
            5: lambda: e[low].amplified(rng.uniform(-2, 2)),
        }[kind]()
        # With room for one token no generated token is fed, and a steering of those alone is refused.
        return made.with_scope(rng.choice(["response", "generated" if new > 1 else "response", "all"]))

    n = rng.choice([1, 3, 5])
    prompts = random_prompts(
        [rng.choice([1, 2, page_size, page_size + 1, 3 * page_size + 2, 13, 40]) for _ in range(n)]
    )
    k = rng.choice([1, 2, 4, 18 if n == 1 else 3])
    branches = [[steering() for _ in range(n)] for _ in range(k)]
    for output in rt.generate_branches(prompts, branches, do_sample=False, max_new_tokens=new):
        for row, branch in zip(branches, output.branches, strict=True):
            expected = hooks.greedy(oracle, output.prompt, new, row[output.index], branch.token_ids)
            assert branch.token_ids == expected.token_ids
            torch.testing.assert_close(
                torch.tensor(branch.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0
            )
    assert rt.free_kv_pages == rt.kv_pages
