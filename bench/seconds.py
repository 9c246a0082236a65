"""What a pair of the method and of each baseline takes in seconds, and a steered token beside an unsteered one: proof
item 6 as far as it takes a clock, and so a quiet machine. Tokens and FLOPs are in ``bench/training.py``."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import training
from bench.environment import environment, write
from bench.proof import model_folder
from icon2_rt import DirectionSet, Runtime
from icon2_rt.pipeline.runner import RunResult


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench seconds", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="seed0", help="as of python -m bench proof")
    parser.add_argument("--draws", type=int, default=500, help="instructions that the model writes; half are kept")
    parser.add_argument("--turns", type=int, default=5, help="how often steered and unsteered decoding are timed")
    parser.add_argument("--out", type=Path, help="default: bench/results/seconds-MODEL-DEVICE.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = training.datasets(Path(folder), options.model, options.draws, list(training.BASELINES), seed=0)
        record = {
            "benchmark": "seconds",
            "model": {"name": options.model},
            "settings": {**vars(options), "out": None, "pairs": runs["icon2"].report["counts"]["pairs"]},
            "environment": environment(),
            "costs": training.bills(runs, ["seconds"]),
            "steered_over_unsteered": overhead(runs["icon2"], model_folder(options.model), options.turns),
        }
    write(f"seconds-{options.model}", record, options.out)


def overhead(result: RunResult, model: Path, turns: int) -> dict[str, float]:
    """Seconds a decoded token of pairs, over the same without steering; turns alternate, medians are compared."""
    rt = Runtime.from_pretrained(model, kv_memory="256MiB")
    direction = next(iter(DirectionSet.load(result.path / "directions.safetensors")))
    chats = [record["prompt"] for record in result.records()][:32]
    push = 0.01 * direction[1:5]  # too small to change how long the answers are
    found: dict[str, list[float]] = {"steered": [], "unsteered": []}
    for turn in range(2 * turns + 2):
        name = ("steered", "unsteered")[turn % 2]
        sides: list[Any] = [push, -1 * push] if name == "steered" else [None, None]
        began = time.perf_counter()
        outputs = rt.generate_branches(chats, sides, seed=turn // 2, top_k=0, **training.ANSWERS)
        tokens = sum(len(c.token_ids) for output in outputs for c in output.branches)
        if turn >= 2:  # the first of each warms up
            found[name].append((time.perf_counter() - began) / tokens)
    middle = {name: median(values) for name, values in found.items()}
    return {"ratio": middle["steered"] / middle["unsteered"], **{f"{n}_seconds_a_token": v for n, v in middle.items()}}


if __name__ == "__main__":
    main()
