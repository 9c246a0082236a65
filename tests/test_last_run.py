"""What `rt.last_run` says: counted beside the calls that the engine makes, and against forward hooks in transformers.

The counts are arithmetic on the host. Here every call of add_steer_rmsnorm is watched: the rows on which a term has a
strength at that block are what the record must have counted. Where branches share a prompt that is steered alike, or
blocks below a fork, the record counts every row by itself, so each row is decoded alone for comparison.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from icon2_rt import Direction, Fired, LastRun, Runtime, Steering, Term
from icon2_rt.engine import batch as engine_batch
from icon2_rt.engine import prefill
from icon2_rt.engine import record as record_module
from icon2_rt.engine.batch import Batch, Manner
from icon2_rt.engine.record import form_of
from icon2_rt.ops import grouped_decode_attention, native
from icon2_rt.ops import prefill as prefill_ops
from icon2_rt.ops.add_steer_rmsnorm import RowSteering
from icon2_rt.outputs import add_up
from tests import hooks
from tests.models import random_prompts, random_vectors, tiny_llama, tiny_tokenizer

N_LAYERS, HIDDEN, PAGE = 4, 48, 8
A, B, C = (
    Direction(name, random_vectors(N_LAYERS, HIDDEN, seed=n), torch.ones(N_LAYERS)) for n, name in enumerate("abc")
)
PROMPTS = random_prompts([5, 1, 2 * PAGE + 1, 40])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
SAMPLED: dict[str, Any] = {
    "temperature": 1.3,
    "top_k": 0,
    "max_new_tokens": 12,
    "seed": 3,
    "eos_token_id": list(range(30)),
}
MIX = (0.5 * A - 2.0 * B[2:]) + C[1].ablated()
NEEDS_NATIVE = pytest.mark.skipif(native.why_not is not None, reason=str(native.why_not))


def runtime(backend: str = "reference", manner: Manner | None = None, **options: Any) -> Runtime:
    options = {"page_size": PAGE, "split_pages": 2, "prefill_chunk": 16, "device": "cpu", **options}
    rt = Runtime(tiny_llama(), tiny_tokenizer(), backend=backend, **options)
    if manner is not None:
        rt._engine._manner = manner
    return rt


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return runtime()


def last_run(rt: Runtime) -> LastRun:
    found = rt.last_run
    assert found is not None
    return found


@contextmanager
def watched(rt: Runtime) -> Iterator[dict[str, int]]:
    """Count, at the operation itself, the rows and terms with a strength at the block."""
    model = rt._engine.model
    whole = model.ops.add_steer_rmsnorm
    seen = {"total": 0}

    def watch(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, steering: RowSteering | None = None, layer: int = 0
    ):
        if steering is not None:
            which = steering.which[steering.which >= 0].long()
            seen["total"] += int(steering.count[which, layer].sum())
        return whole(x, residual, weight, eps, steering, layer)

    rt._engine.model = replace(model, ops=replace(model.ops, add_steer_rmsnorm=watch))
    batches, rt._engine._batches = rt._engine._batches, []  # they have the ops that they were made with
    try:
        yield seen
    finally:
        rt._engine.model, rt._engine._batches = model, batches


def total(run: LastRun) -> int:
    return sum(fired.total for fired in run.steering)


# --- the counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["length", "early-eos"])
@pytest.mark.parametrize("steering", [0.5 * A, MIX, B[-1:].clamped(1.0), (3.0 * A[1:]).with_keep_norm()], ids=str)
@pytest.mark.parametrize("scope", ["response", "generated", "all"])
def test_the_record_counts_what_the_operation_is_given(rt, scope, steering, options):
    with watched(rt) as seen:
        outputs = rt.generate(PROMPTS, steering.with_scope(scope), **options)
    run = last_run(rt)
    assert total(run) == seen["total"] > 0
    assert (run.call, run.complete, run.rows) == ("generate", True, len(PROMPTS))
    assert run.tokens == sum(len(o.token_ids) for o in outputs)


@pytest.mark.parametrize(
    "branches",
    [
        [None, MIX, -0.5 * A, B.ablated().with_scope("generated")],
        [(0.5 * A).with_scope("all"), (-0.5 * A).with_scope("all"), None],
        [(MIX).with_scope("all"), (MIX).with_scope("all"), (MIX + 0.1 * B[3]).with_scope("all")],
        [A[3].ablated().with_scope("all"), (2.0 * A[3]).with_scope("all")],
        [(0.5 * A[2:]).with_scope("all"), (0.5 * A[1:]).with_scope("all"), 0.5 * A],
    ],
    ids=["scopes", "forked-at-0", "equal-versions", "last-block", "forked-later"],
)
def test_branches_count_as_rows_that_are_decoded_alone(rt, branches):
    outputs = rt.generate_branches(PROMPTS, branches, **SAMPLED)
    run = last_run(rt)
    for k, steering in enumerate(branches):
        mine = [fired for fired in run.steering if fired.branch == f"branches[{k}]"]
        alone = 0
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            branch = output.branches[k]
            with watched(rt) as seen:
                [same] = rt.generate([prompt], steering, **{**SAMPLED, "seed": [branch.seed]})
            assert same.token_ids == branch.token_ids
            assert total(last_run(rt)) == seen["total"]
            alone += seen["total"]
        assert sum(fired.total for fired in mine) == alone
        assert all(fired.rows + fired.idle == len(PROMPTS) for fired in mine)
        assert [fired.direction for fired in mine] == [t.direction.name for t in (steering or Steering()).terms]


@pytest.mark.parametrize("scope", ["response", "generated", "all"])
def test_the_record_counts_what_forward_hooks_in_transformers_steer(rt, scope, monkeypatch):
    """Hooks see the last block's output at every position; prefill leaves it out, for nothing reads it."""
    steering, [completion] = (
        (0.5 * A[1:]).with_scope(scope),
        rt.generate(PROMPTS[2:3], (0.5 * A[1:]).with_scope(scope), **GREEDY),
    )
    fired = last_run(rt).steering
    law, hooked = hooks.law, {"positions": 0}

    def counted(h: Tensor, steering: Steering, layer: int) -> Tensor:
        steered = law(h, steering, layer)
        hooked["positions"] += int((steered != h).any(dim=-1).sum())
        return steered

    monkeypatch.setattr(hooks, "law", counted)
    prompt = PROMPTS[2]
    hooks.logits(tiny_llama(), [*prompt, *completion.token_ids[:-1]], steering, hooks.first_steered(len(prompt), scope))
    left_out = len(prompt) - 1 if scope == "all" else 0
    assert [f.total for f in fired] == [hooked["positions"] - left_out]
    assert fired[0].layers == (1, 2, 3)


def test_rows_blocks_and_tokens_of_every_term(rt):
    steerings: list[Steering | None] = [0.1 * A[1:3] + B[3].ablated(), None, (0.2 * A[0]).with_scope("all"), 0.0 * A]
    rt.generate(PROMPTS, steerings, **GREEDY)
    n = len(PROMPTS[2]) - 1
    assert last_run(rt).steering == (
        Fired("steering", "a", 0, "response", rows=1, idle=0, layers=(1, 2), tokens=12, total=24),
        Fired("steering", "b", 1, "response", rows=1, idle=0, layers=(3,), tokens=12, total=12),
        Fired("steering", "a", 0, "all", rows=1, idle=0, layers=(0,), tokens=n + 12, total=n + 12),
    )
    text = str(last_run(rt))
    assert "steering: a (term 0, scope 'response') acted on 1 row × 2 blocks × 12 tokens, 24 times in all" in text


def test_a_row_that_ends_at_once_is_idle_under_generated(rt):
    steering = (0.5 * A).with_scope("generated")
    first = [c.token_ids[0] for c in rt.generate(PROMPTS, **GREEDY)]
    assert first[0] not in first[1:]
    outputs = rt.generate(PROMPTS, steering, do_sample=False, max_new_tokens=5, eos_token_id=first[0])
    assert len(outputs[0].token_ids) == 1
    [fired] = last_run(rt).steering
    assert (fired.rows, fired.idle) == (len(PROMPTS) - 1, 1)
    assert fired.tokens == sum(len(o.token_ids) - 1 for o in outputs)
    assert "1 row ended before it could act" in str(fired)


def test_a_prefix_is_not_steered_and_all_does_not_use_it(rt):
    start, ends = PROMPTS[3][:19], [[3, 4, 5], [6]]
    with rt.prefix(start) as prefix:
        for scope in ("response", "generated", "all"):
            with watched(rt) as seen:
                rt.generate(ends, MIX.with_scope(scope), prefix=prefix, **GREEDY)
            assert total(last_run(rt)) == seen["total"] > 0
            assert [f.rows for f in last_run(rt).steering] == [2, 2, 2]


@pytest.mark.parametrize("scope", ["response", "generated", "all"])
def test_scored_completions_are_counted(rt, scope):
    completions = [[1, 2, 3, 4], [5], [6, 7], [8, 9, 10]]
    with watched(rt) as seen:
        rt.score(PROMPTS, completions, MIX.with_scope(scope))
    run = last_run(rt)
    assert total(run) == seen["total"] > 0
    assert (run.call, run.complete, run.rows, run.tokens) == ("score", True, 4, 10)
    assert {f.idle for f in run.steering} == {1 if scope == "generated" else 0}
    assert run.paths.decode_attention is None
    rt.score(PROMPTS, completions)
    assert last_run(rt).steering == ()


@pytest.mark.parametrize("behind", [0, 1, 3])
@pytest.mark.parametrize(
    "options", [GREEDY, SAMPLED, {**SAMPLED, "eos_token_id": None, "stop_strings": ["e", "on", " "]}]
)
def test_a_device_that_is_ahead_counts_no_overshoot(rt, behind, options):
    branches = [0.5 * A, None, MIX.with_scope("all"), (-3.0 * B).with_scope("generated")]
    rt.generate_branches(PROMPTS, branches, **options)
    ahead = runtime(manner=Manner(fixed=True, behind=behind))
    ahead.generate_branches(PROMPTS, branches, **options)
    # Rows end in another order, so terms are first seen in another.
    assert sorted(map(str, last_run(ahead).steering)) == sorted(map(str, last_run(rt).steering))
    assert last_run(ahead).tokens == last_run(rt).tokens


@NEEDS_NATIVE
def test_the_extension_counts_the_same(rt):
    branches = [0.5 * A, MIX.with_scope("all"), (-3.0 * B).with_scope("generated")]
    rt.generate_branches(PROMPTS, branches, **GREEDY)
    native_rt = runtime("native")
    native_rt.generate_branches(PROMPTS, branches, **GREEDY)
    assert sorted(map(str, last_run(native_rt).steering)) == sorted(map(str, last_run(rt).steering))
    paths = last_run(native_rt).paths
    assert (paths.backend, paths.decode_attention) == ("native", "native")
    # All rows run together for 12 steps; rows of 40 tokens reach a split's end after 8 of them.
    assert (paths.captured_steps + paths.repeated_steps, dict(paths.plain_steps)) == (12, {})
    assert 2 <= paths.captured_steps < paths.repeated_steps


# --- which call it is ------------------------------------------------------------------------------------------------


def test_a_stream_that_is_closed_counts_what_it_had(rt):
    fresh = runtime(max_rows=2)
    assert fresh.last_run is None
    stream = fresh.stream_pairs(PROMPTS, positive=0.5 * A, negative=None, eos_token_id=None, **GREEDY)
    assert fresh.last_run is None
    next(stream)
    assert fresh.last_run is None  # it is not at its end
    stream.close()
    run = last_run(fresh)
    # Two rows at a time: the first pair has ended, the next prompt has not been admitted.
    assert (run.complete, run.rows, run.tokens) == (False, 2, 24)
    [fired] = run.steering
    assert (fired.branch, fired.rows, fired.tokens, fired.total) == ("positive", 1, 12, 48)
    assert "not complete" in str(run)


def test_rows_that_were_running_when_a_stream_was_closed_count_with_their_tokens():
    rt = runtime()
    with watched(rt) as seen:
        plain = rt.generate(PROMPTS, 0.5 * A, **GREEDY)
        eos = plain[1].token_ids[3]
        assert all(eos not in c.token_ids[:4] for n, c in enumerate(plain) if n != 1)
        seen["total"] = 0
        stream = rt.stream_branches(PROMPTS, [(0.5 * A).with_scope("response")], **{**GREEDY, "eos_token_id": eos})
        assert len(next(stream).branches[0].token_ids) == 4
        stream.close()
    run = last_run(rt)
    assert (run.complete, run.rows, run.tokens) == (False, 4, 16)
    assert total(run) == seen["total"] == 4 * 4 * 4


def test_a_stream_closed_behind_its_last_output_is_complete(rt):
    stream = rt.stream_branches(PROMPTS[:2], [0.5 * A], **GREEDY)
    next(stream), next(stream)
    stream.close()
    assert last_run(rt).complete


def test_of_nested_calls_the_last_is_the_one_that_ended_last(rt):
    outer = rt.stream_branches(PROMPTS, [0.5 * A, None], **SAMPLED)
    next(outer)
    rt.generate(PROMPTS[:1], -1.0 * B, **GREEDY)
    inner = last_run(rt)
    assert [f.direction for f in inner.steering] == ["b"]
    for _ in outer:
        pass
    run = last_run(rt)
    assert [f.direction for f in run.steering] == ["a"]
    rt.generate_branches(PROMPTS, [0.5 * A, None], **SAMPLED)
    assert last_run(rt) == run


def test_a_call_that_fails_is_recorded_and_one_that_is_refused_is_not(rt, monkeypatch):
    rt.generate(PROMPTS[:1], 0.5 * A, **GREEDY)
    before = last_run(rt)
    with pytest.raises(ValueError, match="max_new_tokens"):
        rt.generate(PROMPTS, 0.5 * A, max_new_tokens=10**6)
    assert last_run(rt) is before
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "results", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rt.generate(PROMPTS, 0.5 * A, **GREEDY)
    run = last_run(rt)
    assert (run.complete, run.rows, run.tokens) == (False, len(PROMPTS), 0)


def test_calls_that_read_say_which_paths_ran(rt):
    rt.hidden_states(PROMPTS)
    run = last_run(rt)
    assert (run.call, run.complete, run.rows, run.steering) == ("hidden_states", True, 4, ())
    assert run.paths.prefill_attention == "sdpa"
    assert run.paths.prefill_passes == 6  # of at most 16 positions: 5 and 1 together, 17 as 16 + 1, 40 as 16 + 16 + 8
    rt.project(PROMPTS, [A])
    assert last_run(rt).call == "project"
    rt.extract_direction(PROMPTS[:2], PROMPTS[2:], name="new")
    assert (last_run(rt).call, last_run(rt).rows) == ("extract_direction", 4)
    rt.generate([], **GREEDY)
    assert (last_run(rt).rows, last_run(rt).complete) == (0, True)


# --- which code ran --------------------------------------------------------------------------------------------------


class FakeGraphs:
    """What StepGraphs is to a batch: graphs of 4 and 16 rows; the first step of 16 is run before it is captured."""

    largest = 16

    def __init__(self, step: Any, sizes: Any, device: Any):
        self.given_up, self.there = ["no memory is left for a CUDA graph of 64 rows"], {4}

    def has(self, rows: int) -> bool:
        return rows in self.there

    def run(self, rows: int, step: Any) -> int:
        step(rows)
        size = {4: 4, 8: 16, 16: 16}.get(rows, 0)
        was_there = self.has(size)
        self.there |= {16} & {size}
        return size if was_there else 0


def test_steps_are_told_apart_by_how_they_ran(rt, monkeypatch):
    branches = [0.5 * A, None, None]
    rt.generate_branches(PROMPTS[:1], branches, **GREEDY)
    assert last_run(rt).paths.plain_steps == {"backend reference": 12}
    plain = runtime(manner=Manner(fixed=True))
    plain.generate_branches(PROMPTS[:1], branches, **GREEDY)
    assert last_run(plain).paths.plain_steps == {"no CUDA device": 12}
    assert last_run(plain).paths.fallbacks == ()

    monkeypatch.setattr(engine_batch, "StepGraphs", FakeGraphs)
    graphed = runtime(manner=Manner(fixed=True, graphs=True))
    first = graphed.generate_branches(PROMPTS[:1], branches, **GREEDY)
    paths = last_run(graphed).paths
    assert (paths.graph_steps, paths.plain_steps) == ({4: 12}, {})
    assert paths.fallbacks == ("no memory is left for a CUDA graph of 64 rows",)
    assert "12 by the graph of 4 rows" in str(paths)
    [same] = rt.generate_branches(PROMPTS[:1], branches, **GREEDY)
    assert [b.token_ids for b in first[0].branches] == [b.token_ids for b in same.branches]
    graphed.generate_branches(PROMPTS, branches, **GREEDY)
    paths = last_run(graphed).paths
    assert (paths.graph_steps, paths.plain_steps) == ({16: 11}, {"first step of its size, captured afterwards": 1})
    graphed.generate_branches(PROMPTS[:2], branches, **GREEDY)  # 6 rows, whose own size has no graph
    assert (last_run(graphed).paths.graph_steps, last_run(graphed).paths.plain_steps) == ({16: 12}, {})
    graphed.generate(PROMPTS[:1], **GREEDY)
    assert last_run(graphed).paths.plain_steps == {"no graph": 12}


def test_attention_items_that_rows_share(rt):
    rt.generate_branches(PROMPTS[3:], [0.5 * A, None, -0.5 * A], **GREEDY)
    # 40 tokens are two whole splits of 16, and one that each row goes on with.
    assert (last_run(rt).paths.shared_items, last_run(rt).paths.sharing_rows) == (2, 3)
    rt.generate(PROMPTS, 0.5 * A, **GREEDY)
    assert (last_run(rt).paths.shared_items, last_run(rt).paths.sharing_rows) == (0, 0)
    branches = [(g * A).with_scope("all") for g in (0.5, -0.5, 0.25)]
    rt.generate_branches(PROMPTS[3:], branches, **GREEDY)
    # Below the fork: the first branch's pages are the same in all blocks, so it has items of its own.
    assert (last_run(rt).paths.shared_items, last_run(rt).paths.sharing_rows) == (2, 2)


def test_smaller_prefill_passes_are_in_the_record(monkeypatch):
    rt, run = runtime(), prefill._run_pack

    def limited(model: Any, kv: Any, bank: Any, jobs: Any, pieces: Any, *rest: Any) -> Any:
        if sum(end - start for _, start, end in pieces) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(model, kv, bank, jobs, pieces, *rest)

    monkeypatch.setattr(prefill, "_run_pack", limited)
    with pytest.warns(UserWarning, match="passes of 8 are tried") as warned:
        rt.generate(PROMPTS[3:], **GREEDY)
    assert last_run(rt).paths.fallbacks == (str(warned[0].message),)
    assert last_run(rt).paths.prefill_passes == 5  # 39 positions in eights; the one of 16 that failed does not count
    monkeypatch.undo()
    rt.generate(PROMPTS[3:], **GREEDY)
    assert last_run(rt).paths.fallbacks == ()


# --- refused: what could not act -------------------------------------------------------------------------------------


def test_generated_with_room_for_one_token_is_refused(rt):
    steering = (0.5 * A).with_scope("generated")
    with pytest.raises(ValueError, match=r"^steering has scope 'generated' and would steer nothing.*with_scope"):
        rt.generate(PROMPTS, steering, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"^prompts\[2\]: steering has scope 'generated'"):
        rt.generate(PROMPTS, [None, 0.5 * A, steering, None], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"^negative has scope 'generated'"):
        rt.stream_pairs(PROMPTS, positive=0.5 * A, negative=steering, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"^prompts\[1\]: branches\[1\] has scope 'generated'"):  # a full context
        rt.generate_branches([[1], [2] * 511], [None, steering])
    rt.generate(PROMPTS, steering, do_sample=False, max_new_tokens=2)
    assert total(last_run(rt)) == 4 * N_LAYERS
    for allowed in (0.5 * A, (0.5 * A).with_scope("all"), (0.0 * A).with_scope("generated"), None):
        rt.generate(PROMPTS, allowed, do_sample=False, max_new_tokens=1)


def test_scoring_under_generated_needs_a_second_token_somewhere(rt):
    steering = (0.5 * A).with_scope("generated")
    with pytest.raises(ValueError, match=r"^steering has scope 'generated' and would steer nothing.*longer"):
        rt.score(PROMPTS[:2], [[1], [2]], steering)
    with pytest.raises(ValueError, match=r"^steering has scope 'generated'"):
        rt.score(PROMPTS[:2], [[1], [2, 3]], [steering, None])
    rt.score(PROMPTS[:2], [[1], [2, 3]], steering)
    [fired] = last_run(rt).steering
    assert (fired.rows, fired.idle, fired.total) == (1, 1, N_LAYERS)


def test_a_strength_with_no_vector_behind_it_is_refused():
    part = A[1:3]
    for make in (lambda v: v * part, part.amplified, part.clamped):
        with pytest.raises(ValueError, match=r"direction 'a', which has no vector on the chosen blocks.*1:3"):
            make([5.0, 0.0, 0.0, 5.0])
        make([5.0, 5.0, 0.0, 0.0])
        make([0.0] * N_LAYERS)
    hollow = Direction("hollow", A.vectors * torch.tensor([0.0, 1, 1, 1])[:, None])
    term = Term(hollow, torch.tensor([1.0, 0, 0, 0]), torch.zeros(N_LAYERS))
    rt = runtime()
    with pytest.raises(ValueError, match=r"^steering: direction 'hollow' has a zero vector at every block .*\(0\)"):
        rt.generate(PROMPTS, Steering((term,)), **GREEDY)
    with pytest.raises(ValueError, match=r"direction 'hollow' has a zero vector at every block"):
        rt.generate(PROMPTS, Steering((Term(hollow, term.beta, -term.alpha),)), **GREEDY)
    both = Term(hollow, torch.tensor([1.0, 0, 2, 0]), torch.zeros(N_LAYERS))
    one = rt.generate(PROMPTS, Steering((both,)), **GREEDY)
    assert one == rt.generate(PROMPTS, 2.0 * A[2:3], **GREEDY)
    rt.generate(PROMPTS, Steering((both,)), **GREEDY)
    assert last_run(rt).steering[0].layers == (2,)  # a zero vector cannot act


def test_a_strength_that_vanishes_in_fp32_is_refused():
    faint = Direction("faint", A.vectors, 1e-30 * torch.ones(N_LAYERS))
    for make in (lambda: 1e-60 * A, lambda: A.amplified(1e-60), lambda: 1e-60 * (1.0 * A), lambda: 1e-20 * faint):
        with pytest.raises(ValueError, match="too small for fp32"):
            make()
    assert (1e-20 * A).layers == list(range(N_LAYERS))


# --- adding up -------------------------------------------------------------------------------------------------------


def test_the_counts_of_calls_add_up(rt):
    parts = []
    for prompts in (PROMPTS[:1], PROMPTS[1:]):
        rt.generate_branches(prompts, [MIX, A.ablated()], **GREEDY)
        parts += last_run(rt).steering
    rt.generate_branches(PROMPTS, [MIX, A.ablated()], **GREEDY)
    assert add_up(parts) == last_run(rt).steering
    assert [Fired.from_dict(fired.to_dict()) for fired in parts] == parts


def test_the_paths_of_attention_have_names(monkeypatch):
    kind = (torch.device("cpu"), torch.float32, 64)
    assert prefill_ops.path_of(prefill_ops.prefill_attention, *kind) == "sdpa"
    assert prefill_ops.path_of(prefill_ops.prefill_attention_by_library, *kind) == "sdpa"
    monkeypatch.setattr(prefill_ops, "choose", lambda *kind: prefill_ops.path("flash-attn 2").attend)
    assert prefill_ops.path_of(prefill_ops.prefill_attention_by_library, *kind) == "flash-attn 2"
    varlen = partial(prefill_ops.prefill_attention, attend=prefill_ops.path("torch varlen_attn").attend)
    assert prefill_ops.path_of(varlen, *kind) == "torch varlen_attn"
    assert form_of(grouped_decode_attention) == "reference"
    assert form_of(native.grouped_decode_attention) == "native"
    triton = import_module("icon2_rt.kernels.grouped_decode_attention")
    assert form_of(triton.grouped_decode_attention) == "triton"
    assert form_of(test_the_paths_of_attention_have_names) == __name__


def test_a_step_counts_nothing(monkeypatch):
    """The record is called when attention is laid out and when a row ends; between those a step has one increment."""
    rt = runtime(manner=Manner(fixed=True, behind=1))
    calls: list[list[str]] = []

    def watch(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename == record_module.__file__:
            calls[-1].append(frame.f_code.co_name)

    def profiled(name: str) -> None:
        whole = getattr(Batch, name)

        def part(batch: Batch) -> Any:
            calls.append([])
            before = sys.getprofile()
            sys.setprofile(watch)
            try:
                return whole(batch)
            finally:
                sys.setprofile(before)

        monkeypatch.setattr(Batch, name, part)

    for name in ("launch", "results"):
        profiled(name)
    rt.generate_pairs(PROMPTS, positive=0.5 * A, negative=MIX.with_scope("all"), **GREEDY)
    assert len(calls) == 2 * 12
    assert calls[0] == ["shared"]
    assert calls[1:] == [[]] * 23
    assert dict(last_run(rt).paths.plain_steps) == {"no CUDA device": 12}
