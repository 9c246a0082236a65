"""A memory checker over a short run: compute-sanitizer's memcheck and racecheck on our own kernels.

First a write outside of a buffer that was planted on purpose: a checker that does not see it proves nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from triton.runtime.jit import JITFunction

from bench import ROOT, short_run
from icon2_rt import kernels

FOUND = 9  # exit code of a checker that found something
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
CUDA_KERNELS = ("scan_kernel", "choose_kernel", "linear_kernel")  # of csrc/cuda
RUN = (sys.executable, "-m", "bench.short_run")


@dataclass(frozen=True)
class Check:
    """``tool`` over the short run with ``arguments``; the exit code that is right."""

    name: str
    tool: str | None
    arguments: tuple[str, ...]
    expected: int = 0
    environment: tuple[tuple[str, str], ...] = ()


# Without torch's caching every tensor is an allocation of its own, so that a read beyond its end is seen; a graph
# cannot be captured that way.
_NO_CACHE = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
CHECKS = (
    Check("short run, so that everything is compiled", None, ()),
    Check("ungraphed, so that everything is compiled", None, ("--ungraphed",), environment=_NO_CACHE),
    Check("memcheck sees a planted error", "memcheck", ("--planted",), FOUND, _NO_CACHE),
    Check("memcheck, ungraphed, every tensor by itself", "memcheck", ("--ungraphed",), 0, _NO_CACHE),
    Check("racecheck, ungraphed", "racecheck", ("--ungraphed",)),
    Check("memcheck, under graphs", "memcheck", ()),
    Check("racecheck, under graphs", "racecheck", ()),
    Check(
        "memcheck, CUDA C++, ungraphed, every tensor by itself", "memcheck", ("--native", "--ungraphed"), 0, _NO_CACHE
    ),
    Check("racecheck, CUDA C++, under graphs", "racecheck", ("--native",)),
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=400, help="seconds for all checks together")
    parser.add_argument("--dry", action="store_true", help="the short run alone, with the reference ops on the CPU")
    options = parser.parse_args(argv)
    if options.dry:
        short_run.dry()
        print(f"kernels that a checker would look at: {', '.join(kernel_names())}")
        return
    checker = shutil.which("compute-sanitizer") or next((p for p in PLACES if Path(p).exists()), None)
    if checker is None:
        sys.exit("compute-sanitizer is not on the PATH nor where CUDA puts it")
    deadline = time.monotonic() + options.limit
    failed = []
    for check in CHECKS:
        begin = time.monotonic()
        status = run(check, checker, deadline - begin)
        good = status == check.expected
        verdict = "as it should be" if good else f"NOT as it should be ({check.expected})"
        print(f"{check.name}: exit code {status}, {verdict}, {time.monotonic() - begin:.0f} s", flush=True)
        if not good:
            failed.append(check.name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run(check: Check, checker: str, seconds: float) -> int | str:
    """The exit code, or why there is none."""
    if seconds <= 0:
        return "not reached: out of time"
    command = [*RUN, *check.arguments]
    if check.tool is not None:
        watched = [
            part
            for name in (*kernel_names(), *CUDA_KERNELS, "planted_error")
            for part in ("--kernel-name", f"kns={name}")
        ]
        options = ["--target-processes", "application-only", "--error-exitcode", str(FOUND), "--print-limit", "20"]
        command = [checker, "--tool", check.tool, *options, *watched, *command]
    environment = os.environ | dict(check.environment)
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return "stopped: out of time"


def kernel_names() -> list[str]:
    """Our own kernels: cuBLAS and torch are left alone, which would take most of the time."""
    names = set()
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction) and value.__module__ == module.name:
                names.add(value.__name__)
    return sorted(names)


if __name__ == "__main__":
    main()
