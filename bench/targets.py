"""What the decode loop is held to on a GPU, as ratios within one run: each target beside what was measured, reached or
missed by how much.

`python -m bench targets FOLDER` reads the files that a GPU run left in FOLDER and prints the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench import RESULTS

Record = dict[str, Any]
# What was measured where: (the case, its value or the reason why there is none).
Found = Iterator[tuple[str, float | str]]


@dataclass(frozen=True)
class Target:
    """``bound`` on a ratio; ``unit``: how it is shown, "%" for an excess over 1, "of" for a share, "×" for a factor."""

    name: str
    benchmark: str
    sense: Literal["at most", "at least"]
    bound: float
    unit: Literal["%", "of", "×"]
    read: Callable[[Record], Found]

    def show(self, value: float) -> str:
        return {"%": f"{100 * (value - 1):+.2f} %", "of": f"{100 * value:.1f} %", "×": f"{value:.2f}×"}[self.unit]

    def verdict(self, value: float) -> str:
        missed = value - self.bound if self.sense == "at most" else self.bound - value
        if missed <= 0:
            return "reached"
        return f"missed by {missed:.2f}×" if self.unit == "×" else f"missed by {100 * missed:.2f} points"


def _compared(name: str, model: str, keep: Callable[[Record], bool]) -> Callable[[Record], Found]:
    def read(record: Record) -> Found:
        for f in record["figures"]:
            if f["name"] == name and f["model"] == model and keep(f):
                case = f"{f['model']}, {f['rows']} rows, {f['prompt']} tokens"
                yield case, f["ratio"]["median"] if f["status"] == "measured" else f["status"]

    return read


def _step_of_copy(record: Record) -> Found:
    for f in record["figures"]:
        if f["model"] == "llama3-8b" and f["pairs"] == 1:
            yield f"{f['model']}, 1 pair, {f['prompt']} tokens", f.get("of_copy", f["status"])


def _attention_of_copy(record: Record) -> Found:
    copy = next((f["gb_per_second"] for f in record["figures"] if f["op"] == "device_copy"), None)
    for f in record["figures"]:
        prompt = f["op"].removeprefix("attention_")
        if prompt.isdigit() and int(prompt) >= 2048 and f["rows"] >= 16:
            case = f"{f['model']}, {f['rows'] // 2} pairs, {prompt} tokens"
            yield case, f["gb_per_second"] / copy if copy else "no copy was measured"


def _speedup(contestant: str) -> Callable[[Record], Found]:
    def read(record: Record) -> Found:
        for f in record["figures"]:
            yield f"{record['model']['name']}, {f['prompts']} prompt(s)", f["speedup"][contestant]["median"]

    return read


def _qualified(record: Record) -> Found:
    """The share of the tried forms of ops that are right on the device, by model; why none was tried."""
    for f in record["figures"]:
        tried = f.get("forms_tried", ())
        right = sum(form["wrong"] is None for form in tried)
        yield f["model"], right / len(tried) if tried else f"{f['status']}: {f.get('reason', '')}"


def _sharing(what: str) -> Callable[[Record], Found]:
    """The cell where sharing does worst: the upper end of its interval, so that noise alone is no loss."""

    def read(record: Record) -> Found:
        split = record["settings"]["split"]  # below it there is nothing to share
        cells = [f for f in record["figures"] if f["what"] == what and f["prefix"] >= split]
        measured = [f for f in cells if f["status"] == "measured"]
        if measured:
            worst = min(measured, key=lambda f: f["ratio"]["high"])
            case = f"{worst['model']}, {worst['backend']}, {worst['branches']} branches over {worst['prefix']} tokens"
            yield f"{case}, the worst of {len(measured)}", worst["ratio"]["high"]
        elif cells:
            yield f"{cells[0]['model']} and others", cells[0]["status"]

    return read


def _everywhere(figure: Record) -> bool:
    return True


def _overhead_targets() -> Iterator[Target]:
    def most(name: str, compared: str, model: str, bound: float, keep: Callable[[Record], bool]) -> Target:
        return Target(name, "overhead", "at most", bound, "%", _compared(compared, model, keep))

    off = "over steering off"
    for model in ("llama3-8b", "qwen2-1.5b"):
        if model == "llama3-8b":
            yield most("8B: all blocks steered over unsteered", f"all blocks {off}", model, 1.01, _everywhere)
        else:
            at_256 = lambda f: f["rows"] == 256  # noqa: E731
            yield most("1.5B: all blocks steered over unsteered", f"all blocks {off}", model, 1.02, at_256)
        size = {"llama3-8b": "8B", "qwen2-1.5b": "1.5B"}[model]
        yield most(
            f"{size}: 3 directions × all blocks over unsteered",
            f"3 directions × all blocks {off}",
            model,
            1.04,
            _everywhere,
        )
        yield most(f"{size}: 256 distinct steerings over 1", "256 distinct steerings over 1", model, 1.02, _everywhere)
    pair = _compared("a pair over a single branch", "llama3-8b", _everywhere)
    yield Target("a pair over a single branch", "overhead", "at most", 1.1, "×", pair)
    ladder = _compared("8 sequential branches over a ladder of 8", "llama3-8b", _everywhere)
    yield Target("8 sequential branches over a ladder of 8", "overhead", "at least", 6.0, "×", ladder)
    for prompt, bound in ((2048, 1.25), (8192, 1.55)):
        keep = lambda f, prompt=prompt: f["prompt"] == prompt and f["groups"] == 32  # noqa: E731
        shared = _compared("unshared over shared", "llama3-8b", keep)
        yield Target(f"unshared over shared, 32 × {prompt}", "overhead", "at least", bound, "×", shared)


TARGETS = (
    Target("forms of kernels that are right here", "qualify", "at least", 1.0, "of", _qualified),
    *_overhead_targets(),
    Target("one 8B pair, of the copy's bandwidth", "step", "at least", 0.75, "of", _step_of_copy),
    Target("one 8B pair, of the copy's bandwidth (then)", "step", "at least", 0.85, "of", _step_of_copy),
    Target("grouped attention, of the copy's bandwidth", "micro", "at least", 0.85, "of", _attention_of_copy),
    Target("reading a prompt together over alone, attention", "crossover", "at least", 1.0, "×", _sharing("attention")),
    Target("reading a prompt together over alone, a step", "crossover", "at least", 1.0, "×", _sharing("step")),
    Target("over transformers in one batch", "pairs", "at least", 4.0, "×", _speedup("one_call")),
    Target("over two sequential calls of transformers", "pairs", "at least", 8.0, "×", _speedup("two_calls")),
)


def table(records: Iterable[Record]) -> list[tuple[str, str, str, str, str]]:
    """(target, case, bound, measured, verdict), a line for each case; "not measured" where there is none."""
    records = [r for r in records if r["environment"].get("gpu") or r["settings"].get("dry")]
    lines = []
    for target in TARGETS:
        bound = f"{target.sense} {target.show(target.bound)}"
        found = [line for r in records if r["benchmark"] == target.benchmark for line in target.read(r)]
        for case, value in found:
            shown = (value, "not measured") if isinstance(value, str) else (target.show(value), target.verdict(value))
            lines.append((target.name, case, bound, *shown))
        if not found:
            lines.append((target.name, "", bound, "", "not measured"))
    return lines


def text(lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    rows = [("target", "case", "bound", "measured", "verdict"), *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench targets", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="default: bench/results/")
    options = parser.parse_args(argv)
    records = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))]
    lines = table(records)
    print(text(lines))
    counts = {word: sum(line[-1].startswith(word) for line in lines) for word in ("reached", "missed", "not measured")}
    print(", ".join(f"{n} {word}" for word, n in counts.items()))


if __name__ == "__main__":
    main()
