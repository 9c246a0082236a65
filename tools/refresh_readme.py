"""Run everything that README.md and docs/ show, and put the real outputs and generated tables in.

    python tools/refresh_readme.py            rewrite what is out of date (after a new model, option or family)
    python tools/refresh_readme.py --check    change nothing; exit code 1 and a diff if something is out of date

tests/test_readme.py does the second. Each document is run from top to bottom, in a new folder and one namespace:

- ```python blocks are executed; a ```text block right after one is what it printed, and is compared exactly;
- in ```console blocks, lines with "$ " are commands (a backslash at the end continues one); lines under a command, if
  any, are what it printed;
- a ```toml block whose first line is "# NAME.toml" is written to that file;
- <!-- excerpt "COMMAND" from "A" to "B" --> before a ```text block: the lines of what COMMAND printed from the first
  that begins with A up to the next that begins with B (without from and to: all). Long runs are not the same to the
  last bit on every machine, so --check compares only headings (lines that begin in the first column, digits aside);
- <!-- table NAME --> … <!-- end --> holds a table made from the code.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EXCERPT = re.compile(r'<!-- excerpt "([^"]+)"(?: from "([^"]+)" to "([^"]+)")? -->\s*\Z')
_TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: ``text[start:end]`` is its content; ``before`` is what stands between it and the one before."""

    language: str
    content: str
    start: int
    end: int
    line: int
    before: str


class Failed(Exception):
    """A block or a command of a document that does not work; the message says which and why."""


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    last = 0
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        yield Block(match[1], match[2], match.start(2), match.end(2), line, text[last : match.start()])
        last = match.end()


def refreshed(text: str, name: str, folder: Path, *, keep_excerpts: bool = False) -> str:
    """``text`` with every output and table as it is today. Runs everything in ``folder``.

    ``keep_excerpts`` leaves an excerpt as it is where its headings are right.

    Raises:
        Failed: something in it cannot be run, or ends with an error.
    """
    for shared in ("tools", "examples"):
        with contextlib.suppress(FileExistsError):
            (folder / shared).symlink_to(ROOT / shared)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    changes: list[tuple[int, int, str]] = []
    printed: str | None = None  # by the python block just before
    with contextlib.chdir(folder):
        for block in blocks(text):
            where = f"{name}, line {block.line}"
            excerpt = _EXCERPT.search(block.before)
            if block.language == "python":
                printed = _execute(block, where, namespace)
                continue
            if block.language == "text" and excerpt:
                new = _command(excerpt[1], where)
                if excerpt[2]:
                    new = _excerpt(new, excerpt[2], excerpt[3], where)
                if not keep_excerpts or _headings(new) != _headings(block.content):
                    changes.append((block.start, block.end, new))
            elif block.language == "text" and printed is not None and not block.before.strip():
                changes.append((block.start, block.end, printed))
            elif block.language in ("console", "bash"):
                changes.append((block.start, block.end, _console(block, where)))
            elif block.language == "toml" and (title := re.match(r"# (\w[\w-]*\.toml)\b", block.content)):
                (folder / title[1]).write_text(block.content, encoding="utf-8")
            printed = None
    for start, end, content in reversed(changes):
        text = text[:start] + content + text[end:]
    return _TABLE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


def links(text: str) -> list[str]:
    """The files that a document points to: targets of its relative links, code blocks aside."""
    found = _LINK.findall(_FENCE.sub("", text))
    return [target.split("#")[0] for target in found if "://" not in target and not target.startswith("#")]


# ---------------------------------------------------------------- running


def _execute(block: Block, where: str, namespace: dict[str, Any]) -> str:
    output = io.StringIO()
    code = "\n" * (block.line - 1) + block.content  # so that a traceback has the document's line numbers
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(code, where, "exec"), namespace)
    except Exception as error:
        raise Failed(f"{where}: this python block ends with an error\n{traceback.format_exc()}") from error
    return _tidy(output.getvalue())


def _console(block: Block, where: str) -> str:
    """The block with every command's real output, where it shows one."""
    out = ""
    if not block.content.startswith("$ "):
        raise Failed(f"{where}: a console block begins with a command")
    for part in re.split(r"^\$ ", block.content, flags=re.MULTILINE)[1:]:
        match = re.match(r"((?:.*\\\n)*.*\n)", part)
        assert match
        shown = part[match.end() :]
        printed = _command(match[1].replace("\\\n", " ").strip(), where)
        out += f"$ {match[1]}{printed if shown else ''}"
    return out


def _command(command: str, where: str) -> str:
    """Run one command line, or check it otherwise where running it would install things or start this again."""
    words = shlex.split(command, comments=True)
    program = words[0]
    if program == "icon2":
        from icon2_rt import cli

        return _in_this_process(words, cli.main, where)
    if program == "python" and words[1].startswith(("tools/", "examples/")):
        return _in_this_process(words[1:], lambda: runpy.run_path(words[1], run_name="__main__"), where)
    if program == "make":
        done = subprocess.run(["make", "-n", "-C", ROOT, *words[1:]], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"{where}: {command} ends with {done.returncode}\n{done.stderr}")
        return ""
    if words[:2] == ["pip", "install"]:
        _check_install(words[2:], where)
        return ""
    raise Failed(f"{where}: no rule says how to run or check {command!r}; see tools/refresh_readme.py")


def _in_this_process(words: list[str], start: Callable[[], object], where: str) -> str:
    """What a program prints: starting another process for every command would cost most of the time."""
    output, errors = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, words
    code: Any = 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            start()
    except SystemExit as end:
        code = end.code
    except Exception as error:
        raise Failed(f"{where}: {shlex.join(words)} ends with an error\n{traceback.format_exc()}") from error
    finally:
        sys.argv = argv
    if code:
        raise Failed(f"{where}: {shlex.join(words)} ends with {code}\n{output.getvalue()}{errors.getvalue()}")
    return _tidy(output.getvalue())


def _check_install(words: list[str], where: str) -> None:
    """Files that a pip line names are there, and so are the extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for previous, word in zip(["", *words], words, strict=False):
        target, _, names = word.rstrip("]").partition("[")
        if previous == "-c" and not (ROOT / word).is_file():
            raise Failed(f"{where}: pip install: there is no {word}")
        unknown = {name for name in names.split(",") if name} - extras.keys()
        if unknown:
            raise Failed(f"{where}: pip install: there is no extra {sorted(unknown)}; there are {sorted(extras)}")
        if names and target not in (".", "icon2_rt"):
            raise Failed(f"{where}: pip install: {target!r} is not this package")


def _tidy(output: str) -> str:
    """Without the blanks that pad lines, and without blank lines around."""
    text = "\n".join(line.rstrip() for line in output.splitlines()).strip("\n")
    return f"{text}\n" if text else ""


def _excerpt(output: str, first: str, last: str, where: str) -> str:
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith(first)), None)
    if begin is None:
        raise Failed(f"{where}: no line of the output begins with {first!r}\n{output}")
    end = next((i for i in range(begin, len(lines)) if lines[i].startswith(last)), None)
    if end is None:
        raise Failed(f"{where}: no line of the output after {first!r} begins with {last!r}\n{output}")
    return _tidy("\n".join(lines[begin:end]))


def _headings(text: str) -> list[str]:
    return [re.sub(r"\d+", "#", line) for line in text.splitlines() if line[:1].strip()]


# ---------------------------------------------------------------- tables made from the code


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _families() -> str:
    from icon2_rt.models import FAMILIES

    rows = []
    for family in FAMILIES.values():
        extra = [text for flag, text in ((family.qkv_bias, "bias on q, k, v"), (family.qk_norm, "norm on q, k heads"))
                 if flag]  # fmt: skip
        rows.append([family.name, f"`{family.architecture}`", family.examples, ", ".join(extra) or "–"])
    return _table(["family", "architecture", "checkpoints", "beyond the common decoder"], rows)


def _commands() -> str:
    from icon2_rt.cli import app

    rows = []
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
        name = command.name or command.callback.__name__
        rows.append([f"`icon2 {name}`", " ".join(command.callback.__doc__.split("\n\n")[0].split())])
    return _table(["command", "does"], rows)


def _settings() -> str:
    from icon2_rt.pipeline import config

    def rows(cls: type, prefix: str) -> Iterator[list[str]]:
        for field in dataclasses.fields(cls):
            section = {"calibration": config.CalibrationConfig, "baseline": config.BaselineConfig}.get(
                field.name, field.default_factory
            )
            if isinstance(section, type) and dataclasses.is_dataclass(section):
                yield from rows(section, f"{prefix}{field.name}.")
            elif field.name != "criteria":
                missing = field.default is dataclasses.MISSING
                if missing and field.default_factory is not dataclasses.MISSING:
                    default = "–"
                else:
                    default = "required" if missing else "–" if field.default is None else f"`{_toml(field.default)}`"
                yield [f"`{prefix}{field.name}`", default]

    return _table(["key", "default"], list(rows(config.RunConfig, "")))


def _toml(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else f'"{value}"' if isinstance(value, str) else str(value)


def _checks() -> str:
    from icon2_rt.pipeline.checks import RULES

    rows = [
        [
            rule.title,
            rule.limits.replace("green ", "").replace(", red ", "; "),
            rule.means,
            rule.todo + (f" In a baseline: {rule.unsteered}" if rule.unsteered else ""),
        ]
        for rule in RULES.values()
    ]
    escaped = [[cell.replace("*", "\\*").replace("|", "\\|") for cell in row] for row in rows]
    return _table(["check", "green; red", "means", "what to do"], escaped)


def _roofline(name: str) -> Callable[[], str]:
    def table() -> str:
        sys.path.insert(0, str(ROOT))  # bench/ is a part of the checkout, not of what is installed
        try:
            from bench import roofline
        finally:
            sys.path.remove(str(ROOT))
        made: str = getattr(roofline, name)()
        return made

    return table


TABLES: dict[str, Callable[[], str]] = {
    "families": _families,
    "commands": _commands,
    "settings": _settings,
    "checks": _checks,
    "step_sizes": _roofline("sizes_table"),
    "step_times": _roofline("steps_table"),
    "step_targets": _roofline("targets_table"),
    "run_shares": _roofline("runs_table"),
}


# ---------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description="Refresh (or check) what README.md and docs/ show.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something is out of date")
    parser.add_argument("documents", nargs="*", default=DOCUMENTS, help="paths in the checkout; all by default")
    arguments = parser.parse_args()
    # The examples use the shipped model alone; caches of datasets belong to this run.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    stale = 0
    with tempfile.TemporaryDirectory() as parent:
        os.environ["HF_DATASETS_CACHE"] = f"{parent}/cache"
        for number, document in enumerate(arguments.documents):
            path, folder = ROOT / document, Path(parent) / str(number)
            folder.mkdir()
            old = path.read_text(encoding="utf-8")
            try:
                new = refreshed(old, document, folder, keep_excerpts=arguments.check)
            except Failed as failure:
                print(failure, file=sys.stderr)
                return 2
            if new == old:
                continue
            stale += 1
            if arguments.check:
                diff = difflib.unified_diff(old.splitlines(), new.splitlines(), document, f"{document} today", n=1)
                print("\n".join(line.rstrip("\n") for line in diff))
            else:
                path.write_text(new, encoding="utf-8")
                print(f"{document}: refreshed")
    return int(arguments.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
