"""Bad input is refused in words, and before the weights of a model are read: a checkpoint that cannot work, functions
that cannot be called, folders that were damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icon2_rt import Direction, DirectionSet, Runtime, tiny
from icon2_rt.pipeline import costs
from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.consistency import judge
from icon2_rt.pipeline.folder import RunFolder
from icon2_rt.pipeline.preflight import preflight
from icon2_rt.pipeline.runner import RunResult, finished_run, run
from tests.models import random_vectors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the shipped model, to be spoiled."""
    return Path(shutil.copytree(tiny.path(), tmp_path / "model"))


def _change(file: Path, **changes: Any) -> None:
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, **changes}))


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def _spoil(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: _change(folder / file, **changes)


@pytest.mark.parametrize(
    ("spoil", "config", "message"),
    [
        (_no_tokenizer, {}, r"^model: no tokenizer could be loaded from .*; its folder needs"),
        (_spoil("tokenizer_config.json", chat_template=None), {}, "has no chat template, so it is not a chat model"),
        (lambda folder: (folder / "config.json").unlink(), {}, r"^model: .* cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), {}, r"^model: .* cannot be loaded"),
        (shutil.rmtree, {}, r"^model: there is no folder .*; give a checkpoint's folder, or a hub id"),
        (lambda folder: None, {"pairs": {"layers": "9:20"}}, r"pairs\.layers: '9:20' reaches outside"),
        (lambda folder: None, {"pairs": {"max_new_tokens": 4096}}, r"pairs\.max_new_tokens: 4096 tokens do not fit"),
        (_spoil("config.json", max_position_embeddings=64), {}, r"instructions\.max_new_tokens: 256 tokens do not fit"),
    ],
)
def test_what_a_checkpoint_shows_is_refused_before_its_weights_are_read(
    checkpoint: Path, spoil: Callable[[Path], Any], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for weights in checkpoint.glob("*.safetensors"):
        weights.unlink()
    spoil(checkpoint)
    with pytest.raises(ValueError, match=message):
        run(RunConfig.from_dict({"model": str(checkpoint), **config}), tmp_path / "run")


def test_directions_of_another_model_are_refused_before_its_weights_are_read(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    file = tmp_path / "d.safetensors"
    DirectionSet([Direction(name="a", vectors=random_vectors(4, 16, seed=0))]).save(file)
    config = {"model": str(checkpoint), "directions": {"file": str(file)}}
    with pytest.raises(ValueError, match=r"directions\.file: 'a' has 4 blocks of size 16, the model has 6 of size"):
        run(RunConfig.from_dict(config), tmp_path / "run")


def test_torn_weights_and_impossible_devices_are_refused(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"a file of weights of .* is damaged or was not copied whole"):
        Runtime.from_pretrained(checkpoint)
    for wrong, message in (({"device": "gpu0"}, "device must be"), ({"backend": "cuda"}, "backend must be")):
        with pytest.raises(ValueError, match=message):  # not that the weights are torn: they are not looked at
            Runtime.from_pretrained(checkpoint, **wrong)


def test_a_scale_that_cannot_be_called_or_raises_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def two(texts, projections): ...\ndef three(a, b, names, more=1): ...\n")
    for name, good in (("two", False), ("three", True)):
        config = RunConfig.from_dict({"model": "tiny", "filter": {"scale": f"{tmp_path / 'mine.py'}:{name}"}})
        if good:
            preflight(config)
            continue
        with pytest.raises(ValueError, match=r"^filter\.scale: the function is called with \(instructions, "):
            preflight(config)

    def raises(*_: Any) -> None:
        raise KeyError("gone")

    with pytest.raises(ValueError, match=r"^filter\.scale: the function raised KeyError: 'gone'"):
        judge(random_vectors(3, 2, seed=0)[None], ["a", "b", "c"], raises, ["Why?"])


@pytest.mark.parametrize("where", ["baseline", "calibration"])
def test_a_reward_model_that_is_not_there_is_named_with_its_setting(where: str, tmp_path: Path) -> None:
    section = {"judge": str(tmp_path / "none"), **({"recipe": "best_of_n"} if where == "baseline" else {})}
    with pytest.raises(ValueError, match=rf"^{where}\.judge: "):
        preflight(RunConfig.from_dict({"model": "tiny", where: section}))


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; what is needed is a TOML file"):
        RunConfig.load(tmp_path)


# --- damaged folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the readers of a finished run look at, and nothing else."""
    (tmp_path / "data").mkdir()
    (tmp_path / "steps").mkdir()
    (tmp_path / "manifest.json").write_text('{"finished": true, "identity": {}}')
    costs_ = {"pairs": 1, "steps": {}}
    (tmp_path / "report.json").write_text(json.dumps({"costs": costs_, "counts": {"instructions": {}}}))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "[]", "is not of a run"),
        ("manifest.json", "{", "is missing or damaged"),
        ("manifest.json", '{"identity": {}}', "is not finished"),
        ("report.json", "{", "is missing or damaged"),
        ("report.json", None, "is missing or damaged"),
        ("data/shard-00000.parquet", "x", r"shard-00000\.parquet is damaged"),
    ],
)
def test_a_damaged_run_is_told_by_its_file(folder: Path, name: str, content: str | None, message: str) -> None:
    assert list(finished_run(folder).records()) == []
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(finished_run(folder).records())


@pytest.mark.parametrize("content", ["{", "[1]", "{}"])
def test_a_record_that_is_none_is_told_by_its_file(folder: Path, content: str) -> None:
    (folder / "steps/x.json").write_text(content)
    with RunFolder(folder) as opened, pytest.raises(ValueError, match=r"x\.json is no record .*: delete it"):
        opened.artifacts()


def test_seconds_without_a_log_are_not_nothing(folder: Path) -> None:
    result: RunResult = finished_run(folder)
    with pytest.raises(ValueError, match=r"log\.jsonl is gone or empty: it has the seconds"):
        costs.bill(result, "seconds")
