"""The process of a trial, and what it hands to the kernels. How results are judged is in test_trial.py."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from icon2_rt.ops import Ops
from icon2_rt.qualify import Subject
from icon2_rt.trial import __main__ as trial
from icon2_rt.trial import forms, whole
from icon2_rt.trial.tell import Teller

CPU = torch.device("cpu")
SUBJECT = Subject(trial.SMALL, "float32", page_size=16, split_pages=2)
EFFORT = forms.Effort(rows=(2,), replays=1, times=0)


@pytest.fixture
def noted(monkeypatch):
    """What ``note()`` returned when the trial itself began, in place of one."""

    def run(note: Any, *arguments: str) -> Any:
        found: list[Any] = []
        monkeypatch.setattr(trial, "trial", lambda *_: found.append(note()))
        assert trial.main(list(arguments)) == 0
        return found[0]

    return run


def test_what_all_is_held_against_is_worked_out_in_fp32(noted, monkeypatch):
    """Images of NVIDIA's let matrix products use TF32 by their environment."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert noted(torch.get_float32_matmul_precision, "--device", "cpu") == "highest"
        assert "NVIDIA_TF32_OVERRIDE" not in trial.os.environ
    finally:
        torch.set_float32_matmul_precision(before)


def test_kernels_are_launched_on_the_device_that_is_tried(noted, monkeypatch):
    """Triton launches on the current device: on the second GPU of a machine every kernel would be wrong."""
    current: list[torch.device] = []

    @contextmanager
    def made_current(device: torch.device) -> Any:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", made_current)
    assert noted(lambda: list(current), "--device", "cuda:1") == [torch.device("cuda", 1)]


def test_a_marker_never_writes_through_a_link(tmp_path):
    """A folder that several users share may hold anything."""
    (tmp_path / "precious").write_text("as it was")
    marker = tmp_path / "entry.trying"
    marker.symlink_to(tmp_path / "precious")
    Teller(None, str(marker), "this one").begin("sample", "triton")
    assert (tmp_path / "precious").read_text() == "as it was"
    assert not marker.is_symlink()
    found = json.loads(marker.read_text())
    assert (found["machine"], found["at"], found["times"]) == ("this one", "sample (triton)", 1)
    Teller(None, str(marker), "another").begin("sample", "triton")
    assert json.loads(marker.read_text())["times"] == 2


def _case(gate_up: Tensor) -> forms.Case:
    """``silu_mul`` on ``gate_up`` as a decode step of 4 rows would have recorded it."""
    recorder = forms.Recorder(frozenset())
    recorder._rows = 4
    recorder.ops().silu_mul(gate_up)
    (case,) = recorder.cases.values()
    return case


def _tried(function: Any, case: forms.Case) -> str | None:
    truths = [forms.truth(case, frozenset())]
    return forms.try_form("triton", function, [case], truths, frozenset(), CPU, EFFORT, Teller()).wrong


def test_rows_that_lie_apart_still_do_in_a_trial():
    """A kernel that takes the length of a row for the way to the next is wrong in a wider buffer alone."""
    wide = torch.randn(4, 96)

    def packed(gate_up: Tensor) -> Tensor:
        return Ops().silu_mul(gate_up.as_strided(gate_up.shape, (gate_up.shape[1], 1)))

    assert _tried(packed, _case(wide[:, :64].contiguous())) is None
    assert "elements of result 0 are wrong" in str(_tried(packed, _case(wide[:, :64])))
    assert _tried(Ops().silu_mul, _case(wide[:, :64])) is None


def test_an_error_of_the_compiler_costs_the_form():
    class CompilationError(Exception):
        """Triton's derive from Exception."""

    def broken(gate_up: Tensor) -> Tensor:
        raise CompilationError("out of resource: shared memory, Required: 300000, Hardware limit: 101376")

    assert "CompilationError: out of resource" in str(_tried(broken, _case(torch.randn(4, 64))))


@pytest.mark.parametrize(
    "said", ["Triton Error [CUDA]: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
)
def test_no_memory_costs_no_form(said):
    """It is a circumstance, whoever finds it."""

    def full(gate_up: Tensor) -> Tensor:
        raise RuntimeError(said)

    with pytest.raises(RuntimeError) as caught:
        _tried(full, _case(torch.randn(4, 64)))
    assert "ran out of memory" in str(trial.why_cannot(caught.value))


def test_graphs_that_were_never_replayed_are_not_right():
    """The engine goes on without graphs where it cannot capture one, with the same results."""
    with torch.inference_mode():
        assert whole._run(SUBJECT, Ops(), CPU, torch.float32, False, Teller())
        with pytest.raises(AssertionError, match="no step was replayed as a CUDA graph"):
            whole._run(SUBJECT, Ops(), CPU, torch.float32, True, Teller())


def test_prefill_is_tried_from_the_beginning_and_behind_what_is_there():
    with torch.inference_mode():
        cases, _ = forms.record(SUBJECT, CPU, torch.float32, EFFORT)
    starts = [[run.start > 0 for run in case.arguments[3].runs] for case in cases if case.op == "prefill_attention"]
    assert len(starts) == 2 and not any(starts[0]) and any(starts[1])
