"""RunConfig: everything that is wrong is said at once, with its key's path; and the derived settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from icon2_rt.pipeline.config import (
    PAPER_TRAINING,
    RunConfig,
    controlled_bands,
    controlled_layers,
    given_strengths,
    parse_layers,
    read_criteria,
)
from icon2_rt.pipeline.functions import load_function


def _errors(table: dict) -> list[str]:
    with pytest.raises(ValueError) as caught:
        RunConfig.from_dict(table)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_all_errors_at_once_each_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        """
        modle = "x"
        seed = -1
        [pairs]
        temprature = 1.0
        positive = "strong"
        negative = 0.1
        layers = "a:b"
        [filter]
        scale = "zscor"
        keep = 2
        [instructions]
        draws = true
        file = "nowhere.jsonl"
        [criteria.honesty]
        positive = " "
        [calibration]
        doses = []
        [runtime]
        max_rows = 1.5
        [direction]
        """
    )
    with pytest.raises(ValueError) as caught:
        RunConfig.load(path)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{path}: 16 problems"
    assert [line.strip().split(":")[0] for line in lines] == [
        "modle",
        "direction",
        "model",
        "seed",
        "criteria.honesty.positive",
        "criteria.honesty.negative",
        "runtime.max_rows",
        "instructions.draws",
        "filter.scale",
        "filter.keep",
        "pairs.temprature",
        "pairs.positive",
        "pairs.negative",
        "pairs.layers",
        "calibration.doses",
        "instructions.file",
    ]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"model": "m", "sed": 1}, "sed: unknown option (did you mean 'seed'?)"),
        ({"model": "m", "filter": {"scal": "raw"}}, "filter.scal: unknown option (did you mean 'scale'?)"),
        ({}, "model: is missing, and there is no default"),
        ({"model": ""}, "model: must not be empty, got ''"),
        ({"model": 3}, "model: must be a text in quotes, not 3"),
        ({"model": "m", "pairs": 3}, "pairs: must be a table of settings, not 3"),
        ({"model": "m", "seed": True}, "seed: must be a whole number, not True"),
        ({"model": "m", "filter": {"keep": 0}}, "filter.keep: must be greater than 0, got 0.0"),
        ({"model": "m", "filter": {"keep": float("nan")}}, "filter.keep: must be a finite number, not nan"),
        ({"model": "m", "pairs": {"negative": 0.1}}, "pairs.negative: must be less than 0, got 0.1"),
        ({"model": "m", "criteria": {"a": {"positive": "x"}}}, "criteria.a.negative: is missing, and there is no "
         "default"),
        ({"model": "m", "runtime": {"kv_memory": "lots"}}, "runtime.kv_memory: must be bytes or a size like "
         "\"8GiB\", got 'lots'"),
    ],
)  # fmt: skip
def test_messages(table: dict, expected: str) -> None:
    assert expected in _errors(table)


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    file.touch()
    same = {"positive": "p", "negative": "p"}
    errors = _errors({"model": "m", "calibration": {}, "pairs": {"positive": 0.1}, "criteria": {"x": same}})
    assert [e.split(":")[0] for e in errors] == ["pairs.positive", "criteria.x"]
    errors = _errors({"model": "m", "directions": {"file": str(file), "method": "mean_difference"}, "calibration": {}})
    assert [e.split(":")[0] for e in errors] == ["calibration", "directions.method"]
    errors = _errors({"model": "m", "instructions": {"file": str(file), "draws": 5, "min_chars": 9, "max_chars": 3}})
    assert [e.split(":")[0] for e in errors] == ["instructions.max_chars", "instructions.draws"]


def test_a_cross_check_is_not_lost_behind_a_simple_error() -> None:
    errors = _errors({"model": "m", "sed": 0, "calibration": {}, "pairs": {"positive": 0.1}})
    assert [e.split(":")[0] for e in errors] == ["sed", "pairs.positive"]


@pytest.mark.parametrize("content", [b"model = ", b"model = 'x'\nmodel = 'y'", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.toml is not"):
        RunConfig.load(path)


def test_plain_values_and_back() -> None:
    config = RunConfig.from_dict(
        {
            "model": "m",
            "seed": 3,
            "criteria": {"kind": {"positive": "be kind", "negative": "be cruel"}},
            "runtime": {"kv_memory": "1GiB"},
            "calibration": {"doses": [0.1, 1]},
        }
    )
    assert config.calibration is not None
    assert config.calibration.doses == (0.1, 1.0)
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict({"model": "m"}).to_dict()["pairs"]["temperature"] == 0.8


def test_files_are_relative_to_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/mine.txt").write_text("Hello?\n")
    (tmp_path / "sub/run.toml").write_text('model = "m"\ninstructions.file = "mine.txt"\n')
    monkeypatch.chdir(tmp_path)
    assert RunConfig.load("sub/run.toml").instructions.file == str((tmp_path / "sub/mine.txt").resolve())


def test_default_criteria_are_four_and_the_tiny_models_are_its_own() -> None:
    from icon2_rt import tiny

    names = ["honesty", "harmlessness", "helpfulness", "general"]
    assert list(RunConfig.from_dict({"model": "m"}).resolved_criteria()) == names
    for name, criterion in RunConfig.from_dict({"model": "tiny"}).resolved_criteria().items():
        assert (criterion.positive, criterion.negative) == tuple(tiny.CRITERIA[name])


@pytest.mark.parametrize(
    ("n_layers", "first", "last"),
    [(32, 10, 20), (36, 12, 24), (48, 16, 32)],  # 1-based and inclusive, as the paper prints them
)
def test_the_middle_is_the_papers_band(n_layers: int, first: int, last: int) -> None:
    assert controlled_layers("middle", n_layers) == list(range(first - 1, last))


@pytest.mark.parametrize("n_layers", range(1, 65))
def test_the_middle_exists_for_every_model(n_layers: int) -> None:
    layers = controlled_layers("middle", n_layers)
    assert layers
    assert layers == list(range(layers[0], layers[-1] + 1))
    assert layers[0] >= 0
    assert layers[-1] < n_layers


def test_layer_ranges() -> None:
    assert controlled_layers("9:20", 32) == list(range(9, 20))
    assert controlled_layers("-4:", 8) == [4, 5, 6, 7]
    assert controlled_layers("3", 8) == [3]
    assert controlled_layers("-1", 8) == [7]
    assert controlled_layers("all", 3) == [0, 1, 2]
    for text in ("9:20", "5:5", "6:2"):
        with pytest.raises(ValueError, match=r"pairs\.layers"):
            controlled_layers(text, 8)
    for text in ("", "a:b", "1:2:3", "upper"):
        with pytest.raises(ValueError, match="0-based range"):
            parse_layers(text)


def test_criteria_files(tmp_path: Path) -> None:
    path = tmp_path / "criteria.toml"
    path.write_text('[kind]\npositive = "Be kind."\nnegative = "Be cruel."\n')
    assert read_criteria(path)["kind"].negative == "Be cruel."
    path.write_text('model = "m"\n[criteria.kind]\npositive = "Be kind."\nnegative = "Be cruel."\n')
    assert list(read_criteria(path)) == ["kind"]
    path.write_text('[kind]\npositive = "Be kind."\nnegativ = "Be cruel."\n[other]\npositive = "x"\nnegative = "x"\n')
    with pytest.raises(ValueError) as caught:
        read_criteria(path)
    assert "did you mean 'negative'" in str(caught.value)
    assert "other: positive and negative are the same" in str(caught.value)
    path.write_text("")
    with pytest.raises(ValueError, match="no criterion"):
        read_criteria(path)


def test_the_preset_is_the_paper_and_any_part_of_it_can_be_replaced() -> None:
    paper = RunConfig.from_dict({"model": "m", "preset": "icon2"})
    assert (paper.directions.features, paper.directions.method) == (1024, "pca")
    assert (paper.instructions.draws, paper.filter.scale, paper.filter.keep) == (1_000_000, "raw", 0.1)
    assert (paper.pairs.layers, paper.pairs.unit) == ("middle", "residual")
    assert given_strengths(paper.pairs, ["a", "b"]) == ({"a": 0.1, "b": 0.1}, {"a": -0.05, "b": -0.05})
    assert PAPER_TRAINING["beta"] == 0.1
    assert len(paper.resolved_criteria()) == 4
    assert RunConfig.from_dict(paper.to_dict()) == paper
    mine = RunConfig.from_dict({"model": "m", "preset": "icon2", "filter": {"keep": 0.5}, "pairs": {"layers": "all"}})
    assert (mine.filter.scale, mine.filter.keep, mine.pairs.layers) == ("raw", 0.5, "all")
    assert "did you mean 'icon2'" in _errors({"model": "m", "preset": "icon"})[0]


def test_a_preset_leaves_a_section_alone_whose_work_a_file_does(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Why?\n")
    table = {"model": "m", "preset": "icon2", "instructions": {"file": str(tmp_path / "mine.txt")}}
    assert RunConfig.from_dict(table).instructions.draws == 10_000


def test_criteria_by_name() -> None:
    config = RunConfig.from_dict({"model": "m", "criteria": ["general", "honesty"]})
    assert list(config.resolved_criteria()) == ["general", "honesty"]
    assert config.criteria["honesty"].negative == "You are a dishonest assistant."
    [error] = _errors({"model": "m", "criteria": ["honestly"]})
    assert error.startswith("criteria: unknown criterion 'honestly' (did you mean 'honesty'?); there are honesty, ")
    assert "empty" in _errors({"model": "m", "criteria": []})[0]


@pytest.mark.parametrize("negative", ["You are honest.", " you  are HONEST. "])
def test_prompts_that_say_the_same_are_refused(negative: str) -> None:
    criterion = {"positive": "You are honest.", "negative": negative}
    assert "no direction between them" in _errors({"model": "m", "criteria": {"honesty": criterion}})[0]


def test_strengths_of_their_own_for_each_criterion() -> None:
    two = {"a": {"positive": "p", "negative": "q"}, "b": {"positive": "r", "negative": "s"}}
    config = RunConfig.from_dict({"model": "m", "criteria": two, "pairs": {"positive": {"a": 1, "b": 2.0}}})
    assert given_strengths(config.pairs, ["a", "b"]) == ({"a": 1.0, "b": 2.0}, {"a": -0.05, "b": -0.05})
    assert RunConfig.from_dict(config.to_dict()) == config
    assert [
        e.split(";")[0] for e in _errors({"model": "m", "criteria": two, "pairs": {"negative": {"a": -1.0, "c": -1.0}}})
    ] == ["pairs.negative: unknown criterion 'c'", "pairs.negative: has no strength for b"]
    wrong = _errors({"model": "m", "criteria": two, "pairs": {"positive": {"a": 1, "b": -1}}})
    assert wrong == ["pairs.positive: must be greater than 0, got {'a': 1.0, 'b': -1.0}"]


def test_doses_have_no_default() -> None:
    errors = _errors({"model": "m", "pairs": {"unit": "dose", "positive": 0.1}})
    assert [e.split(":")[0] for e in errors] == ["pairs.negative"]
    RunConfig.from_dict({"model": "m", "pairs": {"unit": "dose"}, "calibration": {}})  # it finds them


def test_prompts_beside_ready_directions_make_contrast_and_calibration_possible(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    file.touch()
    table = {"model": "m", "directions": {"file": str(file)}, "filter": {"scale": "contrast"}, "calibration": {}}
    assert [e.split(":")[0] for e in _errors(table)] == ["calibration", "filter.scale"]
    RunConfig.from_dict({**table, "criteria": {"a": {"positive": "p", "negative": "q"}}})


def test_the_scale_may_be_a_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def scores(texts, projected, names): ...\n")
    (tmp_path / "run.toml").write_text('model = "m"\nfilter.scale = "mine.py:scores"\n')
    assert RunConfig.load(tmp_path / "run.toml").filter.scale == f"{tmp_path / 'mine.py'}:scores"
    assert RunConfig.from_dict({"model": "m", "filter": {"scale": "math:fsum"}}).filter.scale == "math:fsum"
    [error] = _errors({"model": "m", "filter": {"scale": "zscor"}})
    assert "(did you mean 'zscore'?), or a function of your own" in error
    assert "filter.scale: there is no file" in _errors({"model": "m", "filter": {"scale": "none.py:f"}})[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_module:f", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("math:no_such", "no function 'no_such' in math"),
        ("math:pi", "no function 'pi' in math"),
    ],
)
def test_functions_that_are_not_there(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"filter.scale: .*{message}"):
        load_function(text, "filter.scale")


def test_a_function_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("class Judge:\n    @staticmethod\n    def twice(x):\n        return 2 * x\n")
    assert load_function(f"{path}:Judge.twice", "x")(4) == 8
    path.write_text("1 / 0\n")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_function(f"{path}:f", "x")


def test_calibrate_switches_a_calibration_on_and_off() -> None:
    on = RunConfig.from_dict({"model": "m", "calibrate": True})
    assert on.calibration is not None and on.calibrates
    assert on.calibration.instructions == 100
    assert RunConfig.from_dict(on.to_dict()) == on
    off = RunConfig.from_dict({"model": "m", "calibrate": False, "calibration": {}, "pairs": {"positive": 0.2}})
    assert off.calibration is not None and not off.calibrates
    assert not RunConfig.from_dict({"model": "m"}).calibrates
    assert "leave it out" in _errors({"model": "m", "calibrate": True, "pairs": {"positive": 0.2}})[0]


def test_calibrations_that_contradict_themselves() -> None:
    errors = _errors(
        {
            "model": "m",
            "pairs": {"layers": "9:20"},
            "calibration": {
                "doses": [0.1, 3],
                "bands": ["middle", "1-5", "middle"],
                "quality": "projection",
                "judge": "r",
                "better": 1.0,
            },
        }
    )
    assert [e.split(":")[0] for e in errors] == [
        "calibration.better",
        "calibration.doses",
        "calibration.bands[1]",
        "calibration.bands",
        "pairs.layers",
        "calibration.quality",
    ]
    assert "did you mean 'agreement'" in _errors({"model": "m", "calibration": {"quality": "agreemnt"}})[0]
    assert "has no effect" in _errors({"model": "m", "calibration": {"label": "good"}})[0]
    assert _errors({"model": "m", "calibration": {"bands": "middle"}}) == [
        "calibration.bands: must be a list of texts, not 'middle'"
    ]


def test_bands_of_a_model() -> None:
    config = RunConfig.from_dict({"model": "m", "calibration": {"bands": ["middle", "1:5"]}})
    assert controlled_bands(config, 6) == {"middle": (1, 2, 3), "1:5": (1, 2, 3, 4)}
    assert controlled_bands(RunConfig.from_dict({"model": "m", "pairs": {"layers": "all"}}), 3) == {"all": (0, 1, 2)}
    with pytest.raises(ValueError, match=r"calibration\.bands: '1:5' reaches outside"):
        controlled_bands(config, 3)
