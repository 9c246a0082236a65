"""The demo, as a newcomer runs it: a dataset, tables that say what they mean, and honest words about strengths."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from icon2_rt import cli, demo
from icon2_rt.pipeline import dataset
from icon2_rt.pipeline.config import RunConfig

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "run"
    patch, printed = pytest.MonkeyPatch(), out.parent / "printed"
    with patch.context() as context, open(printed, "w", encoding="utf-8") as file:
        context.setattr(sys, "argv", ["icon2", "demo", "--out", str(out)])
        context.setattr(sys, "stdout", file)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
    return out, printed.read_text(encoding="utf-8")


def test_the_demo_leaves_a_whole_dataset(shown: tuple[Path, str]) -> None:
    out, _ = shown
    report = json.loads((out / "report.json").read_bytes())
    manifest = json.loads((out / "manifest.json").read_bytes())
    records = [r for path in sorted((out / "data").iterdir()) for r in dataset.from_parquet(path.read_bytes())]
    assert manifest["finished"]
    assert len(records) == report["counts"]["pairs"] >= 48
    assert report["directions"]["names"] == ["honesty", "harmlessness", "helpfulness", "general"]
    assert {r["id"] for r in records}.isdisjoint(range(demo.CONFIG["directions"]["features"]))
    assert report["pairs"]["identical"] < 0.5
    assert max(report["pairs"][side]["cut_off"] for side in ("chosen", "rejected")) < 0.05
    judgement = demo.judge(records)
    assert judgement.pairs == len(records)
    assert judgement.known >= 0.8 * judgement.pairs
    assert judgement.chosen.well_formed >= 0.8
    assert judgement.rejected.well_formed >= 0.7
    assert judgement.better + judgement.ties + judgement.worse == judgement.both


def test_the_demo_says_what_a_newcomer_needs(shown: tuple[Path, str]) -> None:
    out, text = shown
    for words in (
        "calibrated by dose on this model",
        "mean nothing on this one",  # of the paper's strengths
        "the method never saw it",
        "A few pairs side by side",
        "load_dataset",
        str(out),
    ):
        assert words in " ".join(text.split())
    lines = text.splitlines()
    assert max(len(line.rstrip()) for line in lines if str(out) not in line) <= 100
    assert "\x1b" not in text


def test_a_demo_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    assert demo.fresh_folder(tmp_path) == tmp_path / "demo-1"
    (tmp_path / "demo-1").mkdir()
    assert demo.fresh_folder(tmp_path) == tmp_path / "demo-2"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    assert RunConfig.load(path).model


def test_the_papers_example_has_the_papers_settings() -> None:
    config = RunConfig.load(EXAMPLES / "llama3-8b.toml")
    assert (config.pairs.positive, config.pairs.negative, config.filter.keep) == (0.1, -0.05, 0.1)
    assert (config.directions.features, config.instructions.draws, config.filter.scale) == (1024, 1_000_000, "raw")


def test_the_oracles_opinion_counts_every_pair_once() -> None:
    def record(instruction: str, chosen: str, rejected: str, criterion: str = "general") -> dict:
        chats = {"prompt": instruction, "chosen": chosen, "rejected": rejected}
        return {key: [{"content": text}] for key, text in chats.items()} | {"criterion": criterion}

    nonsense = record("Blorp?", "Zig.", "Zag.")
    judgement = demo.judge([nonsense])
    assert (judgement.pairs, judgement.known, judgement.both) == (1, 0, 0)
    assert judgement.chosen.well_formed == 0
    assert judgement.chosen.score is None
    assert demo.judge([]).pairs == 0
