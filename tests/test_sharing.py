"""Branches share what is valid to share, and nobody can tell: groups equal separate calls, a row is itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from icon2_rt import Completion, Direction, Runtime, Steering
from tests import hooks
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_tokenizer

PAGE = 8
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 14}
LENGTHS = [1, 2, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 2]
PROMPTS = random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return Runtime(tiny_llama(), page_size=PAGE, split_pages=2, prefill_chunk=16, device="cpu")


@pytest.fixture(scope="module")
def oracle():
    return tiny_llama()


def direction(seed: int) -> Direction:
    return Direction(f"d{seed}", random_vectors(4, 48, seed=seed), torch.ones(4))


A, B = direction(0), direction(1)


def ladder(k: int, scope: str = "response") -> list[Steering | None]:
    """K steerings: none, then strengths of both signs that begin at different blocks."""
    graded = [(i % 5 - 2.5) * 2.0 * A[i % 4 :] + (0.5 * i) * B[-1] for i in range(1, k)]
    return [None, *(s.with_scope(scope) for s in graded)]


def assert_same(got: Completion, expected: Completion, *, atol: float = 1e-4) -> None:
    assert got.token_ids == expected.token_ids
    assert (got.seed, got.finish_reason, got.text) == (expected.seed, expected.finish_reason, expected.text)
    torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(expected.logprobs), atol=atol, rtol=0)


@pytest.mark.parametrize("scope", ["response", "generated", "all"])
@pytest.mark.parametrize("k", [1, 2, 3, 20])
def test_k_branches_are_k_separate_calls(rt, k, scope):
    steerings = ladder(k, scope)
    outputs = rt.generate_branches(PROMPTS, steerings, seed=3, **SAMPLED)
    assert [o.index for o in outputs] == list(range(len(PROMPTS)))
    assert [o.prompt for o in outputs] == PROMPTS
    for branch, steering in enumerate(steerings):
        seeds = [o.branches[branch].seed for o in outputs]
        for output, alone in zip(outputs, rt.generate(PROMPTS, steering, seed=seeds, **SAMPLED), strict=True):
            assert_same(output.branches[branch], alone)


@pytest.mark.parametrize("scope", ["response", "generated", "all"])
def test_every_branch_is_the_oracles(rt, oracle, scope):
    steerings = [None, 5.0 * A, -5.0 * A[2:], B.ablated(), 4.0 * B[-1]]
    steerings = [s and s.with_scope(scope) for s in steerings]
    for output in rt.generate_branches(PROMPTS, steerings, do_sample=False, max_new_tokens=14):
        for steering, branch in zip(steerings, output.branches, strict=True):
            assert branch.token_ids == hooks.greedy(oracle, output.prompt, 14, steering, branch.token_ids).token_ids


def test_branches_of_mixed_scopes_are_the_oracles(rt, oracle):
    steerings = [
        (5.0 * A).with_scope("all"),
        (5.0 * A).with_scope("response"),
        (5.0 * A).with_scope("generated"),
        None,
        (5.0 * A).with_scope("all"),
        (5.0 * A[:2] - 3.0 * B[2:]).with_scope("all"),
        (5.0 * A[:2] + 3.0 * B[3]).with_scope("all").with_keep_norm(),
    ]
    for output in rt.generate_branches(PROMPTS, steerings, do_sample=False, max_new_tokens=14):
        for steering, branch in zip(steerings, output.branches, strict=True):
            assert branch.token_ids == hooks.greedy(oracle, output.prompt, 14, steering, branch.token_ids).token_ids


def test_steerings_of_scope_all_that_part_at_every_possible_block(rt, oracle):
    """l* from the first block to the last, and two branches that never part."""
    common = 4.0 * A[0]
    for fork in range(4):
        one, two = (common + c * B[fork:] for c in (2.0, -3.0))
        steerings = [s.with_scope("all") for s in (one, two, one)]
        for output in rt.generate_branches(PROMPTS[3:], steerings, do_sample=False, max_new_tokens=8):
            for steering, branch in zip(steerings, output.branches, strict=True):
                assert branch.token_ids == hooks.greedy(oracle, output.prompt, 8, steering, branch.token_ids).token_ids
    same = [common.with_scope("all")] * 3
    for output in rt.generate_branches(PROMPTS[3:], same, do_sample=False, max_new_tokens=8):
        expected = hooks.greedy(oracle, output.prompt, 8, same[0], output.branches[0].token_ids).token_ids
        assert [b.token_ids for b in output.branches] == [expected] * 3


def test_a_row_alone_is_the_same_row_in_any_batch(rt):
    steerings = [
        5.0 * A,
        None,
        -4.0 * B[1:],
        (3.0 * A).with_scope("all"),
        A.ablated(),
        (6.0 * B).with_scope("generated"),
    ]
    batch = rt.generate(PROMPTS, steerings, seed=1, **SAMPLED)
    for prompt, steering, completion in zip(PROMPTS, steerings, batch, strict=True):
        assert_same(rt.generate([prompt], steering, seed=[completion.seed], **SAMPLED)[0], completion)


def test_the_order_of_a_batch_does_not_matter(rt):
    order = [4, 0, 5, 2, 1, 3]
    steerings = [5.0 * A, None, -4.0 * B[1:], (3.0 * A).with_scope("all"), A.ablated(), None]
    straight = rt.generate(PROMPTS, steerings, seed=1, **SAMPLED)
    seeds = [straight[i].seed for i in order]
    shuffled = rt.generate([PROMPTS[i] for i in order], [steerings[i] for i in order], seed=seeds, **SAMPLED)
    for i, completion in zip(order, shuffled, strict=True):
        assert_same(completion, straight[i])


def test_the_same_call_twice_gives_the_same_bytes(rt):
    one = rt.generate_branches(PROMPTS, ladder(3), seed=1, **SAMPLED)
    rt.generate(random_prompts([30, 3], seed=8), 4.0 * B, seed=0, **SAMPLED)  # other work in between
    assert rt.generate_branches(PROMPTS, ladder(3), seed=1, **SAMPLED) == one


def test_rows_that_finish_early_leave_the_others_alone(rt):
    free = rt.generate_branches(PROMPTS, ladder(3), seed=2, **SAMPLED)
    eos = [free[0].branches[0].token_ids[1], free[3].branches[2].token_ids[4], free[5].branches[1].token_ids[7]]
    reasons = set()
    for before, after in zip(
        free, rt.generate_branches(PROMPTS, ladder(3), seed=2, eos_token_id=eos, **SAMPLED), strict=True
    ):
        for one, two in zip(before.branches, after.branches, strict=True):
            ends = [i for i, t in enumerate(one.token_ids) if t in eos]
            assert two.token_ids == one.token_ids[: ends[0] + 1 if ends else None]
            reasons.add(two.finish_reason)
    assert reasons == {"eos", "length"}


def test_branches_per_prompt(rt):
    """A branch given as a list has a steering of its own for every prompt."""
    own = [None, 5.0 * A, -5.0 * A, B.ablated(), 2.0 * B, (3.0 * A).with_scope("all")]
    outputs = rt.generate_branches(PROMPTS, [own, None, 4.0 * A], seed=4, **SAMPLED)
    first = rt.generate(PROMPTS, own, seed=[o.branches[0].seed for o in outputs], **SAMPLED)
    third = rt.generate(PROMPTS, 4.0 * A, seed=[o.branches[2].seed for o in outputs], **SAMPLED)
    for output, one, three in zip(outputs, first, third, strict=True):
        assert_same(output.branches[0], one)
        assert_same(output.branches[2], three)


def test_pairs_are_two_branches(rt):
    pairs = rt.generate_pairs(PROMPTS, positive=5.0 * A, negative=-3.0 * A, seed=6, **SAMPLED)
    outputs = rt.generate_branches(PROMPTS, [5.0 * A, -3.0 * A], seed=6, **SAMPLED)
    for pair, output in zip(pairs, outputs, strict=True):
        assert (pair.index, pair.prompt) == (output.index, output.prompt)
        assert [pair.positive, pair.negative] == output.branches
    own = [5.0 * A if i % 2 else 4.0 * B for i in range(len(PROMPTS))]
    for pair, output in zip(
        rt.generate_pairs(PROMPTS, positive=own, negative=None, seed=6, **SAMPLED),
        rt.generate_branches(PROMPTS, [own, None], seed=6, **SAMPLED),
        strict=True,
    ):
        assert [pair.positive, pair.negative] == output.branches


def test_one_prompt_many_times(rt):
    """Equal prompts are still separate requests with their own noise."""
    outputs = rt.generate([PROMPTS[5]] * 5, seed=0, **SAMPLED)
    assert len({tuple(c.token_ids) for c in outputs}) == 5
    greedy = rt.generate([PROMPTS[5]] * 5, do_sample=False, max_new_tokens=10)
    assert len({tuple(c.token_ids) for c in greedy}) == 1


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_gives_every_pair_once(rt):
    prompts = random_prompts([3, 20, 1, 9, 30, 2, 8, 8, 17, 5], seed=5)
    options = {**SAMPLED, "seed": 6, "eos_token_id": list(range(20))}
    expected = rt.generate_pairs(prompts, positive=5.0 * A, negative=-3.0 * A, **options)
    streamed = list(rt.stream_pairs(prompts, positive=5.0 * A, negative=-3.0 * A, **options))
    assert sorted(p.index for p in streamed) == list(range(len(prompts)))
    assert sorted(streamed, key=lambda p: p.index) == expected


def test_a_stream_comes_in_the_order_of_completion():
    """Two rows at a time: the short first pair is out before the long one that started beside it."""
    rt = Runtime(tiny_llama(), page_size=PAGE, max_rows=4, device="cpu")
    prompts = random_prompts([4] * 8, seed=5)
    free = rt.generate_pairs(prompts, positive=5.0 * A, negative=None, do_sample=False, max_new_tokens=40)
    eos = [free[1].positive.token_ids[0], free[1].negative.token_ids[0]]
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": eos}
    streamed = list(rt.stream_pairs(prompts, positive=5.0 * A, negative=None, **options))
    length = {p.index: max(len(p.positive.token_ids), len(p.negative.token_ids)) for p in streamed}
    assert length[1] == 1
    order = [p.index for p in streamed]
    assert length[0] > 1
    assert order.index(1) < order.index(0)
    assert sorted(order) == list(range(8))


def test_a_stream_is_lazy_and_can_be_left(rt):
    free = rt.free_kv_pages
    stream = rt.stream_pairs(PROMPTS, positive=5.0 * A, negative=None, seed=0, **SAMPLED)
    next(stream)
    stream.close()
    assert rt.free_kv_pages == free
    assert len(rt.generate(PROMPTS, seed=0, **SAMPLED)) == len(PROMPTS)


def test_a_stream_checks_its_arguments_at_the_call(rt):
    with pytest.raises(ValueError, match="max_new_tokens"):
        rt.stream_pairs(PROMPTS, positive=5.0 * A, negative=None, max_new_tokens=0)


def test_other_calls_while_a_stream_is_open(rt):
    options = {**SAMPLED, "seed": 6}
    expected = rt.generate_pairs(PROMPTS, positive=5.0 * A, negative=None, **options)
    aside = rt.generate(PROMPTS[:2], -4.0 * B, **options)
    seen = []
    for pair in rt.stream_pairs(PROMPTS, positive=5.0 * A, negative=None, **options):
        seen.append(pair)
        for got, wanted in zip(rt.generate(PROMPTS[:2], -4.0 * B, **options), aside, strict=True):
            assert_same(got, wanted)
    for got, wanted in zip(sorted(seen, key=lambda p: p.index), expected, strict=True):
        assert_same(got.positive, wanted.positive)
        assert_same(got.negative, wanted.negative)


def test_two_streams_side_by_side(rt):
    options = {**SAMPLED, "seed": 6}
    expected = [rt.generate_pairs(PROMPTS, positive=s, negative=None, **options) for s in (5.0 * A, -4.0 * B)]
    streams = [rt.stream_pairs(PROMPTS, positive=s, negative=None, **options) for s in (5.0 * A, -4.0 * B)]
    both = list(zip(*streams, strict=True))
    for side, wanted in enumerate(expected):
        for got, pair in zip(sorted((b[side] for b in both), key=lambda p: p.index), wanted, strict=True):
            assert_same(got.positive, pair.positive)
            assert_same(got.negative, pair.negative)


# --- pinned prefixes -------------------------------------------------------------------------------------------------

HEADS = random_prompts([1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE + 3], seed=9)


@pytest.mark.parametrize("head", HEADS, ids=lambda h: f"{len(h)}-tokens")
def test_continuing_a_prefix_is_the_whole_prompt(rt, head):
    steerings = [5.0 * A, None, (4.0 * B).with_scope("generated"), A.ablated(), None, -3.0 * A[2:]]
    whole = rt.generate([[*head, *p] for p in PROMPTS], steerings, seed=2, **SAMPLED)
    with rt.prefix(head) as prefix:
        for _ in range(2):  # any number of prompts, any number of times
            for got, expected in zip(
                rt.generate(PROMPTS, steerings, prefix=prefix, seed=2, **SAMPLED), whole, strict=True
            ):
                assert_same(got, expected)


def test_a_prefix_serves_branches_states_and_projections(rt):
    head = HEADS[3]
    full = [[*head, *p] for p in PROMPTS]
    with rt.prefix(head) as prefix:
        for got, expected in zip(
            rt.generate_branches(PROMPTS, ladder(3), prefix=prefix, seed=2, **SAMPLED),
            rt.generate_branches(full, ladder(3), seed=2, **SAMPLED),
            strict=True,
        ):
            for one, two in zip(got.branches, expected.branches, strict=True):
                assert_same(one, two)
        torch.testing.assert_close(
            rt.project(PROMPTS, [A, B], prefix=prefix), rt.project(full, [A, B]), atol=1e-3, rtol=1e-4
        )
        torch.testing.assert_close(
            rt.hidden_states(PROMPTS, prefix=prefix), rt.hidden_states(full), atol=1e-4, rtol=1e-4
        )


def test_scope_all_with_a_prefix_steers_the_prefix_too(rt, oracle):
    """The pinned KV is unsteered: it may serve the other rows of the call, and not these."""
    head = HEADS[3]
    steerings = [s and s.with_scope("all") for s in (5.0 * A, None, -4.0 * B[1:], None, A.ablated(), 3.0 * A[-1])]
    with rt.prefix(head) as prefix:
        got = rt.generate(PROMPTS, steerings, prefix=prefix, do_sample=False, max_new_tokens=8)
        mixed = rt.generate_branches(PROMPTS, [steerings, None], prefix=prefix, do_sample=False, max_new_tokens=8)
    for prompt, steering, completion, output in zip(PROMPTS, steerings, got, mixed, strict=True):
        expected = hooks.greedy(oracle, [*head, *prompt], 8, steering, completion.token_ids).token_ids
        assert completion.token_ids == output.branches[0].token_ids == expected
        assert output.branches[1].token_ids == hooks.greedy(oracle, [*head, *prompt], 8).token_ids


def test_a_prefix_is_pinned_until_it_is_left(rt):
    free = rt.free_kv_pages
    with rt.prefix(HEADS[5]) as outer, rt.prefix(HEADS[2]) as inner:
        held = free - rt.free_kv_pages
        assert held > 0
        rt.generate(PROMPTS, prefix=outer, seed=0, **SAMPLED)
        rt.generate(PROMPTS, prefix=inner, seed=0, **SAMPLED)
        assert free - rt.free_kv_pages == held
    assert rt.free_kv_pages == free
    with pytest.raises(RuntimeError, match="prefix"):
        rt.generate(PROMPTS, prefix=outer, seed=0, **SAMPLED)


def test_a_stream_may_outlive_its_prefix_only_if_it_has_begun(rt):
    """One row at a time: the groups that wait hold the prefix's pages, whatever is done meanwhile."""
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = rt.generate([[*HEADS[5], *p] for p in PROMPTS], **options)
    narrow = Runtime(tiny_llama(), page_size=PAGE, max_rows=1, kv_memory="128KiB", device="cpu")
    with narrow.prefix(HEADS[5]) as prefix:
        pages = narrow.kv_pages - narrow.free_kv_pages
        late, begun = (narrow.stream_branches(PROMPTS, [None], prefix=prefix, **options) for _ in range(2))
        got = [next(begun)]
    with pytest.raises(RuntimeError, match="prefix was let go before this stream began"):
        next(late)
    assert narrow.kv_pages - narrow.free_kv_pages == pages
    narrow.hidden_states(random_prompts([PAGE * narrow.free_kv_pages]))  # writes every page that is free
    got += begun
    assert [output.index for output in got] == list(range(len(PROMPTS)))
    for output in got:
        assert_same(output.branches[0], expected[output.index])
    assert narrow.free_kv_pages == narrow.kv_pages


def test_a_prefix_of_another_runtime_is_refused(rt):
    other = Runtime(tiny_llama(seed=1), page_size=PAGE, device="cpu")
    with other.prefix(HEADS[2]) as prefix, pytest.raises(ValueError, match="prefix"):
        rt.generate(PROMPTS, prefix=prefix, **SAMPLED)


def test_chats_continue_a_prefix_of_messages():
    rt = Runtime(tiny_llama(), tiny_tokenizer(), page_size=PAGE, device="cpu")
    system = [{"role": "system", "content": "the thing is on"}]
    chats = [[{"role": "user", "content": text}] for text in ("what", "who is in the house?")]
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = rt.generate([[*system, *chat] for chat in chats], **options)
    with rt.prefix(system) as prefix:
        for got, wanted in zip(rt.generate(chats, prefix=prefix, **options), expected, strict=True):
            assert_same(got, wanted)
        for alien in ("text", [5, 6]):
            with pytest.raises(ValueError, match=r"prompts\[1\]"):
                rt.generate([chats[0], alien], prefix=prefix, **options)


def test_text_and_ids_continue_a_prefix_of_text_or_ids():
    rt = Runtime(tiny_llama(), tiny_tokenizer(), page_size=PAGE, device="cpu")
    options = {"do_sample": False, "max_new_tokens": 8}
    ids = rt.encode("<|bos|><|user|>the thing")
    rest = rt.tokenizer.encode("<|end|><|assistant|>in", add_special_tokens=False)
    [expected] = rt.generate([[*ids, *rest]], **options)
    for start in ("<|bos|><|user|>the thing", ids):
        with rt.prefix(start) as prefix:
            for got in rt.generate(["<|end|><|assistant|>in", rest], prefix=prefix, **options):
                assert_same(got, expected)
            with pytest.raises(ValueError, match=r"prompts\[0\]"):
                rt.generate([[{"role": "user", "content": "x"}]], prefix=prefix, **options)
            with pytest.raises(ValueError, match=r"prompts\[1\]"):
                rt.generate([rest, []], prefix=prefix, **options)


def test_a_prefix_that_is_not_one_is_refused(rt):
    for bad in ([1, 2, 3], "the", rt):
        with pytest.raises(TypeError, match="prefix"):
            rt.generate(PROMPTS, prefix=bad, **SAMPLED)
    with pytest.raises(RuntimeError, match="with"):
        rt.generate(PROMPTS, prefix=rt.prefix(HEADS[2]), **SAMPLED)
    for bad in ([], [128], None):
        with pytest.raises((ValueError, TypeError)):
            rt.prefix(bad)
