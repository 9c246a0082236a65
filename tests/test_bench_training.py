"""The benchmark of training and costs: its parts in small, and what its document says of a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import results, training
from icon2_rt import Runtime, tiny
from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.runner import RunResult, run
from icon2_rt.tiny import oracle


@pytest.fixture(scope="module")
def opposing(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "given.txt").write_text("\n".join(training.instructions(8)))
    table = {
        "model": "tiny",
        "runtime": {"threads": 1, "kv_memory": "64MiB"},
        "instructions": {"file": str(folder / "given.txt")},
        "pairs": training.ANSWERS,
        "baseline": {"recipe": "opposing_prompts"},
    }
    return run(RunConfig.from_dict(table), folder / "opposing_prompts")


def test_instructions_are_the_world_s_and_the_oracle_grades_them(opposing: RunResult) -> None:
    asked = training.instructions(12)
    assert all(oracle.judge(text, "").kind is not None for text in asked)
    found = training.marks(Runtime.from_pretrained(tiny.path(), kv_memory="64MiB"), asked)
    assert found == training.marks(Runtime.from_pretrained(tiny.path(), kv_memory="64MiB"), asked)
    assert 0.3 < found["score"] < 1
    assert found["well_formed"] > 0.8
    assert 0 <= training._pairs_by_oracle(opposing)["chosen_better"] <= 1


def test_training_changes_the_model(opposing: RunResult) -> None:
    pytest.importorskip("trl")
    model, _, curve = training._train(opposing, seed=0)
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(tiny.path()).named_parameters())
    assert any(not p.detach().equal(before[name]) for name, p in model.named_parameters())
    assert all(0 <= accuracy <= 1 for _, accuracy in curve)


def test_the_document_says_what_is_saved(tmp_path: Path) -> None:
    def bill(name: str, once: float, total: float) -> dict[str, Any]:
        totals = dict.fromkeys(("all", "own", "paper"), total)
        return {"name": name, "answering": 2.0, "judging": 1.0, "once": once, "total": totals}

    seed = {"score": 0.7, "well_formed": 1.0, "reward_accuracy": [(5, 0.6), (10, 0.8)]}
    found = {"pairs": 10, "oracle": {"both_well_formed": 1.0, "chosen_better": 0.9}, "mean": 0.7, "seeds": [seed]}
    record = {
        "settings": {"training": training.TRAINING, "seeds": 1, "asked": 5},
        "untrained": {"score": 0.6, "well_formed": 1.0},
        "trained": {"icon2": found, "best_of_n": found},
        "costs": {"flops": [bill("icon2", 98.0, 101.0), bill("best_of_n", 0.0, 6.0)]},
        "steered_over_unsteered": {"ratio": 1.01},
        "ratio": 0.5,
    }
    text = results._training(record)
    # 98 a pair over 10 pairs is 0.01 over 98 000: 3.01 in place of 101, half of the baseline's 6.
    assert "| best_of_n | 2 | 1 | 0 | 6 (+50%) |" in text
    assert "| icon2 | 2 | 1 | 0.01 | 3.01 |" in text
    assert "0.60 → 0.80" in text
