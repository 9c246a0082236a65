"""`python -m bench`: everything that a CPU measures, then bench/RESULTS.md. `python -m bench NAME --help` for one
benchmark alone. What takes a GPU is one command of its own: `bash bench/gpu.sh OUT`."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence

from bench import ROOT


def micro(arguments: Sequence[str]) -> None:
    """The ops one by one, through pytest-benchmark."""
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--benchmark-max-time=0.2", "-q"]
    subprocess.run([*command, "--benchmark-columns=median,iqr,rounds", *arguments], cwd=ROOT, check=True)


ONE = (
    "backends", "pairs", "memory", "micro", "crossover", "host", "qualify", "step", "overhead", "sanitize", "targets",
    "proof", "training", "seconds", "results",
)  # fmt: skip


def run(name: str, arguments: Sequence[str] = ()) -> None:
    """One benchmark. It is imported when it runs: what reads results needs neither torch nor transformers."""
    if name == "micro":
        micro(arguments)
    else:
        importlib.import_module(f"bench.{name}").main(list(arguments))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="?", choices=["all", *ONE], default="all")
    options, rest = parser.parse_known_args(sys.argv[1:2])
    rest += sys.argv[2:]
    if options.name != "all":
        run(options.name, rest)
        return
    if rest:
        parser.error(f"{rest}: options belong to one benchmark, say which of {list(ONE)}")
    run("micro")
    for model in ("tiny", "random100m"):
        run("backends", ["--model", model])
        run("pairs", ["--model", model])
        run("memory", ["--model", model])
    run("crossover")
    run("host")
    run("results")


if __name__ == "__main__":
    main()
