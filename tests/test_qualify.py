"""The process that waits for a trial: whatever the trial does, a working runtime comes of it, within its time.

The trials here are small scripts that say what a trial says. What a real one does is in test_trial.py.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from icon2_rt import Runtime, models, ops, qualify
from icon2_rt.models import DecoderSpec
from icon2_rt.ops import launching
from icon2_rt.qualify import DeviceFacts, Entry, Limits, Qualification, Subject, cache, facts, gate
from icon2_rt.qualify.verdict import EngineResult, FormResult, choose_forms, choose_prefill, share
from tests.models import FAMILIES, tiny_llama

SPEC = DecoderSpec("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, None, 1e-5, 1.0, False)
SUBJECT = Subject(SPEC, "bfloat16")
GPU = DeviceFacts("Test GPU", 0, (9, 0), 80 << 30, driver="580.65", driver_cuda=(13, 0), torch_cuda="13.0")
PATIENT = Limits(compile=60.0, run=60.0, total=120.0, wait=5.0)  # for scripts that end by themselves
HURRIED = Limits(compile=4.0, run=1.0, total=20.0, wait=5.0)  # for those that do not

# What every script begins with, and the lines of a trial in which all is right.
BEGIN = """
import json, os, signal, sys, time
request = json.loads(sys.argv[sys.argv.index("--request") + 1])
pipe = int(sys.argv[sys.argv.index("--pipe") + 1])
def tell(event, **fields): os.write(pipe, (json.dumps({"event": event, **fields}) + "\\n").encode())
def begin(what, form, phase="run", **fields): tell("begin", what=what, form=form, phase=phase, **fields)
known = {(f["op"], f["form"]) for f in request["forms"]}
def form(op, form="triton", at=lambda: None, **fields):
    if (op, form) in known: return
    begin(op, form)
    at()
    fields = {"wrong": None, "error": 1e-3, "microseconds": {"2": 10.0, "16": 10.0, "64": 10.0}, **fields}
    tell("form", op=op, form=form, **fields)
def engine(graphs, at=lambda: None, **fields):
    if any(e["graphs"] == graphs for e in request["engines"]): return
    begin("engine", None, graphs=graphs)
    at()
    times = {"step": 100.0, "reference": 900.0}
    tell("engine", **{"graphs": graphs, "wrong": None, "microseconds": times, **fields})
ESSENTIAL = ("begin_step", "add_steer_rmsnorm", "rope_append", "grouped_decode_attention")
def essential():
    for op in ESSENTIAL: form(op)
def rest():
    form("silu_mul"); form("silu_mul", "reference", microseconds={"2": 12.0, "16": 12.0, "64": 12.0})
    form("sample"); form("linear", "reference"); form("embed", "reference")
def done():
    engine(False); engine(True); tell("done")
"""
RIGHT = "essential(); rest(); done()"


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """``trial(script)``: the verdict for a trial that is ``script``, and what was said. Each start leaves a line in
    ``trial.starts``."""
    for name in ("ICON2_QUALIFY", "ICON2_CACHE"):
        monkeypatch.delenv(name, raising=False)
    starts = tmp_path / "starts"

    def run(script: str, device: DeviceFacts = GPU, **options: Any) -> Qualification:
        path = tmp_path / f"child-{len(list(tmp_path.glob('child-*')))}.py"
        note = f"open({str(starts)!r}, 'a').write('.')\n"
        path.write_text(BEGIN + note + textwrap.dedent(script))
        options = {"where": tmp_path / "verdicts", "limits": PATIENT, "why_no_launch": lambda: None, **options}
        run.said = []
        return gate.qualify(
            options.pop("subject", SUBJECT), device, command=(sys.executable, str(path)), say=run.said.append, **options
        )

    run.starts = lambda: len(starts.read_text()) if starts.exists() else 0
    run.folder = tmp_path / "verdicts"
    return run


def works(verdict: Qualification) -> None:
    """Whatever the verdict, there are ops to run."""
    assert verdict.reason
    if verdict.status == "proven":
        assert set(verdict.forms) == {*gate.ESSENTIAL, "embed", "silu_mul", "linear", "sample"}
        assert verdict.ops().fixed
    else:
        assert verdict.ops().backend == "reference"
        assert verdict.ops().sample is ops.sample
    assert Qualification.from_dict(json.loads(json.dumps(verdict.to_dict()))).forms == dict(verdict.forms)


# --- what a trial may do --------------------------------------------------------------------------------------------


def test_right_and_kept(trial):
    verdict = trial(RIGHT)
    works(verdict)
    assert (verdict.status, verdict.graphs, verdict.backend) == ("proven", True, "triton")
    assert verdict.forms["silu_mul"] == "triton"
    assert verdict.forms["linear"] == "reference"
    assert verdict.ops().silu_mul is ops.triton_ops().silu_mul
    assert len(trial.said) == 1 and "Test GPU" in trial.said[0]
    assert verdict.stored is not None and not verdict.cached
    again = trial("raise SystemExit('a stored verdict is not tried again')")
    assert again.cached and again.stored == verdict.stored
    assert again.to_dict() == verdict.to_dict()
    assert trial.starts() == 1 and trial.said == []
    assert not list(trial.folder.glob("*.trying"))


def test_one_element_wrong_in_an_essential_op(trial):
    verdict = trial(
        'form("begin_step"); form("rope_append", wrong="1 of 4096 elements differs by 0.5"); rest(); done()'
    )
    works(verdict)
    assert verdict.status == "refused"
    assert "add_steer_rmsnorm" in verdict.reason  # the first that is missing
    verdict = trial(
        'for op in ESSENTIAL: form(op, wrong="1 of 4096 elements is off" if op == "rope_append" else None)\n'
        "rest(); done()",
        again=True,
    )
    works(verdict)
    assert (verdict.status, verdict.reason) == ("refused", "rope_append (triton): 1 of 4096 elements is off")


def test_one_element_wrong_in_an_op_that_can_be_spared(trial):
    verdict = trial(
        'essential(); form("silu_mul", wrong="1 element is off"); form("silu_mul", "reference"); form("sample")\n'
        'form("linear", "reference"); form("linear", "native", wrong="NaN"); form("embed", "reference"); done()'
    )
    works(verdict)
    assert verdict.status == "proven"
    assert verdict.forms["silu_mul"] == verdict.forms["linear"] == "reference"
    assert verdict.ops().silu_mul is ops.silu_mul
    assert "silu_mul (triton): 1 element is off" in verdict.reason and "linear (native): NaN" in verdict.reason
    assert "silu_mul reference" in str(verdict)


def test_slower_than_the_reference_ops(trial):
    verdict = trial(
        "essential(); rest(); engine(False)\n"
        'engine(True, microseconds={"step": 990.0, "reference": 1000.0}); tell("done")'
    )
    works(verdict)
    assert verdict.status == "refused" and "990" in verdict.reason and "1000" in verdict.reason


def test_graphs_wrong(trial):
    verdict = trial('essential(); rest(); engine(False); engine(True, wrong="token 3 of row 1 differs"); tell("done")')
    works(verdict)
    assert (verdict.status, verdict.graphs) == ("proven", False)
    assert "token 3 of row 1" in verdict.reason and "without graphs" in str(verdict)


def test_the_whole_engine_wrong(trial):
    verdict = trial('essential(); rest(); engine(False, wrong="page 7 changed"); tell("done")')
    works(verdict)
    assert verdict.status == "refused" and "page 7 changed" in verdict.reason


@pytest.mark.parametrize(("phase", "limit"), [("run", 1.0), ("compile", 4.0)])
def test_hanging_in_an_essential_op(trial, phase, limit):
    began = time.monotonic()
    verdict = trial(
        f'form("begin_step"); begin("rope_append", "triton", phase="{phase}"); time.sleep(600)', limits=HURRIED
    )
    works(verdict)
    assert limit < time.monotonic() - began < HURRIED.total
    assert verdict.status == "refused"
    assert f"rope_append (triton): no end after {limit:g} s" in verdict.reason
    assert trial.starts() == 1
    assert trial("raise SystemExit").cached  # not hung upon again


def test_hanging_in_an_op_that_can_be_spared_costs_that_op(trial):
    verdict = trial(
        'essential(); form("sample", at=lambda: time.sleep(600)); rest(); form("sample", "reference"); done()',
        limits=HURRIED,
    )
    works(verdict)
    assert verdict.status == "proven" and verdict.forms["sample"] == "reference"
    assert "sample (triton): no end after 1 s" in verdict.reason
    assert trial.starts() == 2


def test_never_longer_than_in_all(trial):
    began = time.monotonic()
    limits = replace(HURRIED, total=3.0)
    verdict = trial("while True: begin('begin_step', 'triton'); time.sleep(0.05)", limits=limits)
    works(verdict)
    assert time.monotonic() - began < 3.0 + 5.0
    assert verdict.status == "refused" and "3 s in all" in verdict.reason


def test_what_it_started_is_killed_too(trial, tmp_path):
    verdict = trial(
        f"""
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        begin("begin_step", "triton"); time.sleep(600)
        """,
        limits=HURRIED,
    )
    works(verdict)
    pid = int((tmp_path / "pid").read_text())
    assert _gone(pid)


def test_crashing(trial):
    verdict = trial(
        'form("begin_step"); begin("grouped_decode_attention", "triton"); os.kill(os.getpid(), signal.SIGSEGV)'
    )
    works(verdict)
    assert verdict.status == "refused"
    assert "grouped_decode_attention (triton)" in verdict.reason and "SIGSEGV" in verdict.reason


def test_crashing_in_graphs_costs_the_graphs(trial):
    verdict = trial(
        "essential(); rest(); engine(False)\n"
        'engine(True, at=lambda: os.kill(os.getpid(), signal.SIGABRT)); tell("done")'
    )
    works(verdict)
    assert (verdict.status, verdict.graphs) == ("proven", False)
    assert "SIGABRT" in verdict.reason
    assert trial.starts() == 2


def test_crashing_in_prefill_costs_that_path(trial):
    verdict = trial(
        'essential(); rest()\nform("prefill_attention", "flash-attn 2", at=lambda: os._exit(3))\n'
        'form("prefill_attention", "sdpa"); done()'
    )
    works(verdict)
    assert (verdict.status, verdict.prefill) == ("proven", "sdpa")


def test_dying_again_and_again_ends(trial):
    verdict = trial('form(f"op {len(known)}", at=lambda: os._exit(3))')
    works(verdict)
    assert verdict.status == "refused" and "again and again" in verdict.reason
    assert trial.starts() == gate.MOST_STARTS


def test_out_of_memory_is_no_verdict_on_the_device(trial):
    why = "1.0 GiB of the device are free, and a trial of this model takes about 3.1 GiB"
    verdict = trial(f"tell('cannot', why={why!r})")
    works(verdict)
    assert (verdict.status, verdict.reason, verdict.stored) == ("not tried", why, None)
    assert trial(RIGHT).status == "proven"


def test_garbage_on_standard_output_and_in_the_pipe(trial):
    verdict = trial(
        """
        print("x" * 1_000_000); sys.stderr.write("y" * 1_000_000); sys.stdout.flush()
        os.write(pipe, b'not json\\n{"event": 3}\\n[1]\\n\\xff\\xfe\\n')
        os.write(pipe, b'{"event": "form", "nonsense": 1}\\n{"event": "unknown"}\\n')
        essential(); rest(); done()
        """
    )
    works(verdict)
    assert verdict.status == "proven"


def test_a_line_in_two_pieces(trial):
    verdict = trial(
        """
        whole, cut = os.write, 17
        def write(pipe, data): whole(pipe, data[:cut]); time.sleep(0.01); return whole(pipe, data[cut:])
        os.write = write
        essential(); rest(); done()
        """
    )
    assert verdict.status == "proven"


def test_printing_nothing_and_going(trial):
    verdict = trial("sys.exit('ImportError: no module named icon2_rt')")
    works(verdict)
    assert (verdict.status, verdict.stored) == ("not tried", None)
    assert "exit code 1" in verdict.reason and "no module named icon2_rt" in verdict.reason


@pytest.mark.parametrize("what", ["facts", "recording"])
def test_going_before_any_kernel_is_no_verdict_on_the_device(trial, what):
    """CUDA may refuse a process for many reasons, which change."""
    verdict = trial(f"begin({what!r}, None); sys.exit('RuntimeError: Error 802: system not yet initialized')")
    works(verdict)
    assert (verdict.status, verdict.stored) == ("not tried", None)
    assert f"{what}: " in verdict.reason and "802" in verdict.reason
    assert trial(RIGHT).status == "proven"


def test_printing_nothing_and_staying(trial):
    verdict = trial("time.sleep(600)", limits=HURRIED)
    works(verdict)
    assert verdict.status == "refused" and "start: no end after 4 s" in verdict.reason


def test_closing_the_pipe_and_staying(trial):
    verdict = trial("os.close(pipe); time.sleep(600)", limits=HURRIED)
    works(verdict)
    assert "no end after 4 s" in verdict.reason


def test_what_can_be_imported_here_can_be_imported_there(trial, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])  # a Path there is a common mistake, which Python ignores
    assert trial("import only_here; " + RIGHT).status == "proven"


def test_a_program_that_is_not_there(tmp_path):
    verdict = gate.qualify(
        SUBJECT, GPU, command=("/nonexistent/python",), where=tmp_path, limits=PATIENT, why_no_launch=lambda: None,
        say=lambda line: None,
    )  # fmt: skip
    works(verdict)
    assert verdict.status == "not tried" and "could not be started" in verdict.reason


# --- interruptions --------------------------------------------------------------------------------------------------


def test_ctrl_c_kills_the_trial_and_the_next_start_works(trial, tmp_path):
    script = (
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); begin('embed', 'reference')\ntime.sleep(600)"
    )

    def interrupt() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        trial(script, limits=PATIENT)
    assert _gone(int((tmp_path / "pid").read_text()))
    verdict = trial(RIGHT)
    works(verdict)
    assert verdict.status == "proven"


def _gone(pid: int) -> bool:
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def _mark(trial, **fields: Any) -> None:
    marker = Entry.of(GPU, SUBJECT, trial.folder).marker
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"boot": gate.boot_id(), "at": "sample (triton)", "times": 1, **fields}))


def test_killed_half_way_it_is_tried_again_once(trial):
    _mark(trial)
    assert trial(RIGHT).status == "proven"


def test_killed_half_way_in_the_same_place_twice(trial):
    _mark(trial, times=2)
    verdict = trial(RIGHT)
    works(verdict)
    assert verdict.status == "refused" and "never got past sample (triton)" in verdict.reason
    assert trial.starts() == 0
    assert trial(RIGHT, again=True).status == "proven"


def test_a_machine_that_went_down_is_not_brought_down_again(trial):
    _mark(trial, boot="before")
    verdict = trial(RIGHT)
    works(verdict)
    assert verdict.status == "refused"
    assert "went down" in verdict.reason and "sample (triton)" in verdict.reason and "--again" in verdict.reason
    assert trial.starts() == 0
    assert trial(RIGHT).cached


def test_another_machine_that_shares_the_folder_did_not_go_down(trial):
    """Homes are shared by the nodes of a cluster, and a job there may be killed at any time."""
    here = replace(GPU, uuid="here")
    _mark(trial, boot="of there", machine="there")
    assert trial(RIGHT, device=here).status == "proven"
    _mark(trial, boot="of there", machine="there", times=2)
    verdict = trial(RIGHT, device=here, again=False)
    assert verdict.cached  # a verdict that is there is not touched by what others try
    Path(verdict.stored).unlink()
    verdict = trial(RIGHT, device=here)
    assert verdict.status == "refused" and "never got past" in verdict.reason
    _mark(trial, boot="before", machine="here")
    Path(verdict.stored).unlink()
    assert "went down" in trial(RIGHT, device=here).reason


def test_two_devices_of_one_kind_share_a_verdict(trial):
    assert trial(RIGHT, device=replace(GPU, uuid="one")).status == "proven"
    assert trial(RIGHT, device=replace(GPU, uuid="other", index=1)).cached


# --- the stored verdict ---------------------------------------------------------------------------------------------


def test_two_processes_at_once_try_once(trial, tmp_path):
    """The second waits for the first, and takes what it found."""
    script = "time.sleep(0.5); " + RIGHT
    found: list[Qualification] = []
    threads = [threading.Thread(target=lambda: found.append(trial(script))) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert [v.status for v in found] == ["proven", "proven"]
    assert sorted(v.cached for v in found) == [False, True]
    assert trial.starts() == 1


def test_a_process_that_holds_the_lock_for_too_long_is_not_waited_for(trial):
    with Entry.of(GPU, SUBJECT, trial.folder).locked(0.0) as alone:
        assert alone
        verdict = trial(RIGHT, limits=replace(PATIENT, total=0.1, wait=0.1))
    works(verdict)
    assert verdict.status == "not tried" and "another process" in verdict.reason
    assert trial(RIGHT).status == "proven"


def test_a_home_that_cannot_be_written(trial, tmp_path, monkeypatch):
    """As root may write anywhere, the folder's place is taken by a file."""
    (tmp_path / "home").write_text("")
    verdict = trial(RIGHT, where=tmp_path / "home" / "verdicts")
    works(verdict)
    assert (verdict.status, verdict.stored) == ("proven", None)
    assert "could not be stored" in verdict.reason and "ICON2_CACHE" in verdict.reason
    assert trial(RIGHT, where=tmp_path / "home" / "verdicts").status == "proven"
    assert trial.starts() == 2


def test_a_file_cut_in_half_is_no_verdict(trial):
    path = Path(trial(RIGHT).stored)
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        b"[]",
        b"{}",
        b'{"key": 1, "verdict": {}}',
        b"\xff\xfe",
        9999 * b"[",
    ):
        path.write_bytes(damaged)
        verdict = trial(RIGHT)
        works(verdict)
        assert (verdict.status, verdict.cached) == ("proven", False)
        assert path.read_bytes()[:1] == b"{"


def test_a_verdict_that_names_a_form_that_does_not_exist_is_no_verdict(trial):
    path = Path(trial(RIGHT).stored)
    path.write_text(path.read_text().replace('"sample": "triton"', '"sample": "cuda"'))
    assert not trial(RIGHT).cached


STALE = [
    (replace(GPU, driver="590.1"), {}),
    (replace(GPU, name="Another GPU"), {}),
    (replace(GPU, memory=1 << 30), {}),
    (GPU, {"subject": replace(SUBJECT, dtype="float16")}),
    (GPU, {"subject": replace(SUBJECT, page_size=16)}),
    (GPU, {"subject": replace(SUBJECT, spec=replace(SPEC, head_dim=64))}),
]  # fmt: skip


@pytest.mark.parametrize(("device", "options"), STALE)
def test_another_device_driver_dtype_or_size_is_tried_anew(trial, device, options):
    assert trial(RIGHT).status == "proven"
    assert not trial(RIGHT, device=device, **options).cached


@pytest.mark.parametrize(
    ("target", "value"),
    [("versions", lambda names: {"torch": "9.9"}), ("_sources", lambda: "other"), ("_native_hash", lambda: "other")],
)
def test_other_versions_and_sources_are_tried_anew(trial, monkeypatch, target, value):
    if target == "_native_hash" and ops.native.extension is None:
        pytest.skip("there is no native extension here")
    assert trial(RIGHT).status == "proven"
    monkeypatch.setattr(cache, target, value)
    assert not trial(RIGHT).cached


def test_another_environment_is_tried_anew_and_a_cache_folder_is_none(trial, monkeypatch):
    assert trial(RIGHT).status == "proven"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert trial(RIGHT).cached
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert not trial(RIGHT).cached


def test_the_number_of_blocks_is_no_other_size(trial):
    assert trial(RIGHT).status == "proven"
    assert trial(RIGHT, subject=replace(SUBJECT, spec=replace(SPEC, n_layers=2, max_position=99))).cached


def test_a_refusal_holds_for_a_week_and_a_proof_for_as_long_as_its_key(trial):
    wrong, entry = 'form("begin_step", wrong="NaN"); tell("done")', Entry.of(GPU, SUBJECT, trial.folder)
    assert trial(wrong).status == "refused"
    day = 86400.0
    assert entry.load(time.time() + 6.9 * day) is not None
    assert entry.load(time.time() + 7.1 * day) is None
    assert entry.load(time.time() - day) is None  # a clock that was set back
    assert trial(RIGHT).cached
    assert trial(RIGHT, again=True).status == "proven"
    assert entry.load(time.time() + 1000 * day) is not None


def test_icon2_qualify(trial, monkeypatch):
    monkeypatch.setenv("ICON2_QUALIFY", "0")
    verdict = trial(RIGHT)
    works(verdict)
    assert (verdict.status, verdict.reason) == ("not tried", "ICON2_QUALIFY=0")
    assert trial(RIGHT, asked=True).status == "proven"  # `icon2 doctor --qualify` says so in so many words
    assert trial(RIGHT).status == "not tried"  # not the stored one either
    monkeypatch.setenv("ICON2_QUALIFY", "1")
    assert [trial(RIGHT).cached for _ in range(2)] == [False, False]
    monkeypatch.setenv("ICON2_QUALIFY", "yes")
    with pytest.raises(ValueError, match=r"0 .*or 1"):
        trial(RIGHT)


def test_where_verdicts_are_kept(monkeypatch):
    monkeypatch.setenv("ICON2_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert qualify.folder() == Path("/a/qualification")
    monkeypatch.delenv("ICON2_CACHE")
    assert qualify.folder() == Path("/b/icon2_rt/qualification")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert qualify.folder() == Path("/home/me/.cache/icon2_rt/qualification")


def test_what_a_device_has_proven_is_found_without_a_model(trial):
    assert cache.proven_here(GPU, "bfloat16", trial.folder) is None
    trial('form("begin_step", wrong="NaN"); tell("done")', subject=replace(SUBJECT, page_size=16))
    assert cache.proven_here(GPU, "bfloat16", trial.folder) is None
    trial(RIGHT)
    found = cache.proven_here(GPU, "bfloat16", trial.folder)
    assert found is not None and found.status == "proven"
    assert cache.proven_here(GPU, "float16", trial.folder) is None
    assert cache.proven_here(replace(GPU, driver="590.1"), "bfloat16", trial.folder) is None


# --- what stands in the way -----------------------------------------------------------------------------------------

IN_THE_WAY = [
    (replace(GPU, driver="470.1", driver_cuda=(11, 4)), "knows CUDA 11.4 and this torch needs 13.0"),
    (replace(GPU, hip="6.4", driver_cuda=None), "ROCm 6.4"),
    (replace(GPU, capability=(7, 5)), "capability 8.0 or newer, and Test GPU has 7.5"),
    (replace(GPU, compute_mode="prohibited"), "nvidia-smi -c DEFAULT"),
    (replace(GPU, mps=True), "MPS"),
]


@pytest.mark.parametrize(("device", "said"), IN_THE_WAY)
def test_a_device_on_which_nothing_can_be_tried(trial, device, said):
    verdict = trial(RIGHT, device=device)
    works(verdict)
    assert verdict.status == "not tried" and said in verdict.reason
    assert trial.starts() == 0 and verdict.stored is None


def test_exclusive_mode(trial, monkeypatch):
    """Alone, the trial has the device for itself; once this process uses it, it cannot."""
    device = replace(GPU, compute_mode="exclusive")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    verdict = trial(RIGHT, device=device)
    works(verdict)
    assert verdict.status == "not tried" and "exclusive mode" in verdict.reason
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert trial(RIGHT, device=device).status == "proven"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    verdict = trial(RIGHT, device=device)
    assert verdict.cached


def test_mps_is_tried_when_asked_for(trial):
    device = replace(GPU, mps=True)
    assert trial(RIGHT, device=device, asked=True).status == "proven"
    assert trial(RIGHT, device=device).cached


def test_a_model_whose_heads_do_not_fit_the_tile(trial):
    verdict = trial(RIGHT, subject=replace(SUBJECT, spec=replace(SPEC, n_heads=64, n_kv_heads=2)))
    works(verdict)
    assert verdict.status == "not tried" and "32 query heads" in verdict.reason


def test_no_compiler_is_found_before_a_trial(trial):
    verdict = trial(RIGHT, why_no_launch=lambda: "Triton needs a C compiler: install gcc")
    works(verdict)
    assert (verdict.status, verdict.reason) == ("not tried", "Triton needs a C compiler: install gcc")
    assert trial.starts() == 0


# --- the rules ------------------------------------------------------------------------------------------------------


def _tried(**microseconds: tuple[float, ...]) -> list[FormResult]:
    """All ops in their usual form in 10 µs; ``op_form`` in other times."""
    usual = [(op, "triton") for op in (*gate.ESSENTIAL, "silu_mul", "sample")]
    usual += [("linear", "reference"), ("embed", "reference")]
    ten = {"2": 10.0, "16": 10.0, "64": 10.0}
    others = []
    for name, times in microseconds.items():
        op, form = name.rsplit("_", 1)
        others.append(FormResult(op, form, microseconds=dict(zip(ten, times, strict=True))))
    return [*(FormResult(op, form, microseconds=ten) for op, form in usual), *others]


def test_another_form_must_be_faster_by_five_per_cent_and_nowhere_slower():
    for times, chosen in [
        ((9.4, 9.4, 9.4), "native"),
        ((9.6, 9.6, 9.6), "triton"),
        ((5.0, 5.0, 10.1), "triton"),
        ((5.0, 10.0, 10.0), "native"),
        ((20.0, 20.0, 20.0), "triton"),
    ]:
        assert choose_forms(_tried(sample_native=times))[0]["sample"] == chosen, times
    forms, _ = choose_forms(_tried(linear_native=(5.0, 5.0, 10.0), silu_mul_reference=(9.0, 9.0, 9.0)))
    assert (forms["linear"], forms["silu_mul"]) == ("native", "reference")
    assert ops.native.extension is None or ops.assemble(forms).backend == "native"


def test_the_fastest_of_three():
    forms, _ = choose_forms(_tried(sample_native=(8.0, 8.0, 8.0), sample_reference=(4.0, 4.0, 4.0)))
    assert forms["sample"] == "reference"


def test_an_essential_op_has_no_other_form():
    tried = [r for r in _tried(rope_append_native=(1.0, 1.0, 1.0)) if (r.op, r.form) != ("rope_append", "triton")]
    forms, why = choose_forms(tried)
    assert forms == {}
    assert why is not None and why.startswith("rope_append (triton)")


def test_what_was_never_timed_replaces_nothing():
    assert share({}, {"2": 1.0}) == share({"2": 1.0}, {}) == float("inf")
    assert choose_forms([*_tried(), FormResult("sample", "native")])[0]["sample"] == "triton"


def test_prefill_takes_the_fastest_right_path():
    def path(name: str, time: float, wrong: str | None = None) -> FormResult:
        return FormResult("prefill_attention", name, wrong, microseconds={"2": time})

    assert (
        choose_prefill([path("flash-attn 2", 10.0), path("torch varlen_attn", 9.8), path("sdpa", 20.0)])
        == "flash-attn 2"
    )
    assert choose_prefill([path("flash-attn 2", 10.0, "NaN"), path("torch varlen_attn", 12.0)]) == "torch varlen_attn"
    assert choose_prefill([]) is None


def test_times_do_not_count_where_they_cannot(trial):
    verdict = trial(
        'tell("facts", timed=False); essential(); rest()\n'
        'engine(False, microseconds={"step": 9.0, "reference": 1.0}); tell("done")'
    )
    assert verdict.status == "proven"


def test_str_names_what_is_unusual():
    forms = dict.fromkeys((*gate.ESSENTIAL, "silu_mul", "sample"), "triton") | {
        "linear": "native",
        "embed": "reference",
    }
    assert str(Qualification("proven", "", forms=forms, graphs=True)) == "proven on this device (linear native)"  # type: ignore[arg-type]
    assert str(Qualification("refused", "sample (triton): NaN")) == "refused: sample (triton): NaN"


# --- what Triton needs ----------------------------------------------------------------------------------------------


def fails(error: Exception):
    def build() -> bool:
        raise error

    return build


@pytest.fixture
def complete(tmp_path, monkeypatch):
    """A machine that has all that Triton needs."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_LIBCUDA_PATH", raising=False)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    (tmp_path / "Python.h").write_text("")
    (tmp_path / "libcuda.so.1").write_text("")
    ldconfig = tmp_path / "ldconfig"
    ldconfig.write_text(f"#!/bin/sh\necho '\tlibcuda.so.1 (libc6,x86-64) => {tmp_path}/libcuda.so.1'\n")
    ldconfig.chmod(0o755)
    monkeypatch.setattr(launching, "LDCONFIG", str(ldconfig))
    monkeypatch.setattr(launching.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(launching.sysconfig, "get_paths", lambda **k: {"include": str(tmp_path)})
    return tmp_path


def test_all_that_triton_needs_is_there(complete):
    assert launching.reason(lambda: True) is None
    assert launching.reason(lambda: False) is None


def test_no_compiler(complete, monkeypatch):
    monkeypatch.setattr(launching.shutil, "which", lambda name: None)
    said = launching.reason(fails(RuntimeError("Failed to find C compiler.")))
    assert said is not None and "install gcc or clang" in said
    # A Triton that compiles a launcher for every kernel needs it although its helper is in the cache; another does not.
    assert launching.reason(lambda: True) == said
    assert launching.reason(lambda: False) is None
    monkeypatch.setenv("CC", "/opt/cc")
    assert "CC='/opt/cc'" in str(launching.reason(lambda: True))


def test_no_python_h(complete):
    (complete / "Python.h").unlink()
    said = launching.reason(fails(subprocess.CalledProcessError(1, "gcc")))
    assert said is not None and "Python.h" in said and "-dev" in said


def test_no_ldconfig(complete, monkeypatch):
    monkeypatch.setattr(launching, "LDCONFIG", "/nonexistent/ldconfig")
    said = launching.reason(fails(FileNotFoundError("/sbin/ldconfig")))
    assert said is not None and "libc-bin" in said and "TRITON_LIBCUDA_PATH" in said


def test_no_libcuda(complete, monkeypatch):
    (complete / "libcuda.so.1").unlink()
    said = launching.reason(fails(AssertionError("libcuda.so cannot found!\n")))
    assert said is not None and "libcuda.so.1 is not found" in said
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", "/nowhere")
    assert "TRITON_LIBCUDA_PATH='/nowhere'" in str(launching.reason(fails(AssertionError())))


def test_another_failure_is_told_in_one_line(complete):
    said = launching.reason(fails(RuntimeError("0 active drivers ([]).\nThere should only be one.")))
    assert said == "Triton cannot build its launch helper: 0 active drivers ([])."


def test_the_real_helper_is_asked_for(monkeypatch):
    """On a machine without a GPU Triton itself says that there is no driver."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: the helper builds")
    with pytest.raises(RuntimeError, match="active drivers"):
        launching.build_helper()


def test_a_pinned_backend_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launching, "why_not", lambda: "Triton needs a C compiler: install gcc")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run here: .*install gcc"):
        ops.select("triton", torch.device("cuda", 0))
    assert ops.select("reference", torch.device("cuda", 0)).backend == "reference"


# --- what a runtime makes of it -------------------------------------------------------------------------------------


def test_choose_asks_only_for_auto_on_cuda(monkeypatch):
    asked: list[Any] = []
    forms = dict.fromkeys((*gate.ESSENTIAL, "silu_mul", "sample"), "triton") | {"linear": "reference"}
    verdicts = iter(
        [
            Qualification("proven", "right", "Test GPU", forms=forms, graphs=False),  # type: ignore[arg-type]
            Qualification("refused", "sample (triton): NaN", "Test GPU"),
        ]
    )
    monkeypatch.setattr(gate.device_facts, "read", lambda device: GPU)
    monkeypatch.setattr(gate, "qualify", lambda subject, device: asked.append(subject) or next(verdicts))
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend, device in (("auto", cpu), ("reference", cpu), ("reference", cuda)):
            assert gate.choose(backend, device, SUBJECT).qualification is None
        assert asked == []
        choice = gate.choose("auto", cuda, SUBJECT)
    assert (choice.ops.backend, choice.graphs) == ("triton", False)
    with pytest.warns(UserWarning, match="plain PyTorch operations on Test GPU: sample .triton.: NaN"):
        choice = gate.choose("auto", cuda, SUBJECT)
    assert choice.ops.backend == "reference"
    assert asked == [SUBJECT, SUBJECT]


def test_facts_of_a_machine_without_a_driver(monkeypatch):
    monkeypatch.setattr(facts.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert facts.by_driver(0) is None


def test_facts_by_the_driver_make_no_context(monkeypatch):
    """A driver in Python: only calls that create nothing."""
    called: list[str] = []

    class Driver:
        def __getattr__(self, name: str):
            def call(*arguments: Any) -> int:
                called.append(name)
                values = {20: 3, 75: 9, 76: 0}
                if name == "cuDeviceGetName":
                    arguments[0].value = b"Test GPU"
                elif name == "cuDeviceGetUuid":
                    arguments[0].raw = bytes(range(16))
                elif name == "cuDeviceTotalMem_v2":
                    arguments[0]._obj.value = 80 << 30
                elif name == "cuDeviceGetAttribute":
                    arguments[0]._obj.value = values[arguments[1]]
                elif name == "cuDriverGetVersion":
                    arguments[0]._obj.value = 13000
                return 0

            return call

    monkeypatch.setattr(facts.ctypes, "CDLL", lambda name: Driver())
    found = facts.by_driver(1)
    assert found is not None
    assert (found.name, found.index, found.capability, found.memory) == ("Test GPU", 1, (9, 0), 80 << 30)
    assert (found.driver_cuda, found.compute_mode) == ((13, 0), "exclusive")
    assert found.uuid == bytes(range(16)).hex()
    assert not [
        name for name in called if "Ctx" in name or "PrimaryCtx" in name or ("Mem" in name and "Total" not in name)
    ]


def test_an_engine_that_was_never_reached_proves_nothing():
    verdict = qualify.verdict.conclude(_tried(), [], True)  # type: ignore[attr-defined]
    assert verdict.status == "refused" and "not reached" in verdict.reason
    verdict = qualify.verdict.conclude(_tried(), [EngineResult(True, "NaN"), EngineResult(False)], True)  # type: ignore[attr-defined]
    assert verdict.status == "proven" and not verdict.graphs


# --- where it is told -------------------------------------------------------------------------------------------------


def proven(**changes: Any) -> Qualification:
    forms = dict.fromkeys((*gate.ESSENTIAL, "sample"), "triton")
    forms |= {"linear": "reference", "embed": "reference", "silu_mul": "reference"}
    tried = (
        FormResult("silu_mul", "triton", "1 element is off", 0.1),
        FormResult("sample", "triton", None, 1e-7, {"2": 20.0, "16": 21.0}),
        FormResult("prefill_attention", "sdpa", None, 1e-3, {"300": 90.0}),
    )
    engines = (EngineResult(False, None, {"step": 400.0, "reference": 900.0}),)
    found = Qualification(
        "proven", "without what was wrong here: silu_mul (triton): 1 element is off", "Test GPU", forms, "sdpa", False,
        tried, engines, 31.0, 1.7e9,
    )  # type: ignore[arg-type]  # fmt: skip
    return replace(found, **changes)


@pytest.fixture
def chosen(monkeypatch):
    """Runtimes on the CPU whose device is said to have proven ``proven()``, and what was asked for it."""
    from icon2_rt import models, runtime

    order: list[Any] = []
    take_weights = models.take_weights

    def choose(backend: str, device: torch.device, subject: Subject) -> gate.Choice:
        order.append((backend, subject))
        return gate.Choice(ops.Ops(), False, proven())

    monkeypatch.setattr(runtime, "choose", choose)
    monkeypatch.setattr(models, "take_weights", lambda *a: order.append("weights") or take_weights(*a))
    return order


def test_a_runtime_follows_the_verdict_before_its_weights_move(chosen):
    rt = Runtime(tiny_llama(), device="cpu", page_size=16, split_pages=2, max_terms=3)
    [(backend, subject), moved] = chosen
    assert (backend, moved) == ("auto", "weights")
    assert subject == Subject(rt.spec, "float32", 16, 2, 3)
    assert not rt.options.cuda_graphs
    assert rt.qualification == proven()
    assert "proven on this device (silu_mul reference, without graphs)" in repr(rt)


def test_a_runtime_on_a_cpu_has_nothing_to_prove():
    rt = Runtime(tiny_llama(), device="cpu")
    assert rt.qualification is None and rt.options.cuda_graphs
    assert "proven" not in repr(rt) and "tried" not in repr(rt)


def test_runs_name_what_decides_bytes_in_their_identity_and_the_verdict_beside_it(chosen, monkeypatch):
    """On CUDA alone: a run on a CPU has the bytes that it had."""
    from icon2_rt.pipeline import environment, manifest

    rt = Runtime(tiny_llama(), device="cpu")
    assert "ops" not in environment.machine(rt)
    monkeypatch.setattr(Runtime, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    found = environment.machine(rt)
    assert found["ops"] == {"forms": dict(sorted(proven().forms.items())), "prefill": "sdpa", "graphs": False}
    later = replace(proven(), when=1.8e9, seconds=9.0, reason="another sentence")
    assert later.chosen == proven().chosen
    brief = proven().brief()
    assert (brief["status"], brief["device"], brief["when"]) == ("proven", "Test GPU", "2023-11-14T22:13:20+00:00")
    assert "qualification" in inspect.signature(manifest.compose).parameters


def test_benchmark_files_name_the_verdict(monkeypatch):
    from bench import environment

    found = {torch.bfloat16: proven()}
    monkeypatch.setattr(environment.qualify, "stored", lambda device, dtype: found.get(dtype))
    told = environment._qualification(torch.device("cuda", 0))
    assert told == {"bfloat16": proven().brief()}
    found.clear()
    assert environment._qualification(torch.device("cuda", 0)) == "no verdict is stored"


def test_ops_of_torch_use_a_stored_verdict_and_never_try(trial, monkeypatch):
    from icon2_rt.ops import library

    library._ops_for.cache_clear()
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(gate.device_facts, "read", lambda device: GPU)
    monkeypatch.setattr(launching, "why_not", lambda: None)
    monkeypatch.setattr(cache, "folder", lambda: trial.folder)
    monkeypatch.setattr(gate, "qualify", lambda *a, **k: pytest.fail("a trial was started"))
    assert library._ops_for(cuda, torch.bfloat16).backend == "reference"
    monkeypatch.undo()
    assert trial(RIGHT).status == "proven"
    monkeypatch.setattr(gate.device_facts, "read", lambda device: GPU)
    monkeypatch.setattr(launching, "why_not", lambda: None)
    monkeypatch.setattr(cache, "folder", lambda: trial.folder)
    library._ops_for.cache_clear()
    assert library._ops_for(cuda, torch.bfloat16).backend == "triton"
    assert library._ops_for(cuda, torch.float16).backend == "reference"
    monkeypatch.setenv("ICON2_QUALIFY", "0")
    assert qualify.stored(cuda, torch.bfloat16) is None
    library._ops_for.cache_clear()


def test_the_table_shows_every_form(capsys):
    from icon2_rt import display

    display.console().print(display.qualification_table(replace(proven(), stored="/cache/a.json")))
    said = capsys.readouterr().out
    for word in ("silu_mul", "1 element is off", "2: 20.0, 16: 21.0", "sdpa", "without graphs", "step: 400",
                 "Test GPU: proven", "stored in /cache/a.json", "tried in 31 s"):  # fmt: skip
        assert word in said, word
    display.console().print(display.qualification_table(Qualification("not tried", "no compiler", "Test GPU")))
    assert "Test GPU: not tried" in capsys.readouterr().out


def test_doctor_tries_the_sizes_of_a_model(monkeypatch):
    from icon2_rt import doctor

    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.facts, "read", lambda device: GPU)
    monkeypatch.setattr(doctor.qualify, "qualify", lambda subject, here, **k: asked.append((subject, k)) or proven())
    assert doctor.qualified(None).status == "proven"
    assert doctor.qualified("tiny", dtype="bfloat16", again=True).status == "proven"
    (usual, how), (tiny, again) = asked
    assert usual == Subject(qualify.LLAMA_3_8B, "bfloat16")
    assert (how, again) == ({"asked": True, "again": False}, {"asked": True, "again": True})
    assert (tiny.dtype, tiny.spec.hidden_size, tiny.spec.head_dim) == ("bfloat16", 128, 32)
    with pytest.raises(ValueError, match="--dtype"):
        doctor.qualified(None, dtype="int8")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sizes_of_a_config_are_those_of_its_model(family):
    model = FAMILIES[family]()
    assert models.spec_of_config(model.config, models.family_of(model)) == models.read_spec(
        model, models.family_of(model)
    )


def test_doctor_says_what_each_device_has_proven_and_which_flash_attention_fits(monkeypatch):
    from icon2_rt import doctor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(doctor.facts, "read", lambda device: GPU)
    verdicts = {torch.bfloat16: replace(proven(), stored="/cache/a.json")}
    monkeypatch.setattr(doctor.qualify, "stored", lambda device, dtype: verdicts.get(dtype))
    [found] = doctor._proven()
    assert (found.name, found.advice) == ("cuda:0 bfloat16", "/cache/a.json")
    verdicts.clear()
    [found] = doctor._proven()
    assert found.value == "nothing yet" and "--qualify" in found.advice
    assert "[flash]" in doctor._flash(9) and "[flash2]" in doctor._flash(8)
    assert "no flash-attn" in doctor._flash(7)
    [_, device] = doctor._devices()
    assert "Test GPU, sm_90, 80 GiB, driver 580.65" in device.value
