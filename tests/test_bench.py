"""The benchmarks run: the one command for a GPU machine, dry on the CPU, and the arithmetic and verdicts behind it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import crossover, overhead, results, room, step, targets
from bench.check import compare, poisoned
from bench.roofline import BEST_SHARE, H100, H200, WORST_SHARE, Admission, Load
from bench.seats import Seating, Seats, attention_items, make_engine, requests
from bench.shapes import SHAPES, config, transformers_model
from icon2_rt import ops
from icon2_rt.models import family_of, read_spec, take_weights
from tools.refresh_readme import ROOT

STAGES = ("qualify", "micro", "step", "overhead", "crossover", "e2e", "sanitize")


def gpu_sh(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # A run of its own also where these tests are spread over processes: in one of those nothing is timed.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", ROOT / "bench" / "gpu.sh", out, *arguments]
    return subprocess.run(command, cwd=out.parent, env=env, capture_output=True, text=True, check=False)


# --- the one command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("dry") / "out"
    done = gpu_sh(out, "--dry")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return out, done


def test_every_stage_runs_and_the_table_comes_last(dry):
    out, done = dry
    for name in ("tests", *STAGES):
        assert f"== {name}: done in" in done.stdout
    assert (out / "table.txt").read_text() == done.stdout[-len((out / "table.txt").read_text()) :]
    assert "0 stage(s) failed" in done.stdout


def test_what_is_left(dry):
    out, _ = dry
    names = sorted(path.name for path in out.iterdir())
    kinds = [name.split("-")[0] for name in names if name.endswith(".json")]
    assert kinds == ["crossover", "micro", "overhead", "pairs", "qualify", "step"]
    assert [name for name in names if not name.endswith(".json")] == [
        "log.txt",
        "sanitize.log",
        "table.txt",
        "tests.log",
    ]


def test_the_lane_ran_and_nothing_in_it_failed(dry):
    log = (dry[0] / "tests.log").read_text()
    assert " passed" in log
    assert " failed" not in log
    assert "there are no CUDA graphs without a CUDA GPU" in log


def test_the_records_hold_what_a_figure_needs(dry):
    out, _ = dry
    records = {path.name.split("-")[0]: json.loads(path.read_text()) for path in out.glob("*.json")}
    for record in records.values():
        assert record["environment"]["versions"]["torch"] == torch.__version__
        assert record["figures"]
    for name in ("step", "overhead"):
        found = [figure["status"] for figure in records[name]["figures"]]
        assert found[:-1] == ["measured"] * (len(found) - 1)
        assert found[-1].startswith("does not fit: ")  # the last cell is too large on purpose
        assert records[name]["copy"]["gb_per_second"] > 0
    # What is stored is what RESULTS.md is made from.
    text = results.report(list(records.items()))
    for title in (
        "What the kernels have proven on a device",
        "A decode step",
        "What steering, branches and sharing cost",
        "Where sharing the prompt's KV pays",
        "The ops one by one",
    ):
        assert f"## {title}\n" in text
    assert "8 sequential branches over a ladder of 8" in text


def test_a_stage_that_takes_too_long_is_stopped_and_the_rest_goes_on(tmp_path):
    done = gpu_sh(tmp_path / "out", "--dry", "sanitize", STAGE_SECONDS="1")
    assert done.returncode == 1
    assert "sanitize: stopped by the watchdog" in done.stdout
    assert "1 stage(s) failed: sanitize" in done.stdout
    assert "not measured" in done.stdout  # the table, in spite of all


# What a lane of tests/gpu could be on a bad day. Its own conftest.py stands beside it.
FAULTY = """
    def test_before():
        assert 1 + 1 == 3, "an ordinary failure"

    def test_fault():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def test_after():
        print("it ran in another process")
"""
SOUND = "def test_sound(): pass"
SLOW = """
    import time

    def test_before():
        assert 1 + 1 == 3, "an ordinary failure"

    def test_slow():
        time.sleep(60)
"""


@pytest.fixture
def lane(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the stage ``tests`` over files that are given here."""

    def run(environment: dict[str, str], **files: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "lane"
        folder.mkdir()
        for path in ("tests/gpu/conftest.py", "pyproject.toml"):
            shutil.copy(ROOT / path, folder)
        for name, code in files.items():
            (folder / f"test_{name}.py").write_text(textwrap.dedent(code))
        return gpu_sh(tmp_path / "out", "--dry", "tests", GPU_LANE=str(folder), **environment)

    return run


def test_a_cuda_fault_ends_its_process_and_another_goes_on_behind_it(lane, tmp_path):
    done = lane({}, faulty=FAULTY, sound=SOUND)
    assert done.returncode == 1
    assert "1 stage(s) failed: tests" in done.stdout
    log = (tmp_path / "out" / "tests-faulty.log").read_text()
    assert "CUDA fault: illegal memory access in" in log
    assert "2 failed" in log
    assert "1 passed, 2 deselected" in log
    assert "an ordinary failure" in log
    assert "1 passed" in (tmp_path / "out" / "tests-sound.log").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "log.txt", "table.txt", "tests-faulty.log", "tests-sound.log"
    ]  # fmt: skip


def test_a_lane_that_is_stopped_reports_what_had_failed(lane, tmp_path):
    done = lane({"STAGE_SECONDS": "6"}, slow=SLOW)
    assert done.returncode == 1
    assert "tests: stopped by the watchdog" in done.stdout
    assert "an ordinary failure" in (tmp_path / "out" / "tests-slow.log").read_text()


def test_without_plugins_the_lane_runs_and_micro_says_what_is_missing(lane, tmp_path):
    done = lane({"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, sound=SOUND)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in (tmp_path / "out" / "tests-sound.log").read_text()
    done = gpu_sh(tmp_path / "out", "--dry", "micro", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 1
    assert "lacks pytest-benchmark: pip install 'icon2_rt[test]'" in done.stdout


PYTHON = """
    #!/bin/sh
    if [ "$1 $2" = "-m pip" ]; then
      echo "pip: CUDA=${{ICON2_CUDA-}} NATIVE=${{ICON2_NATIVE-}}" >> {log}
      {pip}
    fi
    exec {python} "$@"
"""


@pytest.mark.parametrize(
    ("pip", "told"),
    [("echo 'externally managed' >&2; exit 1", "pip's exit code is 1"), ("exec sleep 60", "pip was stopped after")],
)
def test_without_pip_everything_runs_in_the_checkout(pip, told, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("bench", "kernels", "tests", "tools", "pyproject.toml"):
        (tree / name).symlink_to(ROOT / name)
    (tree / "bench").unlink()  # the script finds its checkout by its own place
    shutil.copytree(ROOT / "bench", tree / "bench", ignore=shutil.ignore_patterns("results", "models", "__pycache__"))
    (tree / "icon2_rt").mkdir()
    for path in (ROOT / "icon2_rt").iterdir():
        if path.name != "kernels":
            (tree / "icon2_rt" / path.name).symlink_to(path)
    python = tmp_path / "python"
    code = textwrap.dedent(PYTHON).lstrip().format(pip=pip, log=tmp_path / "pip.txt", python=sys.executable)
    python.write_text(code)
    python.chmod(0o755)
    command = ["bash", tree / "bench" / "gpu.sh", tmp_path / "out", "prepare", "--dry"]
    env = os.environ | {"PYTHON": str(python), "OMP_NUM_THREADS": "1", "PREPARE_SECONDS": "9"}
    for again in (False, True):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("nothing is installed, it runs in the checkout" in done.stdout) is not again
        assert done.stdout.count(told) == (0 if again else 3)
    tried = (tmp_path / "pip.txt").read_text().splitlines()
    assert tried == ["pip: CUDA= NATIVE=1", "pip: CUDA=0 NATIVE=", "pip: CUDA= NATIVE=0"]


@pytest.mark.parametrize("arguments", [(), ("OUT", "sing"), ("OUT", "--wet")])
def test_a_wrong_command_says_what_would_be_right(arguments, tmp_path):
    command = ["bash", ROOT / "bench" / "gpu.sh", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "bash bench/gpu.sh OUT [prepare|qualify|tests|micro|step|overhead|crossover|e2e|sanitize] [--dry]\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a CUDA GPU")
@pytest.mark.parametrize("stage", [step, overhead])
def test_without_a_gpu_only_the_dry_run_runs(stage, tmp_path, capsys):
    for arguments, why in ([], "needs a CUDA GPU"), (["--dry"], "--out FOLDER"):
        with pytest.raises(SystemExit) as refused:
            stage.main(arguments)
        assert refused.value.code == 2
        assert why in capsys.readouterr().err


def test_out_of_time_is_recorded(tmp_path):
    step.main(["--dry", "--limit", "-1", "--out", str(tmp_path / "step.json")])
    figures = json.loads((tmp_path / "step.json").read_text())["figures"]
    assert {figure["status"] for figure in figures} == {"not reached: out of time"}


# --- what is measured ------------------------------------------------------------------------------------------------


def test_a_shape_has_the_sizes_it_says():
    model = transformers_model("dry", torch.device("cpu"), torch.float32)
    assert read_spec(model, family_of(model)) == SHAPES["dry"]
    weights = take_weights(model, family_of(model), torch.device("cpu"), keep_model=False)
    read = sum(t.numel() for layer in weights.layers for t in (layer.qkv, layer.o, layer.gate_up, layer.down))
    assert Load(SHAPES["dry"], 1, 2, 8, itemsize=1).weights == read + weights.lm_head.numel()


@pytest.mark.parametrize("name", ["llama3-8b", "qwen2-7b", "qwen2-1.5b"])
def test_a_configuration_of_a_real_size_is_supported(name):
    made = config(name, torch.bfloat16)
    assert made.hidden_size // made.num_attention_heads == SHAPES[name].head_dim
    assert not getattr(made, "use_sliding_window", False)


def test_a_pair_pushes_both_ways_and_a_ladder_is_one_group():
    class Sizes:
        class model:
            spec = SHAPES["dry"]

    pair = requests(Seating("dry", 3), Sizes, 4)  # type: ignore[arg-type]
    assert [len(r.branches) for r in pair] == [2, 2, 2]
    plus, minus = (branch.steering for branch in pair[0].branches)
    assert plus is not None
    assert minus is not None
    assert torch.equal(plus.alpha, -minus.alpha)
    alone = requests(Seating("dry", 3, shared=False), Sizes, 4)  # type: ignore[arg-type]
    assert [len(r.branches) for r in alone] == [1] * 6
    ladder = requests(Seating("dry", 1, branches=8, distinct=4), Sizes, 4)  # type: ignore[arg-type]
    assert len({id(branch.steering) for branch in ladder[0].branches}) == 4


@pytest.mark.parametrize("model", overhead.MODELS)
def test_every_target_has_its_comparison(model):
    made = overhead.comparisons(model)
    assert len({(c.name, c.over) for c in made}) == len(made)
    named = [{"model": model, "name": c.name, "rows": c.over.rows, "groups": c.over.groups, "prompt": c.over.prompt,
              "status": "not reached: out of time"} for c in made]  # fmt: skip
    record = {"benchmark": "overhead", "figures": named}
    size = "8B" if model == "llama3-8b" else "1.5B"
    for target in targets.TARGETS:
        if target.benchmark == "overhead" and (
            target.name.startswith(size) or (size == "8B" and ":" not in target.name)
        ):
            assert list(target.read(record)), target.name


def test_pages_are_shared_and_counted():
    spec = SHAPES["dry"]
    items, n_pages, read = attention_items(spec, 3, 2, 100, 21, 16, 4, torch.device("cpu"))
    # 6 full pages a prompt are shared; 121 positions are 8 pages, so each of the 6 rows has 2 of its own.
    assert n_pages == 3 * 6 + 6 * 2
    assert read == 3 * 96 + 6 * 25
    lengths = items.lengths.tolist()
    rows_of = (items.rows >= 0).sum(dim=1).tolist()
    assert sum(n * m for n, m in zip(lengths, rows_of, strict=True)) == 6 * 121
    assert items.n_splits.tolist() == [2] * 6


# --- predictions, checks, verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "prompt", "unshared", "shared"),
    [(1, 256, 3.51, 3.51), (8, 2048, 4.55, 4.05), (32, 8192, 19.7, 11.7), (32, 2048, 7.74, 5.74)],
)
def test_the_roofline_is_the_sum_that_one_does_by_hand(pairs, prompt, unshared, shared):
    """Weights and KV alone at 4.3 TB/s, 128 tokens generated: worked out beforehand."""
    for expected, together in ((unshared, False), (shared, True)):
        load = Load(SHAPES["llama3-8b"], pairs, 2, prompt, generated=128, shared=together)
        assert 1e3 * (load.weights + load.kv) / H200.copy == pytest.approx(expected, rel=0.01)
        assert load.milliseconds(H200) > expected


def test_what_is_wrong_shows_in_the_comparison():
    x = torch.randn(4, 8)

    def forgets(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[:3] = 2 * x[:3]
        return out

    assert compare(lambda x: 2 * x, lambda x: 2 * x, (x,)) == {"error": 0.0, "unequal": 0.0}
    assert compare(lambda x: 2.1 * x, lambda x: 2 * x, (x,))["error"] == pytest.approx(0.05, rel=1e-4)
    error = compare(forgets, lambda x: 2 * x, (x,))["error"]
    assert error != error  # NaN: the row that it forgot is poison
    assert compare(lambda x: x.zero_(), lambda x: x, (x,))["error"] == pytest.approx(1.0)  # what it writes into counts
    assert not torch.are_deterministic_algorithms_enabled()
    with poisoned():
        assert bool(torch.empty(5).isnan().all())


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("8B: all blocks steered over unsteered", 1.004, "reached"),
        ("8B: all blocks steered over unsteered", 1.0125, "missed by 0.25 points"),
        ("8 sequential branches over a ladder of 8", 5.5, "missed by 0.50×"),
        ("8 sequential branches over a ladder of 8", 7.9, "reached"),
        ("one 8B pair, of the copy's bandwidth", 0.7, "missed by 5.00 points"),
    ],
)
def test_verdicts(name, value, verdict):
    (target,) = [t for t in targets.TARGETS if t.name == name]
    assert target.verdict(value) == verdict


def test_the_table_of_targets():
    def figure(name: str, **more: Any) -> dict[str, Any]:
        return {"model": "llama3-8b", "name": name, "rows": 64, "groups": 32, "prompt": 2048, **more}

    figures = [
        figure("unshared over shared", status="measured", ratio={"median": 1.3}),
        figure("unshared over shared", prompt=8192, status="does not fit: 68 GiB of KV, and there are 57"),
    ]
    on_gpu = {"gpu": {"name": "a GPU"}}
    record = {"benchmark": "overhead", "settings": {}, "environment": on_gpu, "figures": figures}
    lines = {line[0]: line for line in targets.table([record])}
    assert lines["unshared over shared, 32 × 2048"][2:] == ("at least 1.25×", "1.30×", "reached")
    assert lines["unshared over shared, 32 × 8192"][3:] == (figures[1]["status"], "not measured")
    assert lines["a pair over a single branch"][1:] == ("", "at most 1.10×", "", "not measured")
    # A CPU's figures are not held to them.
    record["environment"] = {"gpu": None}
    assert all(line[-1] == "not measured" for line in targets.table([record]))


@pytest.mark.parametrize("free", [79, 23, 10, 3])
def test_a_smaller_card_measures_smaller_decoders_and_says_so(free):
    asked = ["llama3-8b", "qwen2-7b"]
    chosen, told = room.fitting(asked, room.step_needs, free * room.GIB)
    assert chosen == {79: asked, 23: asked, 10: ["qwen2-1.5b", "llama3.2-1b"], 3: []}[free]
    assert list(told) == [name for name in asked if name not in chosen]
    assert all(room.step_needs(name) <= free * room.GIB for name in chosen)
    for name, why in told.items():
        assert f"needs {room.step_needs(name) / room.GIB:.1f} GiB, and {free:.1f} are free" in why
    # Two copies of the weights and two caches: 44 GB at 8B's sizes.
    assert 40 < room.pairs_needs("llama3-8b") / room.GIB < 48
    assert room.fitting(["llama3-8b"], room.pairs_needs, free * room.GIB)[0] == {
        79: ["llama3-8b"], 23: ["qwen2-1.5b"], 10: [], 3: []
    }[free]  # fmt: skip


def test_one_pair_on_an_h100_as_it_was_estimated_by_hand():
    """15.0 GB at 92 and 82 % of 3.0 TB/s, 129 products behind a gap of 1.3 µs, 199 small kernels of 2.75 µs, 32 blocks
    that wait 1 µs: 6.2 to 6.9 ms."""
    load = Load(SHAPES["llama3-8b"], 1, 2, 2048, terms=1)
    assert load.launch_seconds == pytest.approx(129 * 1.3e-6 + 199 * 2.75e-6)
    best, worst = (load.milliseconds(H100, share) for share in (BEST_SHARE, WORST_SHARE))
    assert 6.2 < best < load.milliseconds(H100) < worst < 6.95


def test_what_joins_together_shares_a_pass():
    load = Load(SHAPES["llama3-8b"], 32, 2, 64, generated=128, terms=1)
    alone, four = Admission(load, 1), Admission(load, 4)
    assert alone.pass_milliseconds(H100) == pytest.approx(7.1)  # the host's 7 ms and the copies of a join
    assert four.pass_milliseconds(H100) == pytest.approx(7.1)
    assert four.share(H100, 256) < 0.35 * alone.share(H100, 256)
    long = replace(load, prompt=2048)  # 2 · 7.5e9 · 2048 products at three quarters of 790 TFLOPS
    assert Admission(long, 1).pass_milliseconds(H100) == pytest.approx(52, rel=0.01)


# --- sharing beside not sharing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [64, 300])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_rows_that_read_alone_get_what_rows_that_read_together_get(backend, prefix):
    cpu = torch.device("cpu")
    if (why := ops.available(cpu)[backend]) is not None:
        pytest.skip(why)
    cell = crossover.Cell("attention", "dry", backend, prefix, 5)
    sides = crossover.attention_sides(cell, cpu)
    for _ in range(3):
        torch.testing.assert_close(sides.shared(), sides.unshared())


def test_items_apart_are_one_rows_each():
    items, *_ = attention_items(SHAPES["dry"], 2, 5, 300, 21, 16, 4, torch.device("cpu"))
    split = crossover.apart(items)
    assert (split.rows >= 0).sum(dim=1).tolist() == [1] * int(split.count)

    def read(items):
        """(row, split, pages, length) of everything that is read."""
        return sorted(
            (row, split, tuple(pages), length)
            for rows, split, pages, length in zip(
                items.rows.tolist(), items.splits.tolist(), items.pages.tolist(), items.lengths.tolist(), strict=True
            )
            for row in rows
            if row >= 0
        )

    assert read(split) == read(items)
    assert int(split.count) == len(read(items)) > int(items.count)


def test_a_step_of_a_cell_begins_where_it_began():
    engine = make_engine("dry", torch.device("cpu"), 4, kv_memory="8MiB", exact=True)
    seats = Seats(engine)
    batch = seats.take(Seating("dry", 1, 3, prompt=300), budget=crossover.STEPS + 2)
    batch._lay_out()
    assert batch._inputs is not None
    state = batch._inputs.state
    positions, found = state.positions.tolist(), []
    sides = crossover.step_sides(engine, batch._inputs)
    for side in (sides.shared, sides.unshared):
        for _ in range(3):
            side()
            assert state.positions.tolist() == [position + 1 for position in positions]
            found.append(state.tokens.tolist())
    assert found == [found[0]] * 6
    seats.leave()


def test_the_interval_of_a_median():
    assert crossover.interval([1.0, 2.0, 3.0]) == (1.0, 3.0)
    # 25 values: P(at most 5 of them below the median) = 0.2 %, at most 6 = 0.7 %.
    assert crossover.interval([float(n) for n in range(25)]) == (5.0, 19.0)


def test_sharing_is_held_to_its_worst_cell():
    def cell(branches: int, high: float, prefix: int = 256) -> dict[str, Any]:
        ratio = {"median": high - 0.1, "low": high - 0.2, "high": high}
        return {"what": "step", "model": "m", "backend": "b", "prefix": prefix, "branches": branches, "ratio": ratio,
                "status": "measured"}  # fmt: skip

    record = {
        "benchmark": "crossover",
        "settings": {"split": 128},
        "environment": {"gpu": {"name": "a GPU"}},
        "figures": [cell(2, 1.2), cell(4, 0.97), cell(8, 0.5, prefix=64)],  # the last has nothing to share
    }
    lines = {line[0]: line for line in targets.table([record])}
    found = lines["reading a prompt together over alone, a step"]
    assert found[1] == "m, b, 4 branches over 256 tokens, the worst of 2"
    assert found[3:] == ("0.97×", "missed by 0.03×")


def test_rows_that_have_no_seats_are_refused():
    engine = make_engine("dry", torch.device("cpu"), max_rows=4)
    seats = Seats(engine)
    seats.take(Seating("dry", 2, prompt=20), budget=8).launch()
    seats.leave()
    assert engine.kv.free_pages == engine.kv.n_pages
    with pytest.raises(ValueError, match="6 rows and 6 partial results do not go into a batch of 4"):
        seats.take(Seating("dry", 3, prompt=20), budget=8)
    assert "does not fit" in str(seats.missing(Seating("dry", 200, prompt=300), budget=8))


def test_steering_off_is_a_step_without_steering():
    """What "idle" and "on" are held against: the same buffers, the same rows, no steering argument."""
    engine = make_engine("dry", torch.device("cpu"), max_rows=4)
    seats = Seats(engine)
    seen = []
    add = engine.model.ops.add_steer_rmsnorm

    def spy(x, residual, weight, eps, steering=None, *rest):
        seen.append(steering is not None)
        return add(x, residual, weight, eps, steering, *rest)

    engine.model = replace(engine.model, ops=replace(engine.model.ops, add_steer_rmsnorm=spy))
    for steering, expected in (("off", False), ("idle", True), ("on", True)):
        seen.clear()
        seats.take(Seating("dry", 2, prompt=20, steering=steering), budget=8).launch()
        seats.leave()
        assert any(seen) is expected
