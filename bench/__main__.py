"""`python -m bench`: everything that a CPU measures, then bench/RESULTS.md. `python -m bench NAME --help` for one
benchmark alone. What takes a GPU is one command of its own: `bash bench/gpu.sh OUT`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence

from bench import memory, overhead, pairs, results, sanitize, step, targets
from bench.environment import ROOT


def micro(arguments: Sequence[str] | None = None) -> None:
    """The ops one by one, through pytest-benchmark."""
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--benchmark-max-time=0.2", "-q"]
    subprocess.run([*command, "--benchmark-columns=median,iqr,rounds", *(arguments or [])], cwd=ROOT, check=True)


ONE: dict[str, Callable[[list[str]], None]] = {
    "pairs": pairs.main,
    "memory": memory.main,
    "micro": micro,
    "step": step.main,
    "overhead": overhead.main,
    "sanitize": sanitize.main,
    "targets": targets.main,
    "results": results.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="?", choices=["all", *ONE], default="all")
    options, rest = parser.parse_known_args(sys.argv[1:2])
    rest += sys.argv[2:]
    if options.name != "all":
        ONE[options.name](rest)
        return
    if rest:
        parser.error(f"{rest}: options belong to one benchmark, say which of {list(ONE)}")
    micro()
    for model in ("tiny", "random100m"):
        pairs.main(["--model", model])
        memory.main(["--model", model])
    results.main([])


if __name__ == "__main__":
    main()
