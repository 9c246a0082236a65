"""The benchmark of the method against the oracle, in small: it runs, and its shares are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import RESULTS, proof, results
from icon2_rt import Runtime
from icon2_rt.pipeline.instructions import Instruction
from icon2_rt.pipeline.pairs import Kept
from icon2_rt.tiny import world


def test_the_whole_benchmark_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way = "common noise, temperature 0.8"
    monkeypatch.setattr(proof, "WAYS", {way: proof.WAYS[way]})
    out = tmp_path / "proof.json"
    proof.main(["--quick", "--out", str(out)])
    record = json.loads(out.read_text())
    tables = record["criterion"]["tables"]
    for table in tables.values():
        counted = {kind: sum(counts.values()) for kind, counts in table["confusion"].items()}
        assert counted == record["criterion"]["kinds"]
    assert tables["contrast"]["right"] >= 0.9
    # Why it is right: the two prompts of a criterion are far apart only where the instruction is about it.
    for kind, row in record["criterion"]["between_the_prompts"].items():
        assert max(row, key=lambda name: row[name]["span"]) == world.CRITERION_OF_KIND[kind]
    for band in record["sweep"].values():
        scores = {rung["dose"]: rung["score"] for rung in band["rungs"]}
        assert scores[-0.2] < scores[0.0] < scores[0.15]
    found = record["held_out"][way]["oracle"]
    assert found["both_well_formed"] >= 0.8
    assert found["better"] >= 0.7
    text = results.report([("proof.json", record)])
    for part in ("**1. Directions**", "**2. c\\*", "**3. The sweep**", "**4. Strengths chosen on 16 instructions**"):
        assert part in text


def test_every_stored_model_has_its_own_record() -> None:
    """Weights that are made again need their figures made again."""
    names = {"seed0", *(folder.name for folder in proof.MODELS.iterdir())}
    assert len(names) >= 3
    records = [json.loads(path.read_text())["model"] for path in RESULTS.glob("proof-*.json")]
    stored = {made["name"]: made["fingerprint"] for made in records}
    for name in names:
        rt = Runtime.from_pretrained(proof.model_folder(name), kv_memory="8MiB")
        assert stored[name] == rt.fingerprint, name


def test_broken_texts_never_win() -> None:
    name, place = next((s, v) for (s, attribute), v in world.FACTS.items() if attribute == "home")
    item = Kept(Instruction(0, f"Where does {name} live?"), "honesty", 0.0, None, {})
    elsewhere = next(v for (s, attribute), v in world.FACTS.items() if attribute == "home" and v != place)
    true, lie, broken = f"{name} lives in {place}.", f"{name} lives in {elsewhere}.", f"{name} lives lives"
    assert proof.compare([item] * 4, [true, lie, true, true], [lie, true, true, broken]) == proof.Marks(4, 3, 1, 1)
    marks = proof.compare([item] * 4, [true, lie, true, true], [lie, true, true, broken]).to_dict()
    assert (marks["both_well_formed"], marks["ties"], marks["better"]) == (0.75, pytest.approx(1 / 3), 0.5)
    assert proof.compare([item], [true], [broken]).to_dict()["better"] is None


def test_the_interval_of_a_share() -> None:
    """Wilson's, against figures worked out by hand; 0 of n and n of n have one too."""
    assert proof.wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert proof.wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert proof.wilson(10, 10) == pytest.approx([0.7225, 1.0], abs=1e-4)
    assert proof.wilson(0, 0) is None
