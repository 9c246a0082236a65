"""The trial of a device with the interpreter in its place: the same code from the process that waits for it down to
every kernel, and what it makes of a kernel that is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import icon2_rt.kernels.grouped_decode_attention
import icon2_rt.kernels.rope_append
import icon2_rt.kernels.sample
import icon2_rt.kernels.silu_mul  # noqa: F401
from icon2_rt.ops import forms as forms_of
from icon2_rt.qualify import DeviceFacts, Limits, Subject, gate
from icon2_rt.trial import __main__ as trial
from icon2_rt.trial import forms
from icon2_rt.trial.tell import Teller

CPU = torch.device("cpu")
SUBJECT = Subject(trial.SMALL, "float32", page_size=16, split_pages=2)
EFFORT = forms.Effort(rows=(2,), replays=1, times=1)


def test_the_whole_trial_proves_the_kernels(tmp_path):
    """From the process that waits down: on the interpreter every kernel is right, and a whole engine of them."""
    verdict = gate.qualify(
        SUBJECT, DeviceFacts("interpreter", capability=(9, 0)),
        command=(sys.executable, "-m", "icon2_rt.trial", "--device", "cpu"), where=tmp_path, asked=True,
        limits=Limits(compile=300, run=300, total=560), why_no_launch=lambda: None, say=lambda line: None,
    )  # fmt: skip
    assert verdict.status == "proven", verdict.reason
    assert not verdict.graphs
    assert [result for result in verdict.forms_tried if result.wrong is not None] == []
    triton = {op for op, form in verdict.forms.items() if form == "triton"}
    assert triton == {*gate.ESSENTIAL, "silu_mul", "sample"}
    tried = {(result.op, result.form) for result in verdict.forms_tried}
    assert tried >= {("linear", "reference"), ("prefill_attention", "sdpa"), ("sample", "reference")}
    assert verdict.stored is not None


@pytest.fixture(scope="module")
def recorded():
    with torch.inference_mode():
        cases, kept = forms.record(SUBJECT, CPU, torch.float32, EFFORT)
        return [case for case in cases if case.rows == 2], kept


def judged(recorded: Any, op: str, change: Callable[..., None]) -> str | None:
    """What is said of the Triton form of ``op`` when ``change(result, *arguments)`` follows it."""
    cases, kept = recorded
    right = forms_of(CPU)[op]["triton"]

    def planted(*arguments: Any) -> Any:
        result = right(*arguments)
        change(result, *arguments)
        return result

    with torch.inference_mode():
        mine = [case for case in cases if case.op == op][:1]
        truths = [forms.truth(case, kept) for case in mine]
        return forms.try_form("triton", planted, mine, truths, kept, CPU, EFFORT, Teller()).wrong


def first(result: torch.Tensor, *arguments: Any) -> None:
    result.view(-1)[0] += 0.01


def stray_key(q: torch.Tensor, *arguments: Any) -> None:
    arguments[6][-1, -1, -1, -1] = 5.0  # k_pages, at a place that no slot names


def other_token(result: None, logits: torch.Tensor, how: Any, state: Any) -> None:
    state.tokens[0] = (state.tokens[0] + 1) % logits.shape[1]


def nothing(*arguments: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("op", "change", "said"),
    [
        ("silu_mul", nothing, None),
        ("silu_mul", first, "1 of 192 elements of result 0 are wrong"),
        ("grouped_decode_attention", first, "1 of 128 elements of result 0 are wrong"),
        ("rope_append", nothing, None),
        ("rope_append", stray_key, "elements of k_pages are wrong"),
        ("sample", other_token, "1 of 2 elements of state.tokens differ"),
    ],
)
def test_a_planted_error_is_refused(recorded, op, change, said):
    found = judged(recorded, op, change)
    assert (found is None) == (said is None), found
    assert said is None or said in str(found)
