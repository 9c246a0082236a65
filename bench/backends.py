"""A decode step of steered pairs by each backend of this machine, which take turns in one process; and whether they
write the same tokens. A backend becomes a device's default by what is stored here."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch

from bench import subjects
from bench.environment import environment, write
from icon2_rt import Runtime, ops
from icon2_rt.engine.batch import Batch
from icon2_rt.engine.step import StepInputs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench backends", description=__doc__)
    parser.add_argument("--model", choices=["tiny", "random100m"], default="tiny")
    parser.add_argument("--prompts", type=int, nargs="+", choices=sorted(subjects.LENGTHS), default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    model = subjects.load(options.model, torch.device("cpu"))
    names = [name for name, why_not in ops.available(torch.device("cpu")).items() if why_not is None]
    runtimes = {name: Runtime(model, device="cpu", backend=name, keep_model=True) for name in names}
    figures = []
    for n in options.prompts:
        prompts = subjects.prompts(options.model, n)
        steerings = subjects.steerings(model, prompts[0])
        times: dict[str, list[float]] = {name: [] for name in names}
        tokens: dict[str, list[list[int]]] = {}
        before = environment()["load"]
        for turn in range(options.rounds + 1):
            for name, runtime in runtimes.items():
                with StepTimes() as steps:
                    pairs = runtime.generate_pairs(
                        prompts, **steerings, max_new_tokens=options.new_tokens, do_sample=False
                    )
                tokens[name] = [list(row.token_ids) for pair in pairs for row in (pair.positive, pair.negative)]
                times[name] += steps.seconds if turn else []  # the first turn warms up
        same = {name: agreement(tokens["reference"], tokens[name]) for name in names}
        summary = {name: spread(values) for name, values in times.items()}
        figures.append({"prompts": n, "milliseconds": summary, "agreement": same, "load": before})
        print(n, {name: {k: round(v, 3) for k, v in s.items()} for name, s in summary.items()}, same)
    record = {
        "benchmark": "backends",
        "model": subjects.describe(options.model, model),
        "settings": {"new_tokens": options.new_tokens, "rounds": options.rounds, "native": ops.native.describe()},
        "environment": environment(),
        "figures": figures,
    }
    write(f"backends-{options.model}", record)


class StepTimes:
    """The seconds of every decode step inside the block."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __enter__(self) -> StepTimes:
        self._step = step = Batch.step

        def timed(running: Batch, inputs: StepInputs) -> None:
            begin = time.perf_counter()
            step(running, inputs)
            self.seconds.append(time.perf_counter() - begin)

        setattr(Batch, "step", timed)  # noqa: B010
        return self

    def __exit__(self, *exception: object) -> None:
        setattr(Batch, "step", self._step)  # noqa: B010


def spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds. On a machine that does other things, the fifth percentile is what the step takes."""
    low, median, high = np.percentile(np.array(seconds) * 1e3, [5, 50, 95])
    return {"p5": float(low), "median": float(median), "p95": float(high), "steps": len(seconds)}


def agreement(a: list[list[int]], b: list[list[int]]) -> float:
    """The share of tokens before the first that differs, over all rows."""
    agreed = sum(
        next((i for i, (x, y) in enumerate(zip(r, s, strict=True)) if x != y), len(r))
        for r, s in zip(a, b, strict=True)
    )
    return agreed / sum(map(len, a))


if __name__ == "__main__":
    main()
