"""Programs and libraries of csrc/, built for a test by the C++ compiler that is here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def build(target: Path, sources: Sequence[str | Path], *flags: str) -> Path:
    """``sources`` (of csrc/, or absolute; .cu files too, as C++) as a program, or as a library where ``target`` ends in
    .so. One compiler for each file, at once: together they take half a minute. A sanitizer for which the compiler has
    no runtime skips the test."""
    assert COMPILER is not None
    common = [COMPILER, "-std=c++17", "-w", "-fPIC", "-ffp-contract=off", f"-I{CSRC}", *flags]
    objects = [target.with_name(f"{target.name}-{i}.o") for i in range(len(sources))]
    running = [
        subprocess.Popen(
            [*common, "-c", "-x", "c++", str(CSRC / source), "-o", str(made)], stderr=subprocess.PIPE, text=True
        )
        for source, made in zip(sources, objects, strict=True)
    ]
    errors = [process.communicate()[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors)
    shared = ["-shared"] if target.suffix == ".so" else []
    linked = subprocess.run(
        [*common, *shared, *map(str, objects), "-pthread", "-o", str(target)], capture_output=True, text=True
    )
    if linked.returncode and "cannot find" in linked.stderr and any("-fsanitize" in flag for flag in flags):
        pytest.skip(f"this compiler has no runtime for {[flag for flag in flags if '-fsanitize' in flag]}")
    assert linked.returncode == 0, linked.stderr
    return target
