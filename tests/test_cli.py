"""The command line: every command with its help, real work, and one paragraph with exit code 2 for bad input."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from icon2_rt import DirectionSet, atomic, cli, doctor
from tests.models import tiny_llama, tiny_tokenizer

Icon2 = Callable[..., tuple[int, str, str]]

COMMANDS = [
    "demo",
    "run",
    "calibrate",
    "directions",
    "instructions",
    "pairs",
    "export",
    "answers",
    "costs",
    "bench",
    "doctor",
]
CRITERIA = (
    '[kind]\npositive = "Be kind."\nnegative = "Be cruel."\n[brief]\npositive = "Be brief."\nnegative = "Talk."\n'
)


@pytest.fixture
def icon2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Icon2:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["icon2", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert isinstance(code, int | None)
        return code or 0, out, err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(eos_token_id=1, bos_token_id=0, pad_token_id=0).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_the_version_is_the_packages(icon2: Icon2) -> None:
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert icon2("--version") == (0, f"icon2_rt {pyproject['project']['version']}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(icon2: Icon2, command: str) -> None:
    code, out, err = icon2(command, "--help")
    assert (code, err) == (0, "")
    assert f"icon2 {command}" in out


def test_help_lists_every_command(icon2: Icon2) -> None:
    code, out, _ = icon2("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


def _refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, the words on stderr, nothing on stdout, and no traceback."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_bad_input_ends_with_2(icon2: Icon2, tmp_path: Path) -> None:
    broken, typo, text = tmp_path / "broken.toml", tmp_path / "typo.toml", tmp_path / "a.txt"
    broken.write_text("model = ")
    typo.write_text('model = "x"\nsed = 1\n[pairs]\npositive = -1\n')
    text.write_text("Why?\n")
    _refused(icon2("demo", "--wrong"), "--wrong")
    _refused(icon2("sing"), "sing")
    _refused(icon2("run"), "config")
    _refused(icon2("run", tmp_path / "none.toml"), "none.toml", "No such file")
    _refused(icon2("run", broken), "not valid TOML")
    _refused(icon2("run", typo), "2 problems", "did you mean 'seed'", "pairs.positive")
    _refused(icon2("run", tmp_path), "is a folder", "TOML")
    _refused(icon2("instructions", "m", "-n", "0", "--out", tmp_path / "a.jsonl"), "instructions.draws", "at least 1")
    _refused(icon2("instructions", "m", "-n", "many", "--out", tmp_path / "a.jsonl"), "integer")
    _refused(icon2("instructions", "m", "--out", tmp_path / "a.csv"), ".jsonl")
    _refused(icon2("instructions", "m", "--out", tmp_path / "no/a.jsonl"), "no folder")
    _refused(icon2("directions", "m", "--criteria", typo, "--out", tmp_path / "d.safetensors"), "wrong criteria")
    _refused(
        icon2("pairs", "m", "--directions", tmp_path / "d", "--instructions", text, "--out", tmp_path / "o"), "no file"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "broken.toml", "typo.toml"]


def test_a_model_that_is_not_there(icon2: Icon2, tmp_path: Path) -> None:
    _refused(icon2("instructions", tmp_path / "nothing", "--out", tmp_path / "a.jsonl"), "nothing")


def test_a_full_disk(icon2: Icon2, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    out = tmp_path / "a.jsonl"
    code, _, err = icon2("instructions", model, "-n", 4, "--max-new-tokens", 8, "--out", out)
    assert code == 2
    assert "No space left on device" in err.splitlines()[-1]
    assert str(out) in err
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_where_it_is_wanted(icon2: Icon2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICON2_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        icon2("run", tmp_path / "none.toml")


def test_stopped_by_hand(icon2: Icon2, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", stop)
    code, _, err = icon2("doctor")
    assert code == 130
    assert "the same command continues" in err


def test_the_single_steps_in_a_row(icon2: Icon2, tmp_path: Path) -> None:
    """directions → instructions → pairs, each from the files of the one before."""
    model, criteria, given = "tiny", tmp_path / "criteria.toml", tmp_path / "features.txt"
    criteria.write_text(CRITERIA)
    given.write_text("Why?\nWhat is it?\nHow?\nWrite a song.\n")
    directions, instructions, out = tmp_path / "d.safetensors", tmp_path / "i.jsonl", tmp_path / "pairs"
    code, text, err = icon2("directions", model, "--criteria", criteria, "--instructions", given, "--out", directions)
    assert code == 0, err
    assert DirectionSet.load(directions).names == ["kind", "brief"]
    assert "kind" in text

    code, text, err = icon2("instructions", model, "-n", 12, "--max-new-tokens", 48, "--out", instructions, "--seed", 3)
    assert code == 0, err
    items = [json.loads(line) for line in instructions.read_text().splitlines()]
    assert f"{len(items)} instructions" in text
    assert items

    given.write_text("Why?\nHow?\nWhen?\n")
    arguments = ["--directions", directions, "--instructions", given, "--out", out, "--max-new-tokens", 8]
    code, text, err = icon2("pairs", model, *arguments, "--positive", 1, "--negative", -0.5, "--layers", "1:3")
    assert code == 0, err
    assert "3 pairs" in text
    report = json.loads((out / "report.json").read_bytes())
    assert report["strengths"]["layers"] == [1, 2]
    assert report["counts"]["pairs"] == 3
    code, _, err = icon2("pairs", model, *arguments, "--positive", 2, "--negative", -0.5, "--layers", "1:3")
    assert code == 2
    assert "pairs.positive: 1.0 there, 2.0 now" in err


def test_a_calibration_by_command(icon2: Icon2, tmp_path: Path) -> None:
    """The table, the picture, and a folder that `icon2 run` continues; without a [calibration] section its defaults."""
    config, out = tmp_path / "c.toml", tmp_path / "run"
    config.write_text(
        'model = "tiny"\nruntime.threads = 1\ncriteria = ["honesty"]\ndirections.features = 12\n'
        "instructions.max_new_tokens = 48\npairs.max_new_tokens = 16\n"
        '[calibration]\ndoses = [0.1]\nbands = ["1:4", "1:5"]\ninstructions = 6\n'
    )
    code, text, err = icon2("calibrate", config, "--out", out)
    assert code == 0, err
    assert "Blocks 1 to 3" in text and "Blocks 1 to 4" in text
    assert "γ⁺" in text and "P(+ better)" in text
    assert "icon2 run" in text
    assert (out / "calibration.svg").is_file()
    strengths = json.loads((out / "strengths.json").read_bytes())
    assert strengths["calibration"]["instructions"] == 6
    assert max(map(len, text.splitlines())) <= 120


def test_a_template_without_a_system_role_gets_the_prompts_in_the_user_s_turn_and_says_so(
    icon2: Icon2, tmp_path: Path
) -> None:
    """Gemma's way: a system turn raises. The run works, and tells on the screen, on the page and in the manifest."""
    import torch

    llama, tokenizer = tiny_llama(eos_token_id=1, bos_token_id=0, pad_token_id=0), tiny_tokenizer()
    with torch.no_grad():
        llama.lm_head.weight[[0, 2, 3, 4]] = 0
    tokenizer.chat_template = (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "i.txt").write_text("Why?\nHow?\nWhen?\nWho?\n")
    (tmp_path / "c.toml").write_text(
        'model = "model"\nruntime.threads = 1\ndirections.features_file = "i.txt"\nfilter.keep = 1.0\n'
        'instructions.file = "i.txt"\nfilter.scale = "contrast"\npairs.max_new_tokens = 4\n'.replace(
            '"model"', json.dumps(str(tmp_path / "model"))
        )
        + CRITERIA.replace("[", "[criteria.")
    )
    code, text, err = icon2("run", tmp_path / "c.toml", "--out", tmp_path / "run")
    assert code == 0, err
    told = "the chat template has no system turn: the contrastive prompts stand in front of the user's text"
    assert told in " ".join(text.split())
    assert told in json.loads((tmp_path / "run/manifest.json").read_bytes())["notes"]
    assert "no system turn" in (tmp_path / "run/report.html").read_text()


def test_output_without_a_terminal_is_plain_text(model: Path, tmp_path: Path) -> None:
    """No colour codes, no bars that overwrite themselves, no line beyond 100 columns."""
    command = [sys.executable, "-c", "from icon2_rt.cli import main; main()", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "reference" in done.stdout


def test_doctor_says_what_would_be_used_and_why() -> None:
    findings = doctor.examine()
    by_name = {(f.section, f.name): f for f in findings}
    import torch

    assert by_name["versions", "torch"].value == torch.__version__
    device = by_name["would be used", "device"]
    assert device.value == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device.advice
    assert by_name["would be used", "backend"].value in ("reference", "triton", "native")
    for finding in findings:
        assert finding.state in ("ok", "missing", "note")
        if finding.state != "ok":
            assert finding.advice, f"{finding.name}: what is not right needs a word on what to do"


def test_doctor_sees_wrong_and_missing_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1", "transformers": None, "triton": "3.7.1", "numpy": "2.4.6", "safetensors": "0.8.0"}
    monkeypatch.setattr(doctor, "installed", versions.get)
    by_name = {f.name: f for f in doctor.examine() if f.section == "versions"}
    assert by_name["torch"].state == "note"
    assert "2.11" in by_name["torch"].advice
    assert by_name["transformers"].state == "missing"
    assert by_name["triton"].state == "ok"


def test_bench_needs_a_checkout(icon2: Icon2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "icon2_rt/cli.py"))
    _refused(icon2("bench"), "checkout")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    assert icon2("bench", "--quick")[0] == 3


# --- what ends a command ---------------------------------------------------------------------------------------------


def _float_overflow() -> None:
    raise FloatingPointError("prompts[3]: the logits of a row are not finite")


def _missing_package() -> None:
    import a_package_that_is_not_there  # noqa: F401  # type: ignore


def _compiled_library() -> None:
    import torch

    torch.zeros(2) @ torch.zeros(3)


def _template() -> None:
    import jinja2

    jinja2.Template("{{ a.b.c }}", undefined=jinja2.StrictUndefined).render()


def _too_large() -> None:
    (2**70).to_bytes(8, "little")


def _damaged_weights() -> None:
    from safetensors.torch import load

    load(b"not weights")


def _on_purpose() -> None:
    raise TypeError("prompts is always a list")


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (_float_overflow, ["prompts[3]", "not finite", "pairs.positive", "runtime.dtype"]),
        (_missing_package, ["a_package_that_is_not_there"]),
        (_compiled_library, ["RuntimeError", "ICON2_TRACEBACK"]),
        (_template, ["UndefinedError", "a"]),
        (_too_large, ["OverflowError"]),
        (_damaged_weights, ["SafetensorError"]),
        (_on_purpose, ["icon2: prompts is always a list"]),
    ],
)
def test_what_is_no_bug_ends_with_a_paragraph_and_2(
    icon2: Icon2, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None], words: list[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", fail)
    result = icon2("doctor")
    _refused(result, *words)
    assert "\n\n" not in result[2].strip()


def _attribute() -> None:
    None.text  # type: ignore[attr-defined]  # noqa: B018


def _key() -> None:
    {}["strengths"]


def _types() -> None:
    len(3)  # type: ignore[arg-type]


def _lengths() -> None:
    list(zip([1], [1, 2], strict=True))


def _unpacked() -> None:
    [_one] = [1, 2]


def _asserted() -> None:
    assert not sys.argv


def _impossible_state() -> None:
    from icon2_rt.engine.rows import Request, Row
    from icon2_rt.runtime import Runtime

    Runtime._completion(None, Row(None, 0, [], [], 0, 0, 0), "", None)  # type: ignore[arg-type]
    assert Request


@pytest.mark.parametrize("fail", [_attribute, _key, _types, _lengths, _unpacked, _asserted, _impossible_state])
def test_a_bug_ends_with_a_traceback_and_where_to_report_it(
    icon2: Icon2, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]
) -> None:
    monkeypatch.setattr(doctor, "examine", fail)
    code, out, err = icon2("doctor")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback") and fail.__name__ in err
    assert "Please report it" in err and "icon2 doctor" in err


def test_names_in_brackets_are_shown_as_they_are(icon2: Icon2, tmp_path: Path) -> None:
    """Paths and criteria that look like the markup of the library that prints them."""
    folder = tmp_path / "a [bold]b[/b] [/red] :smile:"
    folder.mkdir(parents=True)
    (folder / "i.txt").write_text("Why?\nHow?\nWhen? [/b]\n")
    (folder / "c.toml").write_text(
        'model = "tiny"\nruntime.threads = 1\ndirections.features_file = "i.txt"\nfilter.keep = 1.0\n'
        'instructions.file = "i.txt"\npairs.max_new_tokens = 4\npairs.positive = 0.5\npairs.negative = -0.5\n'
        '[criteria."kind [/b]"]\npositive = "Be kind."\nnegative = "Be cruel."\n'
    )
    code, text, err = icon2("run", folder / "c.toml", "--out", folder / "run")
    assert code == 0, err
    assert "kind [/b]" in text
    assert f"load_dataset({json.dumps(str(folder / 'run'))}" in text
    assert "".join(str(folder / "run").split()) in "".join(text.split())
    out = folder / "o.jsonl"
    code, text, err = icon2("export", folder / "run", "--out", out)
    assert code == 0, err
    assert "".join(str(out).split()) in "".join(text.split())
    code, text, err = icon2("costs", folder / "run")
    assert code == 0, err
    code, text, err = icon2("instructions", "tiny", "-n", 4, "--out", folder / "n.jsonl")
    assert code == 0, err
    assert "[/red]" in text


def test_doctor_qualifies_only_where_there_is_a_gpu(icon2: Icon2) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    _refused(icon2("doctor", "--qualify"), "--qualify: there is no CUDA device to try the kernels on")
    _refused(icon2("doctor", "tiny"), "go with --qualify")
    _refused(icon2("doctor", "--again"), "go with --qualify")
