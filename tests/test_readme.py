"""Every command and snippet of README.md and docs/ runs and prints what is shown there; every link leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icon2_rt import Direction, Steering
from icon2_rt.engine import EngineOptions, engine, items
from icon2_rt.pipeline import calibrate, effect, separability
from icon2_rt.pipeline.config import CalibrationConfig
from tools import refresh_readme
from tools.refresh_readme import DOCUMENTS, ROOT, Failed, blocks, links, refreshed

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_everything_shown_runs_and_prints_what_is_shown() -> None:
    """In a process of its own: what it trains, warns and sets must not reach other tests, nor theirs the documents.

    What is out of date is shown as a diff; `python tools/refresh_readme.py` mends it.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore::FutureWarning"}
    command = [sys.executable, ROOT / "tools/refresh_readme.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file(document: str) -> None:
    text, folder = (ROOT / document).read_text(encoding="utf-8"), (ROOT / document).parent
    assert [target for target in links(text) if not (folder / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_anchor_is_a_heading(document: str) -> None:
    path = ROOT / document
    for file, anchor in re.findall(r"\]\(([^)\s:#]*)#([^)\s]+)\)", path.read_text(encoding="utf-8")):
        target = path.parent / file if file else path
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], (file, anchor)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_has_a_rule(document: str) -> None:
    """A block in another language would be a snippet that nothing runs."""
    found = {block.language for block in blocks((ROOT / document).read_text(encoding="utf-8"))}
    assert found <= {"python", "text", "console", "toml"}


def test_the_readme_names_the_two_commands_first() -> None:
    commands = [block.content for block in blocks(README) if block.language == "console"]
    assert re.findall(r"^\$ (make \w+)", commands[0], re.MULTILINE) == ["make demo", "make test"]


def test_the_readmes_example_has_ten_lines() -> None:
    code = next(block.content for block in blocks(README) if block.language == "python")
    assert len([line for line in code.splitlines() if line.strip()]) == 10


def _steering_rows() -> list[tuple[str, float, float]]:
    found = re.findall(r"^\| `([^`]+)` \| (-?[\d.]+) \| (-?[\d.]+) \|", README, re.MULTILINE)
    assert len(found) >= 5
    return [(code, float(alpha), float(beta)) for code, alpha, beta in found]


@pytest.mark.parametrize(("code", "alpha", "beta"), _steering_rows())
def test_the_table_of_steerings(code: str, alpha: float, beta: float) -> None:
    d = Direction("d", torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))))
    steering = eval(code, {"d": d})
    assert isinstance(steering, Steering)
    [term] = steering.terms
    torch.testing.assert_close(term.alpha, torch.full((4,), alpha))
    torch.testing.assert_close(term.beta, torch.full((4,), beta))


_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}


def test_the_numbers_in_the_documents_are_those_of_the_code() -> None:
    text = " ".join(" ".join((ROOT / path).read_text(encoding="utf-8") for path in DOCUMENTS).split())
    for words in (
        f"`max_directions` ({EngineOptions.max_directions}) distinct",
        f"`max_terms` ({EngineOptions.max_terms}) terms",
        f"fill a tensor-core tile of {items.ITEM_QUERIES}",
        f"{_WORDS[engine._BEHIND]} steps later on CUDA",
        f"{effect.SAMPLE} pairs, evenly spaced",
        f"the mean over {effect.POSITIONS} positions",
        f"ever more pairs ({separability.PAIRS} at most)",
        f"at most {calibrate.FLUENCY_LOSS} nats per token",
        f"({calibrate.CUT_OFF_GAIN * 100:.0f} points at most)",
        f"better in more than {CalibrationConfig.better * 100:.0f} %",
        f"no more than {calibrate.MANY_TIES * 100:.0f} % are ties",
    ):
        assert words in text


# --- the tool itself -------------------------------------------------------------------------------------------------

EXAMPLE = """
```python
print(6 * 7)
```

```text
{output}
```

```toml
# a.toml
x = 1
```

```python
assert open("a.toml").read().endswith("x = 1\\n")
```
"""


def test_refreshing_puts_the_real_output_in(tmp_path: Path) -> None:
    assert refreshed(EXAMPLE.format(output=41), "it", tmp_path) == EXAMPLE.format(output=42)
    assert refreshed(EXAMPLE.format(output=42), "it", tmp_path) == EXAMPLE.format(output=42)


def test_a_table_is_made_from_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(refresh_readme.TABLES, "families", lambda: "| new |\n")
    old = "<!-- table families -->\n| old |\n<!-- end -->\n"
    assert refreshed(old, "it", tmp_path) == old.replace("old", "new")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```python\n\n1 / 0\n```", r'"it, line 2", line 3.*ZeroDivisionError'),
        ("```console\n$ icon2 sing\n```", "icon2 sing ends with 2"),
        ("```console\n$ make sandwich\n```", "make sandwich ends with 2"),
        ("```console\n$ rm -r everything\n```", "no rule"),
        ("```console\n$ pip install -c none.txt .\n```", "no none.txt"),
        ('```console\n$ pip install "icon2_rt[sauce]"\n```', "no extra"),
        ("```console\nmake demo\n```", "begins with a command"),
        ('<!-- excerpt "icon2 --help" from "Nothing" to "x" -->\n```text\n```', "no line of the output"),
    ],
)
def test_what_does_not_work_is_an_error(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Failed, match=f"(?s){reason}"):
        refreshed(f"{text}\n", "it", tmp_path)


def test_commands_print_what_is_shown_under_them(tmp_path: Path) -> None:
    shown = "```console\n$ icon2 bench \\\n    --help\nold\n$ icon2 --help\n```\n"
    new = refreshed(shown, "it", tmp_path)
    assert new.startswith("```console\n$ icon2 bench \\\n    --help\n")
    assert "The benchmarks of a checkout" in new
    assert new.endswith("$ icon2 --help\n```\n")


def test_of_an_excerpt_only_the_headings_are_compared(tmp_path: Path) -> None:
    directive = '<!-- excerpt "icon2 --help" from "Options" to "Commands" -->\n'
    block = "```text\nOptions:\n  whatever\n```\n"
    assert refreshed(directive + block, "it", tmp_path, keep_excerpts=True) == directive + block
    assert "--help" in refreshed(directive + block, "it", tmp_path)
    assert "--help" in refreshed(directive + block.replace("Options", "Choices"), "it", tmp_path, keep_excerpts=True)


def test_links() -> None:
    text = "[a](b.md#c) [d](https://e.org) [f](#g)\n```text\n[h](i.md)\n```\n"
    assert links(text) == ["b.md"]
