"""When groups are let in: several at a time, for a pass costs as much as a step, and none waits long for others."""

from __future__ import annotations

from typing import Any

import pytest

from bench import host
from icon2_rt import Direction, Runtime
from icon2_rt.engine import Engine
from icon2_rt.engine.batch import Batch, Manner
from tests.models import random_prompts, random_vectors, tiny_llama

A = Direction("a", random_vectors(4, 48, seed=0))


def runtime(**options: Any) -> Runtime:
    return Runtime(tiny_llama(), device="cpu", backend="reference", page_size=8, **options)


class Watched:
    """Every admission of a runtime's calls: the rows that were let in, those that ran and waited, and the step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        self.admissions: list[dict[str, int]] = []
        is_due, launch = Engine._is_due, Batch.launch

        def due(engine: Engine, fitting: Any, n_running: int, n_waiting: int, held: int) -> bool:
            answer = is_due(engine, fitting, n_running, n_waiting, held)
            if answer:
                rows = sum(len(request.branches) for request in fitting)
                left = n_waiting - len(fitting)
                self.admissions.append(
                    {"rows": rows, "running": n_running, "left": left, "held": held, "step": self.steps}
                )
            return answer

        def launched(batch: Batch) -> None:
            self.steps += 1
            launch(batch)

        monkeypatch.setattr(Engine, "_is_due", due)
        monkeypatch.setattr(Batch, "launch", launched)


@pytest.mark.parametrize("behind", [None, 3])
def test_groups_are_let_in_several_at_a_time_and_none_is_held_long(monkeypatch, behind):
    rt = runtime(max_rows=16)
    if behind is not None:
        rt._engine._manner = Manner(fixed=True, behind=behind)
    watched = Watched(monkeypatch)
    prompts = random_prompts([3 + n % 7 for n in range(40)], seed=1)
    options = {"temperature": 1.5, "top_k": 0, "seed": 2, "max_new_tokens": 60, "eos_token_id": list(range(3))}
    rt.generate_branches(prompts, [None, 1.0 * A], **options)
    first, *others = watched.admissions
    assert first == {"rows": 16, "running": 0, "left": 32, "held": 0, "step": 0}
    assert sum(a["rows"] for a in watched.admissions) == 80
    for a in others:
        assert a["rows"] >= 4 or not a["running"] or not a["left"] or a["held"] == 16, a
        assert a["held"] <= 16
    assert any(a["rows"] >= 4 and a["running"] for a in others)


def test_where_all_that_wait_fit_nothing_waits_for_more(monkeypatch):
    watched = Watched(monkeypatch)
    rt = runtime(max_rows=16)
    options = {"temperature": 1.5, "top_k": 0, "seed": 2, "max_new_tokens": 60, "eos_token_id": list(range(3))}
    rt.generate_branches(random_prompts([5] * 9, seed=1), [None, 1.0 * A], **options)
    assert [a["rows"] for a in watched.admissions] == [16, 2]
    assert watched.admissions[1]["running"] > 0
    assert watched.admissions[1]["held"] == 0


def test_a_call_inside_a_stream_begins_at_once(monkeypatch):
    watched = Watched(monkeypatch)
    rt = runtime(max_rows=16)
    options = {"do_sample": False, "max_new_tokens": 9}
    stream = rt.stream_pairs(random_prompts([5] * 20), positive=1.0 * A, negative=None, **options)
    next(stream)
    before = watched.steps
    rt.generate(random_prompts([4]), **options)
    assert watched.admissions[-1] == {"rows": 1, "running": 0, "left": 0, "held": 0, "step": before}
    assert watched.steps == before + 9
    stream.close()


@pytest.mark.parametrize(("max_rows", "most"), [(2, 1), (4, 1), (8, 2), (64, 8)])
def test_few_seats_are_not_kept_free_for_a_pass_that_serves_several(monkeypatch, max_rows, most):
    """Four free seats never come together where there are two: a row in the other would run alone for 16 steps."""
    watched = Watched(monkeypatch)
    options = {"temperature": 1.5, "top_k": 0, "seed": 2, "max_new_tokens": 40, "eos_token_id": list(range(4))}
    rt = runtime(max_rows=max_rows)
    rt.generate(random_prompts([4] * (2 * max_rows + 12), seed=1), **options)
    while_others_ran = [a for a in watched.admissions if a["running"] and a["left"]]
    assert while_others_ran
    assert min(a["rows"] for a in while_others_ran if a["held"] < 16) == most


def test_a_pass_for_an_eighth_of_the_seats_costs_few_steps():
    """Pairs of mixed lengths, eight times what there are seats for; one at a time it were 671 passes and 1903 steps."""
    found = host.admission(256)
    assert found["pairs_per_pass"] > 8
    assert found["steps"] < 1.05 * 1903
