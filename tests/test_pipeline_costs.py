"""Costs: the counts against torch's own counter, the formula against the paper's figures, the accountings by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from icon2_rt import Direction, Runtime
from icon2_rt.models import read_spec
from icon2_rt.models.llama import LLAMA
from icon2_rt.pipeline import costs
from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.runner import RunResult, run
from icon2_rt.usage import Work
from tests.models import random_vectors, tiny_llama, tiny_tokenizer
from tests.test_cli import Icon2, icon2  # noqa: F401  # the fixture


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return Runtime(tiny_llama(), tiny_tokenizer(), kv_memory="32MiB")


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 6}, {"head_dim": 16, "intermediate_size": 96}])
def test_flops_are_those_that_torch_counts(options: dict[str, Any]) -> None:
    """torch counts attention over the whole square, and the head at every position."""
    model, n = tiny_llama(**options), 37
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(n)[None])
    counted = Work(prefilled=n, attended=n * n, logits=n).counts()
    rotary = 4 * 2 * n * model.config.hidden_size  # cos and sin come of one matrix product, which is not counted
    assert costs.flops(counted, read_spec(model, LLAMA)) == pytest.approx(counter.get_total_flops(), abs=rotary)


def test_what_is_asked_of_a_runtime_is_counted(rt: Runtime) -> None:
    rt.usage.take()
    u = Direction("u", random_vectors(4, 48, seed=0))
    rt.usage.begin("pairs")
    [pair] = rt.generate_pairs([[5, 6, 7, 8]], positive=0.1 * u, negative=-0.1 * u, max_new_tokens=3, do_sample=False)
    assert len(pair.positive.token_ids) == len(pair.negative.token_ids) == 3
    with rt.usage.during("figures"):
        rt.score([[5, 6, 7, 8]], [[9, 10]])
    rt.project([[5, 6], [5, 6, 7]], [u])
    with rt.usage.during("pinned"), rt.prefix([5, 6, 7]) as prefix:
        rt.hidden_states([[8], [9, 9]], prefix=prefix)
    found = rt.usage.take()
    assert set(found) == {"pairs", "figures", "pinned"}
    # The prompt but its last token once (1 + 2 + 3), that token and two more in each branch (4 + 5 + 6).
    assert found["pairs"].counts() == {
        "prefilled": 3 + 5, "decoded": 6, "scored": 0, "attended": 6 + 2 * 15 + 3 + 6, "logits": 6,
    }  # fmt: skip
    assert found["figures"].counts() == {"prefilled": 4, "decoded": 0, "scored": 2, "attended": 21, "logits": 2}
    assert found["pinned"].counts() == {"prefilled": 3 + 1 + 2, "decoded": 0, "scored": 0, "attended": 19, "logits": 0}
    assert all(work.seconds > 0 for work in found.values())
    rt.project([[5, 6]], [u])
    assert rt.usage.take() == {}  # nobody said what it was for


def test_the_formula_gives_the_paper_s_figures() -> None:
    """Hours for 100 000 instructions there: 24.8 an unsteered response, 30.8 a steered one, 10.8 directions and scores;
    self-rewarding judges in 15.6, best-of-5 in 7.2."""
    scoring, own, reward = 10.8 / 24.8, 15.6 / 24.8, 7.2 / 24.8
    overhead = 30.8 / 24.8 - 1
    printed = costs.saving(0, overhead=overhead, scoring=scoring, judging=own)
    assert printed == pytest.approx(0.481, abs=0.002)
    assert costs.saving(0, overhead=overhead, scoring=scoring, judging=reward) == pytest.approx(0.448, abs=0.002)
    assert costs.saving(0, scoring=scoring, judging=own) == pytest.approx(0.567, abs=0.002)
    assert costs.saving(0, judging=own) == pytest.approx(0.645, abs=0.002)
    # Ten instructions a pair, each a third of a response, written for everybody.
    assert costs.saving(1 / 3) == pytest.approx(0.36, abs=0.005)
    assert costs.saving(1 / 3, baseline_draws=1) == pytest.approx(0, abs=1e-12)


def test_the_accountings() -> None:
    mine = costs.Bill(
        writing=3, draws=10, usable=1.25, scoring=0.5, scored=8, answering=20, judging=0, once=1, steered=True
    )
    assert mine.total("all", 10) == mine.total("own", 10) == 20 + 1 + 30 + 8 * 0.5
    assert mine.total("paper", 10) == 20 + 1 + 0.5
    theirs = costs.Bill(
        writing=3, draws=2, usable=1.25, scoring=0, scored=0, answering=50, judging=7, once=0, steered=False
    )
    assert theirs.total("all", 10) == 57 + 30
    assert theirs.total("own", 10) == 57 + 1.25 * 3
    assert theirs.total("paper", 10) == 57


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, RunResult, RunResult]:
    """The method, opposing prompts on the instructions that it kept, and best-of-n on instructions of its own."""
    folder = tmp_path_factory.mktemp("costs")
    (folder / "judge.py").write_text("def longest(instructions, responses):\n    return [len(r) for r in responses]\n")
    common: dict[str, Any] = {"model": "tiny", "runtime": {"threads": 1, "kv_memory": "64MiB"}}
    drawn = {"draws": 24, "max_new_tokens": 48, "shard_size": 16}
    steered = {
        **common,
        "criteria": ["honesty", "harmlessness"],
        "directions": {"features": 8},
        "instructions": drawn,
        "filter": {"keep": 0.5},
        "pairs": {"max_new_tokens": 32, "positive": 0.3, "negative": -0.3},
    }
    method = run(RunConfig.from_dict(steered), folder / "icon2")
    opposing = {**common, "instructions": {"file": "icon2/kept.jsonl"}, "pairs": {"max_new_tokens": 32}}
    best = {**common, "instructions": drawn, "pairs": {"max_new_tokens": 32}}
    return (
        method,
        run(RunConfig.from_dict({**opposing, "baseline": {"recipe": "opposing_prompts"}}, folder=folder), folder / "a"),
        run(
            RunConfig.from_dict(
                {**best, "baseline": {"recipe": "best_of_n", "judge": "judge.py:longest"}}, folder=folder
            ),
            folder / "b",
        ),
    )


def test_seconds_are_read_from_a_log_that_was_torn_or_is_gone(tmp_path: Path) -> None:
    work = json.dumps({"event": "work", "step": "pairs", "seconds": 2.0, "peak_bytes": 7})
    assert costs.clock(tmp_path) == {}
    (tmp_path / "log.jsonl").write_bytes(f"{work}\n{work[:20]}{work}\n[1]\n{work}\n\xff\n".encode("latin-1"))
    assert costs.clock(tmp_path) == {"pairs": {"seconds": 4.0, "peak_bytes": 7}}


def test_a_run_accounts_for_its_steps(runs: tuple[RunResult, RunResult, RunResult]) -> None:
    method, opposing, best = runs
    steps = method.report["costs"]["steps"]
    assert set(steps) == {"features", "directions", "synthesis", "scoring", "strengths", "pairs", "figures", "checks"}
    records = list(method.records())
    assert steps["pairs"]["decoded"] == sum(r["chosen_tokens"] + r["rejected_tokens"] for r in records)
    assert steps["figures"]["scored"] == steps["pairs"]["decoded"]
    assert steps["scoring"]["decoded"] == steps["directions"]["decoded"] == 0
    assert steps["pairs"]["flops"] > 0
    clock = costs.clock(method.path)
    assert set(clock) >= set(steps)
    assert all(step["seconds"] > 0 for step in clock.values())
    assert max(step["peak_bytes"] for step in clock.values()) > 2**20
    assert opposing.report["costs"]["steps"]["pairs"]["decoded"] == sum(
        r["chosen_tokens"] + r["rejected_tokens"] for r in opposing.records()
    )
    pairs = best.report["costs"]["steps"]["pairs"]
    assert pairs["decoded"] > sum(r["chosen_tokens"] + r["rejected_tokens"] for r in best.records())  # five, not two


def test_the_comparison(runs: tuple[RunResult, RunResult, RunResult]) -> None:
    method, opposing, best = runs
    rows = costs.compare(method, [opposing, best])
    assert [row["name"] for row in rows] == ["icon2", "opposing_prompts", "best_of_n"]
    mine, theirs, bests = rows
    counts = method.report["counts"]["instructions"]
    steps = method.report["costs"]["steps"]
    n = method.report["counts"]["pairs"]
    once = sum(steps[step]["flops"] for step in costs.ONCE) / n
    everything = once + sum(steps[step]["flops"] for step in ("pairs", "synthesis", "scoring")) / n
    assert mine["total"]["all"] == mine["total"]["own"] == pytest.approx(everything)
    writing = steps["synthesis"]["flops"] / counts["drawn"]
    assert theirs["total"]["paper"] == pytest.approx(opposing.report["costs"]["steps"]["pairs"]["flops"] / n)
    assert theirs["total"]["all"] == pytest.approx(theirs["total"]["paper"] + writing * counts["drawn"] / n)
    assert theirs["total"]["own"] == pytest.approx(
        theirs["total"]["paper"] + writing * counts["drawn"] / counts["clean"]
    )
    for row in rows:
        for accounting in costs.ACCOUNTINGS:
            assert row["saving"][accounting] == pytest.approx(1 - mine["total"][accounting] / row["total"][accounting])
    assert bests["answering"] > theirs["answering"]
    [spread, *_] = costs.compare(method, [], spread=100 * n)
    assert spread["once"] == pytest.approx(mine["once"] / 100)
    assert 0 < costs.ratio(method) < 5
    with pytest.raises(ValueError, match="is a baseline: name the method's own run first"):
        costs.compare(opposing, [method])
    with pytest.raises(ValueError, match="is no baseline's run"):
        costs.compare(method, [method])


def test_the_command(icon2: Icon2, runs: tuple[RunResult, RunResult, RunResult], tmp_path: Path) -> None:  # noqa: F811
    paths = [result.path for result in runs]
    for unit in costs.UNITS:
        code, out, err = icon2("costs", *paths, "--unit", unit, "--pairs", 1000)
        assert code == 0, err
        assert "best_of_n" in out
        assert f"A pair's cost in {unit}" in out
    assert icon2("costs", *paths, "--unit", "dollars")[0] == 2
    assert icon2("costs", *paths, "--pairs", 0)[0] == 2
    code, _, err = icon2("costs", tmp_path)
    assert code == 2
    assert "no manifest.json" in err


def test_a_reward_model_s_tokens_are_on_the_bill(tmp_path: Path) -> None:
    from tests.test_pipeline_baselines import _save_classifier

    _save_classifier(tmp_path / "reward", 1)
    (tmp_path / "given.txt").write_text("Why?\nHow?\n")
    config = {
        "model": "tiny",
        "runtime": {"threads": 1, "kv_memory": "64MiB"},
        "instructions": {"file": str(tmp_path / "given.txt")},
        "pairs": {"max_new_tokens": 8},
        "baseline": {"recipe": "best_of_n", "judge": str(tmp_path / "reward"), "samples": 3},
    }
    report = run(RunConfig.from_dict(config), tmp_path / "run").report
    judge = report["costs"]["judge"]
    assert judge["tokens"] > 2 * 3
    parameters = json.loads((tmp_path / "run/steps/pairs-00000.json").read_text())["facts"]["judge"]["parameters"]
    assert judge["flops"] == 2 * parameters * judge["tokens"]
