"""Published texts are true: cards, pages and screens over the product of the settings that their sentences speak of.

What a sentence claims is read back from the text and compared with the config, and not with the code that wrote it.
"""

from __future__ import annotations

import itertools
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from icon2_rt import Direction, DirectionSet, Runtime, display, tiny
from icon2_rt.pipeline import cards, page
from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.runner import RunResult, run
from tests.models import random_vectors

PROMPTS = {"kind": {"positive": "Be kind.", "negative": "Be cruel."}, "brief": {"positive": "Be.", "negative": "Do."}}
JUDGE = "def longer(instructions, responses):\n    return [len(text) for text in responses]\n"
SCALE = "def scores(texts, projections, names):\n    return projections.mean(dim=2)\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "mine.py").write_text(JUDGE + SCALE)
    (folder / "plain.txt").write_text("Who was the first queen?\nWhat is bread?\n")
    (folder / "named.jsonl").write_text('{"instruction": "Why?", "criterion": "kind"}\n{"instruction": "How?"}\n')
    directions = [Direction(name, random_vectors(6, 128, seed=n)) for n, name in enumerate(PROMPTS)]
    DirectionSet(directions).save(folder / "d.safetensors")
    return folder


def report(config: RunConfig, columns: list[str] | None = None) -> dict[str, Any]:
    """As much of a report as a card reads, the figures made up."""
    pairs = {
        "pairs": 7, "per_criterion": {"kind": 7}, "identical": 0.0, "length_ratio": 1.0,
        **{side: {"cut_off": 0.0} for side in ("chosen", "rejected")},
    }  # fmt: skip
    return {
        "counts": {"instructions": {"drawn": 9, "clean": 8, "kept": 7}, "pairs": 7},
        "pairs": pairs,
        "strengths": {"positive": {"kind": 0.1}, "negative": {"kind": -0.1}, "layers": [1, 2]},
        "steering": {},
        "warnings": [],
        "columns": columns or list(cards.meanings(config)),
        **({"given": given} if (given := cards.given(config)) else {}),
    }


def configs(files: Path) -> list[RunConfig]:
    """Every valid mixture of the settings that a card's sentences depend on."""
    calibrations: list[dict[str, Any]] = [
        {},
        {"calibrate": True},
        *(
            {"calibrate": calibrate, "calibration": section}
            for calibrate in (None, True, False)
            for section in ({"instructions": 4}, {"judge": f"{files / 'mine.py'}:longer"}, {"judge": "org/reward"})
        ),
    ]
    axes: list[list[dict[str, Any]]] = [
        calibrations,
        [{}, {"directions": {"file": str(files / "d.safetensors")}}],
        [{}, *({"instructions": {"file": str(files / name)}} for name in ("plain.txt", "named.jsonl"))],
        [{}, {"filter": {"scale": "zscore"}}, {"filter": {"scale": f"{files / 'mine.py'}:scores"}}],
        [{}, {"pairs": {"positive": 0.5}}, {"pairs": {"positive": 0.5, "negative": -0.5}},
         {"pairs": {"unit": "dose", "positive": 0.1, "negative": -0.1}}, {"pairs": {"unit": "dose"}}],
    ]  # fmt: skip
    found = []
    for chosen in itertools.product(*axes):
        table: dict[str, Any] = {"model": "tiny", "criteria": PROMPTS}
        for part in chosen:
            table |= {key: value for key, value in part.items() if value is not None}
        try:
            found.append(RunConfig.from_dict(table))
        except ValueError:
            continue  # they contradict each other
    return found


def test_a_card_claims_what_the_config_says(files: Path) -> None:
    seen = set()
    for config in configs(files):
        text = " ".join(cards.card(config, report(config)).split())
        calibrated = config.calibration is not None and config.calibrate is not False
        judge = config.calibration.judge if calibrated and config.calibration is not None else None
        own_scores = config.filter.scale.endswith(":scores")
        labelled = (config.instructions.file or "").endswith("named.jsonl")
        assert ("calibrated by dose" in text) == calibrated
        assert ("no reward model, no judge" in text) == (judge is None and not own_scores)
        assert ("no human labels" in text) == (
            judge is None and not own_scores and not labelled and config.directions.file is None
        )
        assert ("`org/reward`" in text) == (judge == "org/reward")
        assert ("`mine.py:longer`" in text) == (judge is not None and judge.endswith(":longer"))
        assert ("`mine.py:scores`" in text) == own_scores
        assert ("`d.safetensors`" in text) == (config.directions.file is not None)
        assert ("1 of them with a criterion" in text) == labelled
        assert ("kept of 9 given" in text) == (config.instructions.file is not None)
        assert ("kept of 9 drawn" in text) == (config.instructions.file is None)
        assert str(files) not in text  # a card is read on other machines
        how = re.search(r"strengths in residual units, (.*?): γ⁺ 0\.1, γ⁻ -0\.1, after blocks 1 to 2", text)
        assert how is not None
        given = config.pairs.positive is not None, config.pairs.negative is not None
        expected = {
            (False, False): "those printed in the paper",
            (True, False): "γ⁺ as given and γ⁻ as printed in the paper",
            (True, True): "as given",
        }[given]
        if calibrated:
            expected = "calibrated by dose on this model"
        elif config.pairs.unit == "dose":
            expected = "given as doses"
        assert how[1] == expected
        seen.add((calibrated, judge is None, own_scores, labelled, how[1]))
    assert len(seen) == 24  # every mixture that can be was there


@pytest.mark.parametrize("shape", ["pair", "ternary", "ladder"])
@pytest.mark.parametrize("directions", ["best", "each", "sum"])
@pytest.mark.parametrize("shared", [0, 4])
def test_columns_mean_what_the_run_writes(
    files: Path, tmp_path: Path, shape: str, directions: str, shared: int
) -> None:
    """One small run each; what the card says of a column holds of the records."""
    config = RunConfig.from_dict(
        {
            "model": "tiny",
            "runtime": {"kv_memory": "64MiB", "threads": 1},
            "directions": {"file": str(files / "d.safetensors")},
            "instructions": {"file": str(files / "plain.txt")},
            "filter": {"keep": 1.0},
            "pairs": {"shape": shape, "directions": directions, "shared_tokens": shared, "max_new_tokens": 8},
        }
    )
    result = run(config, tmp_path / "run", rt=_runtime())
    text = (tmp_path / "run/README.md").read_text()
    meaning = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    records = list(result.records())
    assert set(meaning) == set(records[0])
    names = {record["criterion"] for record in records}
    assert ("joined by +" in meaning["criterion"]) == (names == {"kind+brief"}) == (directions == "sum")
    each = {(record["id"], record["criterion"]) for record in records}
    assert ("a pair for each criterion" in meaning["criterion"]) == (len(each) == 4) == (directions == "each")
    assert ("else null" in meaning["margin"]) == (len({record["margin"] is None for record in records}) == 2)
    assert ("behind the shared beginning" in meaning["chosen_seed"]) == ("shared_tokens" in records[0]) == (shared > 0)
    if shape == "ternary":
        assert "unsteered model, which wrote it" in meaning["neutral_logprob"]
        rows = [record for record in records if record["neutral_tokens"]]
        assert all(r["neutral_logprob"] == pytest.approx(r["neutral_logprob_unsteered"], abs=1e-3) for r in rows)


def _runtime() -> Runtime:
    if not _RUNTIMES:
        _RUNTIMES.append(Runtime.from_pretrained(tiny.path(), kv_memory="64MiB"))
    return _RUNTIMES[0]


_RUNTIMES: list[Runtime] = []


@pytest.mark.parametrize("recipe", ["best_of_n", "self_rewarding", "self_refine", "opposing_prompts"])
@pytest.mark.parametrize("self_judge", ["grade", "likelihood"])
def test_a_baselines_card_says_who_chose(files: Path, recipe: str, self_judge: str) -> None:
    section: dict[str, Any] = {"recipe": recipe, "self_judge": self_judge}
    if recipe == "best_of_n":
        section["judge"] = f"{files / 'mine.py'}:longer"
    for instructions in ({}, {"file": str(files / "plain.txt")}):
        config = RunConfig.from_dict(
            {"model": "tiny", "criteria": PROMPTS, "baseline": section, "instructions": instructions}
        )
        text = cards.baseline_card(config, report(config))
        meaning = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
        assert ("whose judge is `mine.py:longer`" in text) == (recipe == "best_of_n")
        assert ("the judge put" in meaning["chosen"]) == (recipe == "best_of_n")
        assert ("as its judge" in meaning["chosen"]) == ((recipe, self_judge) == ("self_rewarding", "grade"))
        assert ("likelihood" in meaning["chosen"]) == ((recipe, self_judge) == ("self_rewarding", "likelihood"))
        assert ("refinement" in meaning["chosen"]) == (recipe == "self_refine")
        assert ("negative system prompt" in meaning["rejected"]) == (recipe == "opposing_prompts")
        assert ("null" in meaning["criterion"]) == (recipe != "opposing_prompts")
        assert "steered model" not in meaning["chosen_logprob"] and "null" in meaning["strength_positive"]
        assert ("of 9 given" in text) == ("file" in instructions)


def _screen(result: RunResult) -> str:
    out = StringIO()
    Console(file=out, width=200, markup=False).print(display.run_report(result.report))
    return out.getvalue()


@pytest.mark.parametrize("source", ["file", "model"])
def test_page_card_and_screen_agree_on_where_instructions_are_from(files: Path, tmp_path: Path, source: str) -> None:
    config: dict[str, Any] = {
        "model": "tiny",
        "calibrate": False,
        "calibration": {"instructions": 4},
        "directions": {"features": 8},
        "instructions": {"draws": 8, "max_new_tokens": 48},
        "filter": {"keep": 1.0},
        "pairs": {"positive": 0.5, "negative": -0.5, "max_new_tokens": 8},
    }
    if source == "file":
        config["instructions"] = {"file": str(files / "plain.txt")}
    result = run(RunConfig.from_dict(config), tmp_path / "run", rt=_runtime())
    card, html = ((tmp_path / "run" / name).read_text() for name in ("README.md", "report.html"))
    screen = _screen(result)
    given = source == "file"
    assert ("given in plain.txt" in screen) == ("given in a file" in html) == given
    assert ("drawn from the model itself" in screen) == ("drawn from the model itself" in html) == (not given)
    assert bool(re.search(r"kept of \d+ given", card)) == bool(re.search(r"kept of \d+ given", html)) == given
    for text in (card, screen, html):
        assert "calibrated by dose" not in text
    assert json.loads((tmp_path / "run/report.json").read_bytes()).get("given", {}) == (
        {"instructions": "plain.txt", "with_criterion": 0} if given else {}
    )
    assert page.render(result.report, result.manifest) == page.render(
        json.loads((tmp_path / "run/report.json").read_bytes()), result.manifest
    )


def test_the_documents_call_required_what_is() -> None:
    document = (Path(__file__).parent.parent / "docs/method.md").read_text()
    table = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", document, re.MULTILINE))
    assert len(table) > 60
    complete: dict[str, Any] = {"model": "tiny", "baseline": {"recipe": "self_refine"}}
    RunConfig.from_dict(complete)  # all other keys can be left out
    for key in (key for key, default in table.items() if default == "required"):
        section, _, name = key.rpartition(".")
        without = {**complete, section: {}} if section else {k: v for k, v in complete.items() if k != name}
        with pytest.raises(ValueError, match=rf"{key}: is missing, and there is no default"):
            RunConfig.from_dict(without)
