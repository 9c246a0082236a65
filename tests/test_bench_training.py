"""The benchmark of training and costs: its parts in small, and what its document says of a record."""

from __future__ import annotations

from typing import Any

import pytest

from bench import results, seconds, training
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
    model, _, curve = training._train(opposing, tiny.path(), seed=0)
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(tiny.path()).named_parameters())
    assert any(not p.detach().equal(before[name]) for name, p in model.named_parameters())
    assert all(0 <= accuracy <= 1 for _, accuracy in curve)


def test_the_document_says_what_is_saved_and_how_far_the_spread_goes() -> None:
    def bill(name: str, once: float, total: float) -> dict[str, Any]:
        totals = dict.fromkeys(("all", "own", "paper"), total)
        return {"name": name, "answering": 2.0, "judging": 1.0, "once": once, "total": totals}

    def seed(score: float, *curve: float) -> dict[str, Any]:
        accuracy = [(4 * (k + 1), value) for k, value in enumerate(curve)]
        return {"score": score, "well_formed": 1.0, "kinds": {"task": score}, "reward_accuracy": accuracy}

    judged = {"both_well_formed": 1.0, "chosen_better": 0.9, "chosen": 0.8, "rejected": 0.3}
    dataset = {"pairs": 10, "oracle": judged, "mean": 0.7}
    found = {
        "mean": 0.7,
        "spread_over_trainings": 0.012,
        "spread_over_datasets": 0.034,
        "datasets": [{**dataset, "seeds": [seed(0.7, 0.6, 0.8, 0.9)]}, {**dataset, "seeds": [seed(0.7, 0.4, 0.6)]}],
    }
    record = {
        "model": {"name": "seed0"},
        "settings": {"training": training.TRAINING, "seeds": 1, "datasets": 2, "asked": 5},
        "untrained": {"score": 0.6, "well_formed": 1.0, "kinds": {"task": 0.6}},
        "strengths": {"icon2": [{"band": "1:5", "positive_dose": 0.15, "negative_dose": -0.2, "notes": []}]},
        "trained": {"icon2": found, "best_of_n": found},
        "costs": {"flops": [bill("icon2", 98.0, 101.0), bill("best_of_n", 0.0, 6.0)]},
        "ratio": 0.5,
    }
    text = results._training(record)
    # 98 a pair over 10 pairs is 0.01 over 98 000: 3.01 in place of 101, half of the baseline's 6.
    assert "| best_of_n | 2 | 1 | 0 | 6 (+50%) |" in text
    assert "| icon2 | 2 | 1 | 0.01 | 3.01 |" in text
    assert "| icon2 | 10 10 | 100.0% | 90.0% | 0.80 / 0.30 | 0.700 | 0.012 | 0.034 | 0.70 | 100.0% |" in text
    # The mean of both runs, as far as both went.
    assert "| dataset | 4 | 8 |\n" in text
    assert "| icon2 | 0.50 | 0.70 |\n" in text
    assert "icon2 1:5 +15% / -20%." in text


def test_spreads_are_told_apart(opposing: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings on one dataset differ by .02, the datasets' means by .1."""
    scores = iter([0.60, 0.62, 0.70, 0.72])
    monkeypatch.setattr(training, "_train", lambda *_: (None, None, []))
    monkeypatch.setattr(training, "Runtime", lambda *_: None)
    monkeypatch.setattr(training, "marks", lambda *_: {"score": next(scores)})
    found = training.trained([opposing, opposing], tiny.path(), [], seeds=2)
    assert found["mean"] == pytest.approx(0.66)
    assert found["spread_over_trainings"] == pytest.approx(0.02 / 2**0.5)
    assert found["spread_over_datasets"] == pytest.approx(0.1 / 2**0.5)


def test_steered_and_unsteered_decoding_is_timed(opposing: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    rt = Runtime.from_pretrained(tiny.path(), kv_memory="64MiB")
    found = rt.extract_direction([[5, 6]] * 2, [[7, 8]] * 2, name="any")
    monkeypatch.setattr(seconds.DirectionSet, "load", lambda _: [found])
    taken = seconds.overhead(opposing, tiny.path(), turns=1)
    assert taken["ratio"] == taken["steered_seconds_a_token"] / taken["unsteered_seconds_a_token"] > 0
