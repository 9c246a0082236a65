"""Whole runs on a random model: well-formed datasets, and the same bytes after any interruption."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from icon2_rt import Direction, DirectionSet, Runtime
from icon2_rt.engine.batch import Batch
from icon2_rt.outputs import Fired, Paths
from icon2_rt.pipeline import dataset, manifest
from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.folder import Artifact
from icon2_rt.pipeline.loading import load_runtime
from icon2_rt.pipeline.runner import RunResult, find_strengths, run
from icon2_rt.pipeline.templates import chat_frame
from tests.models import tiny_llama, tiny_tokenizer

# Random weights write gibberish that seldom ends: long draws, and most of them dropped.
SETTINGS: dict[str, Any] = {
    "seed": 5,
    "criteria": {
        "kind": {"positive": "Be kind.", "negative": "Be cruel."},
        "brief": {"positive": "Be brief.", "negative": "Ramble on."},
    },
    "runtime": {"threads": 1, "kv_memory": "32MiB"},
    "directions": {"features": 24},
    "instructions": {"draws": 48, "max_new_tokens": 150, "shard_size": 20},
    "filter": {"keep": 0.8, "scale": "zscore"},
    "pairs": {"positive": 1.0, "negative": -0.5, "max_new_tokens": 24, "shard_size": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a random Llama with a chat template."""
    path = tmp_path_factory.mktemp("model")
    llama = tiny_llama(eos_token_id=1, bos_token_id=0, pad_token_id=0)
    with torch.no_grad():
        llama.lm_head.weight[[0, 2, 3, 4]] = 0  # the other special tokens: rarer than the rest
    llama.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def _config(model: Path, **changes: Any) -> RunConfig:
    table = {"model": str(model), **SETTINGS, **{k: v for k, v in changes.items() if not isinstance(v, dict)}}
    for section, values in changes.items():
        if isinstance(values, dict):
            table[section] = {**SETTINGS.get(section, {}), **values}
    return RunConfig.from_dict({key: value for key, value in table.items() if value is not None})


@pytest.fixture(scope="module")
def config(model: Path) -> RunConfig:
    return _config(model)


@pytest.fixture(scope="module")
def rt(config: RunConfig) -> Iterator[Runtime]:
    threads = torch.get_num_threads()
    yield load_runtime(config)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(config: RunConfig, rt: Runtime, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One uninterrupted run; tests that change the folder copy it."""
    return run(config, tmp_path_factory.mktemp("runs") / "whole", rt=rt)


def _bytes(folder: Path) -> dict[str, bytes]:
    """All that a run leaves but its lock, and what knows how long it took."""
    paths = [
        path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "log.jsonl", "report.html")
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _copy(result: RunResult, to: Path) -> Path:
    for name, data in _bytes(result.path).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(data)
    return to


def test_a_pair_whose_logits_are_not_finite_is_left_out_and_counted(
    config: RunConfig, rt: Runtime, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One branch of each shard's first pair breaks off: the others are what they are without that, and a run that is
    continued does not meet it again."""
    results, broken = Batch.results, set()

    def breaking(batch: Batch) -> list[tuple[Any, int, float]]:
        found = results(batch)
        for n, (row, token, _) in enumerate(found):
            if row.steering is not None and row.request.index == 0 and row.branch == 1 and len(row.tokens) == 2:
                broken.add(row.request.tokens)
                found[n] = (row, token, float("nan"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "results", breaking)
        with pytest.warns(RuntimeWarning, match=r"prompts\[0\], branch 1"):
            result = run(config, tmp_path / "run", rt=rt)
    before = list(finished.records())
    expected = [record for n, record in enumerate(before) if n % 4]
    made = list(result.records())
    assert len(broken) == len(before) - len(expected) == result.report["counts"]["not_finite"]
    for key in ("id", "chosen", "rejected", "chosen_tokens", "rejected_finish"):
        assert [record[key] for record in made] == [record[key] for record in expected], key
    assert result.report["counts"]["pairs"] == len(expected) and result.manifest["finished"] is True
    assert any(f"{len(broken)} pairs are left out" in warning for warning in result.report["warnings"])
    assert "not_finite" not in finished.report["counts"]
    left = _bytes(result.path)
    monkeypatch.setattr(Batch, "launch", lambda batch: pytest.fail("decoded again"))
    assert _bytes(run(config, result.path, rt=rt).path) == left


def test_a_shard_without_a_single_pair_ends_the_run(
    config: RunConfig, rt: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Batch.results

    def breaking(batch: Batch) -> list[tuple[Any, int, float]]:
        return [(row, t, float("nan") if row.steering is not None else p) for row, t, p in results(batch)]

    monkeypatch.setattr(Batch, "results", breaking)
    with pytest.raises(FloatingPointError, match="no pair of a whole shard"), pytest.warns(RuntimeWarning):
        run(config, tmp_path / "run", rt=rt)
    monkeypatch.setattr(Batch, "results", lambda batch: [(row, t, float("nan")) for row, t, _ in results(batch)])
    with pytest.raises(FloatingPointError, match="unsteered model's own logits"), pytest.warns(RuntimeWarning):
        run(config, tmp_path / "other", rt=rt)


def test_nothing_is_lost_or_doubled_on_the_way(finished: RunResult) -> None:
    counts = finished.report["counts"]
    drawn = counts["instructions"]
    dropped = sum(drawn[reason] for reason in ("truncated", "empty", "special", "length", "too long", "duplicate"))
    assert drawn["drawn"] == 48 == drawn["clean"] + dropped
    assert drawn["kept"] == round(0.8 * drawn["clean"]) == counts["pairs"]
    assert counts["pairs"] >= 6  # or the rest of this file tests little
    assert counts["shards"] == -(-counts["pairs"] // 4)
    kept = [json.loads(line) for line in (finished.path / "kept.jsonl").read_text().splitlines()]
    records = list(finished.records())
    assert [r["id"] for r in records] == [k["id"] for k in kept]
    assert len({r["id"] for r in records}) == len(records)
    assert sum(finished.report["consistency"]["histogram"].values()) == drawn["clean"]
    assert finished.manifest["finished"] is True
    assert finished.manifest["counts"] == counts


def test_what_ran_and_how_much_steering_acted_is_in_the_manifest_and_the_report(finished: RunResult) -> None:
    """The steering is that of the dataset's own responses: each on its tokens, at the two controlled blocks."""
    ran = finished.manifest["ran"]
    records = list(finished.records())
    tokens = {side: sum(r[f"{side}_tokens"] for r in records) for side in ("chosen", "rejected")}
    acted = [Fired.from_dict(one) for one in ran["pairs"]["steering"]]
    for branch, side in (("branches[0]", "chosen"), ("branches[1]", "rejected")):
        mine = [fired for fired in acted if fired.branch == branch]
        assert {fired.direction for fired in mine} == {r["criterion"] for r in records}
        assert sum(fired.rows for fired in mine) == len(records)
        assert sum(fired.tokens for fired in mine) == tokens[side]
        assert {fired.layers for fired in mine} == {tuple(finished.report["strengths"]["layers"])}
    both = sum(tokens.values())
    layers = len(finished.report["strengths"]["layers"])
    figures = {"rows": 2 * len(records), "idle": 0, "blocks": layers, "tokens": both, "total": both * layers}
    assert finished.report["steering"] == figures
    assert f"{2 * len(records):,} responses × {layers:,} blocks × {both:,} tokens" in (
        finished.path / "report.html"
    ).read_text(encoding="utf-8")
    assert {check["key"]: check["status"] for check in finished.report["checks"]}["acted"] == "green"
    assert ran["synthesis"]["steering"] == ran["figures"]["steering"] == []
    for step in ("features", "directions", "synthesis", "scoring", "pairs", "figures"):
        assert ran[step]["paths"]["prefill_attention"] == "sdpa"
        assert ran[step]["paths"]["prefill_passes"] > 0
    paths = Paths.from_dict(ran["pairs"]["paths"])
    assert paths.to_dict() == ran["pairs"]["paths"]
    assert paths.captured_steps + paths.repeated_steps + sum(paths.plain_steps.values()) > 0


def test_what_ran_decides_no_digest() -> None:
    cost: dict[str, Any] = {"pairs": 3, "cost": {"pairs": {"decoded": 5}}}
    one, two, three = (Artifact("x", {"f": "0"}, {}, facts) for facts in (cost, cost | {"ran": {"pairs": 1}}, {}))
    assert one.digest == two.digest != three.digest


def test_records_are_well_formed(finished: RunResult, rt: Runtime) -> None:
    kept = {k["id"]: k for k in map(json.loads, (finished.path / "kept.jsonl").read_text().splitlines())}
    for record in finished.records():
        assert set(record) == set(dataset.COLUMNS)
        item = kept[record["id"]]
        assert record["prompt"] == [{"role": "user", "content": item["instruction"]}]
        assert record["criterion"] == max(item["scores"], key=item["scores"].__getitem__)
        assert record["score"] == item["score"] == max(item["scores"].values())
        assert (record["strength_positive"], record["strength_negative"]) == (1.0, -0.5)
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in record[side]] == ["assistant"]
            assert 1 <= record[f"{side}_tokens"] <= 24
            assert (record[f"{side}_finish"] == "length") == (record[f"{side}_tokens"] == 24) or record[
                f"{side}_finish"
            ] == "eos"
            assert record[f"{side}_logprob"] < 0
            assert record[f"{side}_logprob_unsteered"] < 0


def test_a_pair_can_be_made_again_from_what_the_dataset_says(finished: RunResult, rt: Runtime) -> None:
    """Direction, strength, layers and seed are all there: each response alone, from its record."""
    directions = DirectionSet.load(finished.path / "directions.safetensors")
    layers = finished.report["strengths"]["layers"]
    sampling = dict(finished.manifest["sampling"]["pairs"])
    sampling = {
        k: sampling[k] for k in ("temperature", "top_p", "top_k", "do_sample", "max_new_tokens", "eos_token_id")
    }
    for record in list(finished.records())[:4]:
        for side, strength in (("chosen", "strength_positive"), ("rejected", "strength_negative")):
            [again] = rt.generate(
                [record["prompt"]],
                record[strength] * directions[record["criterion"]][layers],
                seed=[record[f"{side}_seed"]],
                **sampling,
            )
            assert again.text == record[side][0]["content"]
            assert sum(again.logprobs) == pytest.approx(record[f"{side}_logprob"], abs=1e-3)
            [scored] = rt.score([record["prompt"]], [again])
            assert sum(scored.logprobs) == pytest.approx(record[f"{side}_logprob_unsteered"], abs=1e-3)


def test_the_steps_are_the_methods_formulas(finished: RunResult, rt: Runtime) -> None:
    """Directions from the last state under opposite prompts; scores as the mean projection of the bare chat."""
    directions = DirectionSet.load(finished.path / "directions.safetensors")
    features = [json.loads(line) for line in (finished.path / "features.jsonl").read_text().splitlines()]
    chats = {
        sign: [
            [{"role": "system", "content": text}, {"role": "user", "content": f["instruction"]}] for f in features
        ]
        for sign, text in (("+", "Be kind."), ("-", "Be cruel."))
    }  # fmt: skip
    difference = rt.hidden_states(chats["+"]) - rt.hidden_states(chats["-"])
    for layer in range(rt.spec.n_layers):
        first = torch.linalg.svd(difference[:, layer].double()).Vh[0].float()
        first = first * torch.sign(first @ difference[:, layer].mean(dim=0))
        assert torch.nn.functional.cosine_similarity(first, directions["kind"].vectors[layer], dim=0) > 0.9999
    shard = [json.loads(line) for line in (finished.path / "instructions/shard-00000.jsonl").read_text().splitlines()]
    states = rt.hidden_states([[{"role": "user", "content": item["instruction"]}] for item in shard])
    from safetensors.torch import load_file

    projected = load_file(finished.path / "instructions/shard-00000.safetensors")["projections"]
    for column, d in enumerate(directions):
        assert torch.allclose(projected[:, column], torch.einsum("nlh,lh->nl", states, d.vectors), atol=1e-4)


def test_a_finished_run_is_left_as_it_is(finished: RunResult, config: RunConfig, rt: Runtime) -> None:
    def stamps() -> dict[str, int]:
        return {name: (finished.path / name).stat().st_mtime_ns for name in before}

    before = _bytes(finished.path)
    then = stamps()
    again = run(config, finished.path, rt=rt)
    assert _bytes(finished.path) == before
    assert stamps() == then
    assert again.report == json.loads((finished.path / "report.json").read_bytes())


def test_the_same_config_elsewhere_gives_the_same_bytes(
    finished: RunResult, config: RunConfig, rt: Runtime, tmp_path: Path
) -> None:
    assert _bytes(run(config, tmp_path / "other", rt=rt).path) == _bytes(finished.path)


@pytest.mark.parametrize(
    "victim",
    [
        "data/shard-00001.parquet",
        "steps/pairs-00001.json",
        "instructions/shard-00001.jsonl",
        "instructions/shard-00000.safetensors",
        "features.jsonl",
        "directions.safetensors",
        "kept.jsonl",
        "strengths.json",
        "report.json",
        "README.md",
    ],
)
@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_damage_is_found_and_mended(
    finished: RunResult, config: RunConfig, rt: Runtime, tmp_path: Path, victim: str, damage: str
) -> None:
    folder = _copy(finished, tmp_path)
    path = folder / victim
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run(config, folder, rt=rt)
    assert _bytes(folder) == _bytes(finished.path)


def test_another_config_does_not_continue_a_run(finished: RunResult, model: Path, rt: Runtime, tmp_path: Path) -> None:
    folder = _copy(finished, tmp_path)
    changed = _config(model, seed=6, pairs={"temperature": 0.5})
    with pytest.raises(ValueError) as caught:
        run(changed, folder, rt=rt)
    message = str(caught.value)
    assert "seed: 5 there, 6 now" in message
    assert "pairs.temperature: 0.8 there, 0.5 now" in message
    assert len(message.splitlines()) == 3
    assert _bytes(folder) == _bytes(finished.path)


def test_another_model_or_version_does_not_continue_a_run(
    finished: RunResult, config: RunConfig, rt: Runtime, tmp_path: Path
) -> None:
    folder = _copy(finished, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["identity"]["versions"]["torch"] = "1.0"
    manifest["identity"]["model"]["fingerprint"] = "abc"
    manifest["identity"]["machine"]["kv_pages"] = 3
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError) as caught:
        run(config, folder, rt=rt)
    found = [line.strip().split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert found == ["model.fingerprint", "versions.torch", "machine.kv_pages"]


def test_memory_and_threads_are_taken_from_the_run_that_is_continued(model: Path, tmp_path: Path) -> None:
    """What a config leaves open is decided by circumstances once, and then recorded."""
    config = _config(model, runtime={"kv_memory": None, "threads": None})
    before = torch.get_num_threads()
    try:
        rt = load_runtime(config, {"kv_bytes": 2**20, "threads": 1})
        assert rt.kv_pages == load_runtime(_config(model, runtime={"kv_memory": 2**20})).kv_pages
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_strange_files_among_the_data_stop_a_run(
    finished: RunResult, config: RunConfig, rt: Runtime, tmp_path: Path
) -> None:
    folder = _copy(finished, tmp_path)
    (folder / "data/shard-00099.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard-00099\.parquet"):
        run(config, folder, rt=rt)


def test_directions_and_instructions_from_files(finished: RunResult, model: Path, rt: Runtime, tmp_path: Path) -> None:
    """What one run wrote another can take: the same pairs come out, for the same ids and seeds."""
    config = _config(
        model,
        criteria=None,
        directions={"file": str(finished.path / "directions.safetensors"), "features": 1024},
        instructions={"file": str(finished.path / "kept.jsonl"), "draws": 10_000, "max_new_tokens": 256},
        filter={"keep": 1.0, "scale": "raw"},
    )
    result = run(config, tmp_path / "run", rt=rt)
    assert list(result.records())
    for ours, theirs in zip(result.records(), finished.records(), strict=True):
        same = ("id", "criterion", "chosen", "rejected", "chosen_seed", "rejected_seed")
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


def test_a_function_of_the_user_s_and_strengths_for_each_criterion(model: Path, rt: Runtime, tmp_path: Path) -> None:
    """c* from a file of the user's, whose content is part of the run's identity; strengths per criterion, by dose."""
    mine = tmp_path / "mine.py"
    mine.write_text("def by_length(texts, projected, names):\n    return [[len(t) % 2, 0.5] for t in texts]\n")
    config = _config(
        model,
        filter={"scale": f"{mine}:by_length", "keep": 1.0},
        pairs={
            "unit": "dose",
            "positive": {"kind": 0.1, "brief": 0.2},
            "negative": {"kind": -0.1, "brief": -0.05},
            "max_new_tokens": 8,
        },
    )
    result = run(config, tmp_path / "run", rt=rt)
    strengths = result.report["strengths"]
    norms = strengths["residual_norms"]
    mean = sum(norms[i] for i in strengths["layers"]) / len(strengths["layers"])
    seen = set()
    for record in result.records():
        expected = "kind" if len(record["prompt"][0]["content"]) % 2 else "brief"
        assert record["criterion"] == expected
        seen.add(expected)
        assert record["strength_positive"] == pytest.approx({"kind": 0.1, "brief": 0.2}[expected] * mean)
        assert record["strength_negative"] == pytest.approx({"kind": -0.1, "brief": -0.05}[expected] * mean)
    assert seen == {"kind", "brief"}
    for i in strengths["layers"]:
        assert strengths["dose"]["positive"][i] == pytest.approx(0.15)  # the mean over the criteria, in every block
    mine.write_text("def by_length(texts, projected, names):\n    return [[1, 0] for t in texts]\n")
    with pytest.raises(ValueError, match=r"files\.filter\.scale"):
        run(config, tmp_path / "run", rt=rt)


def test_a_calibration_judge_s_own_file_is_part_of_the_run(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def judge(instructions, responses):\n    return [len(r) for r in responses]\n")
    calibration = {"doses": [0.1], "judge": f"{mine}:judge"}
    config = _config(model, pairs={"positive": None, "negative": None}, calibration=calibration)
    before = manifest.asked_for(config)
    manifest.refuse_another({"identity": before}, manifest.asked_for(config), tmp_path)
    mine.write_text("def judge(instructions, responses):\n    return [-len(r) for r in responses]\n")
    with pytest.raises(ValueError, match=r"files\.calibration\.judge"):
        manifest.refuse_another({"identity": before}, manifest.asked_for(config), tmp_path)


def test_prompts_beside_ready_directions(finished: RunResult, model: Path, rt: Runtime, tmp_path: Path) -> None:
    """Ready directions with the prompts that they were made from give the same scores by contrast."""
    changes = {
        "directions": {"file": str(finished.path / "directions.safetensors"), "features": 1024},
        "instructions": {"file": str(finished.path / "kept.jsonl"), "draws": 10_000, "max_new_tokens": 256},
        "filter": {"scale": "contrast", "keep": 1.0},
        "pairs": {"max_new_tokens": 8},
    }
    result = run(_config(model, **changes), tmp_path / "a", rt=rt)
    assert result.report["consistency"]["scale"] == "contrast"
    assert list(result.manifest["criteria"]) == ["kind", "brief"]
    changes["criteria"] = {"other": {"positive": "x", "negative": "y"}}
    settings = {**SETTINGS, "criteria": changes.pop("criteria")}
    table = {"model": str(model), **settings, **{k: {**settings.get(k, {}), **v} for k, v in changes.items()}}
    with pytest.raises(ValueError, match=r"criteria: directions\.file holds kind, brief; .* there are other"):
        run(RunConfig.from_dict(table), tmp_path / "b", rt=rt)


def test_wrong_input_files_are_refused(finished: RunResult, model: Path, rt: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "given.jsonl"
    path.write_text('{"instruction": "Why?", "criterion": "wit"}\n')
    changes: dict[str, Any] = {
        "criteria": None,
        "directions": {"file": str(finished.path / "directions.safetensors"), "features": 1024},
        "instructions": {"file": str(path), "draws": 10_000, "max_new_tokens": 256},
    }
    with pytest.raises(ValueError, match="wants the criterion 'wit'"):
        run(_config(model, **changes), tmp_path / "a", rt=rt)
    path.write_text('{"instruction": "Why?"}\n')
    DirectionSet([Direction("kind", torch.ones(3, 48))]).save(tmp_path / "other.safetensors")
    changes["directions"]["file"] = str(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has 3 blocks of size 48, the model has 4"):
        run(_config(model, **changes), tmp_path / "b", rt=rt)


def test_what_cannot_work_with_this_model_is_said_before_any_work(model: Path, rt: Runtime, tmp_path: Path) -> None:
    for changes, message in (
        ({"pairs": {"max_new_tokens": 600}}, r"pairs\.max_new_tokens: 600 tokens do not fit: the model has 512"),
        ({"instructions": {"max_new_tokens": 600}}, r"instructions\.max_new_tokens"),
        ({"pairs": {"layers": "9:20"}}, r"pairs\.layers"),
    ):
        out = tmp_path / str(len(message))
        with pytest.raises(ValueError, match=message):
            run(_config(model, **changes), out, rt=rt)
        assert not (out / "steps").exists()


def test_given_instructions_that_do_not_fit_are_dropped_and_counted(
    finished: RunResult, model: Path, rt: Runtime, tmp_path: Path
) -> None:
    path = tmp_path / "given.txt"
    path.write_text("Why?\n" + "x" * 500 + "\n" + "x" * 2000 + "\n")
    config = _config(
        model,
        criteria=None,
        directions={"file": str(finished.path / "directions.safetensors"), "features": 1024},
        instructions={"file": str(path), "draws": 10_000, "max_new_tokens": 256},
    )
    counts = run(config, tmp_path / "run", rt=rt).report["counts"]["instructions"]
    assert (counts["drawn"], counts["too long"], counts["clean"]) == (3, 2, 1)


@pytest.mark.parametrize("writes", [3, 15])
def test_a_disk_that_fills_up_costs_nothing_but_the_rest(
    finished: RunResult, config: RunConfig, rt: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """The disk is full after so many writes; with room again the same call ends with the same bytes."""
    real, left = os.fsync, [writes]

    def full(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(config, tmp_path / "run", rt=rt)
    monkeypatch.undo()
    assert not list((tmp_path / "run").rglob("*.partial"))
    run(config, tmp_path / "run", rt=rt)
    assert _bytes(tmp_path / "run") == _bytes(finished.path)


def test_no_usable_instruction_is_an_error_with_the_counts(model: Path, rt: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"usable feature instructions came of 24 \(.* truncated"):
        run(_config(model, instructions={"max_new_tokens": 1}), tmp_path / "run", rt=rt)


def test_calibrated_strengths(model: Path, rt: Runtime, tmp_path: Path) -> None:
    config = _config(
        model,
        pairs={"positive": None, "negative": None},
        calibration={"doses": [0.05, 0.2], "instructions": 4},
    )
    result = run(config, tmp_path / "run", rt=rt)
    strengths = result.report["strengths"]
    rungs = {rung["dose"]: rung for rung in strengths["calibration"]["rungs"]}
    assert sorted(rungs) == [-0.2, -0.05, 0.0, 0.05, 0.2]
    norms = [strengths["residual_norms"][i] for i in strengths["layers"]]
    for dose, rung in rungs.items():
        assert rung["gamma"] == pytest.approx(dose * sum(norms) / len(norms))
    assert set(strengths["positive"].values()) < {rung["gamma"] for dose, rung in rungs.items() if dose > 0}
    assert set(strengths["negative"].values()) < {rung["gamma"] for dose, rung in rungs.items() if dose < 0}
    assert all(record["strength_positive"] == strengths["positive"][record["criterion"]] for record in result.records())


def test_a_calibration_alone_and_the_run_that_goes_on_from_it(
    model: Path, rt: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands, a judge from a file, strengths for each criterion; the run takes the finished strengths as they are."""
    judge = tmp_path / "judge.py"
    judge.write_text("def e(instructions, responses):\n    return [r.count('e') for r in responses]\n")
    config = _config(
        model,
        pairs={"positive": None, "negative": None, "max_new_tokens": 8, "unit": "dose", "noise": "common"},
        calibration={
            "doses": [0.1, 0.3],
            "instructions": 20,
            "bands": ["1:3", "all"],
            "judge": f"{judge}:e",
            "per_criterion": True,
        },
    )
    facts = find_strengths(config, tmp_path / "run", rt=rt)
    calibration = facts["calibration"]
    assert [band["layers"] for band in calibration["bands"]] == [[1, 2], [0, 1, 2, 3]]
    assert calibration["quality"] == f"{judge}:e"
    assert facts["layers"] == calibration["layers"]
    for criterion in ("kind", "brief"):
        choice = calibration["per_criterion"][criterion]
        gammas = {rung["dose"]: rung["gamma"] for rung in choice["rungs"]}
        assert facts["positive"][criterion] == gammas[choice["positive_dose"]]
        assert facts["negative"][criterion] == gammas[choice["negative_dose"]]
    assert (tmp_path / "run/calibration.svg").read_text().startswith("<svg")
    assert not (tmp_path / "run/data").exists()
    monkeypatch.setattr("icon2_rt.pipeline.calibrate.climb", None)  # it is not climbed twice
    result = run(config, tmp_path / "run", rt=rt)
    assert result.report["strengths"] == facts
    assert result.manifest["controlled_layers"] == {"1:3": [1, 2], "all": [0, 1, 2, 3]}


def test_a_calibration_of_ready_directions(finished: RunResult, model: Path, rt: Runtime, tmp_path: Path) -> None:
    """Ready directions with their prompts can be calibrated: the instructions for it are still written and held out."""
    config = _config(
        model,
        directions={"file": str(finished.path / "directions.safetensors")},
        pairs={"positive": None, "negative": None, "max_new_tokens": 8},
        calibration={"doses": [0.1], "instructions": 6, "quality": "projection"},
    )
    result = run(config, tmp_path / "run", rt=rt)
    assert result.report["strengths"]["calibration"]["quality"] == "projection"
    held_out = {json.loads(line)["id"] for line in (tmp_path / "run/features.jsonl").read_text().splitlines()}
    assert held_out and not held_out & {record["id"] for record in result.records()}


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("return [float('nan')] * len(responses)", "calibration.judge: the judge gave nan to a response"),
        ("return 1.0", "calibration.judge: the judge must give a number for each response"),
        ("raise RuntimeError('no server')", "calibration.judge: the judge raised RuntimeError: no server"),
    ],
)
def test_a_judge_that_does_not_work_is_found_before_the_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: str, message: str
) -> None:
    (tmp_path / "judge.py").write_text(f"def mark(instructions, responses):\n    {judge}\n")
    config = _config(
        model,
        pairs={"positive": None, "negative": None},
        calibration={"judge": f"{tmp_path / 'judge.py'}:mark"},
    )
    monkeypatch.setattr("icon2_rt.pipeline.runner.load_runtime", None)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "run")


def test_inputs_that_cannot_work_are_found_before_the_model_is_loaded(
    finished: RunResult, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icon2_rt.pipeline.runner.load_runtime", None)
    (tmp_path / "one.txt").write_text("Why?\nwhy?\n")
    (tmp_path / "wit.jsonl").write_text('{"instruction": "Why?", "criterion": "wit"}\n')
    (tmp_path / "bad.py").write_text("import nothing_like_it\n")
    directions = {"file": str(finished.path / "directions.safetensors"), "features": 1024}
    free = {"positive": None, "negative": None}
    given = {"file": str(tmp_path / "wit.jsonl"), "draws": 10_000, "max_new_tokens": 256}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"directions": {"features_file": str(tmp_path / "one.txt")}}, "2 instructions, 1 of them different; .* 2 "),
        ({"instructions": given}, r"instructions\.file: instruction 0 wants the criterion 'wit'"),
        (
            {"filter": {"scale": f"{tmp_path / 'bad.py'}:f"}},
            r"filter\.scale: .*bad\.py cannot be imported: .*nothing_like",
        ),
        ({"criteria": None, "directions": directions, "pairs": {"positive": {"wit": 1.0}}}, "unknown criterion 'wit'"),
        (
            {"pairs": free, "calibration": {"judge": str(model)}},
            "calibration.judge: .* is no reward model: .* LlamaForCausalLM",
        ),
        ({"pairs": free, "calibration": {"judge": "math:no_such"}}, "no function 'no_such' in math"),
    ]
    for number, (changes, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            run(_config(model, **changes), tmp_path / str(number))


def test_datasets_and_trl_take_it_as_it_is(finished: RunResult, model: Path, tmp_path: Path) -> None:
    """One step of DPO from the folder, without a line of conversion."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = str(tmp_path / "cache")
    whole = datasets.load_dataset(str(finished.path), split="train", cache_dir=cache)
    data = datasets.load_dataset(
        "parquet", data_files=str(finished.path / "data/*.parquet"), split="train", cache_dir=cache
    )
    assert whole.to_list() == data.to_list() == list(finished.records())
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=trl.DPOConfig(
            str(tmp_path / "dpo"),
            max_steps=1,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=whole,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    assert trainer.train().global_step == 1
    # The tokens that it trains on are those that the model was prompted with and wrote.
    tokenizer = AutoTokenizer.from_pretrained(model)
    frame = chat_frame(tokenizer)
    row, record = trainer.train_dataset[0], whole[0]
    assert (
        tokenizer.decode(row["prompt_ids"])
        == frame.pre_query_text + record["prompt"][0]["content"] + "<|end|><|assistant|>"
    )
    assert tokenizer.decode(row["chosen_ids"]) == record["chosen"][0]["content"] + "<|end|>"


# One process imports everything once and then forks: what is killed is a real process in the middle of its work.
_KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from icon2_rt.outputs import Fired, Paths
from icon2_rt.cli import main

out = Path(sys.argv[2])
sys.argv = ["icon2", "run", sys.argv[1], "--out", sys.argv[2]]
rng = random.Random(0)
kills = 0

def finished_steps():
    return len(list((out / "steps").glob("[!.]*")))

while True:
    # In the middle of the first or the second piece of work from here: the machine's speed does not matter.
    enough, delay = finished_steps() + rng.choice([0, 0, 1]), rng.uniform(0, rng.choice([0.05, 0.3, 1.2]))
    child = os.fork()
    if child == 0:
        try:
            main()
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(0)
    reached = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if reached is None and finished_steps() >= enough:
            reached = time.monotonic()
        if kills < 8 and reached is not None and time.monotonic() > reached + delay:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            break
        time.sleep(0.001)
    if done:
        sys.exit(f"{kills} {status}")
"""


def test_sigkill_at_random_moments_changes_no_byte(finished: RunResult, model: Path, tmp_path: Path) -> None:
    """The same command line again and again, until it comes to its end."""
    path = tmp_path / "run.toml"
    path.write_text(_toml({"model": str(model), **SETTINGS}))
    done = subprocess.run(
        [sys.executable, "-c", _KILLER, str(path), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    kills, status = map(int, done.stderr.strip().splitlines()[-1].split())
    assert status == 0, done.stderr
    assert kills >= 4
    assert _bytes(tmp_path / "run") == _bytes(finished.path)
    events = [json.loads(line)["event"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert events.count("resumed") >= 1  # one that is killed before it has a manifest is started anew
    assert events[-1] == "finished"


def _toml(table: dict[str, Any], prefix: str = "") -> str:
    """Plain values as TOML: JSON's notation is TOML's for all that is used here."""
    plain = [f"{key} = {json.dumps(value)}\n" for key, value in table.items() if not isinstance(value, dict)]
    inner = [f"[{prefix}{k}]\n{_toml(v, f'{prefix}{k}.')}" for k, v in table.items() if isinstance(v, dict)]
    return "".join([*plain, *inner])
