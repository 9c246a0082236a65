"""The C++ of csrc/ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, as a program of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.compiler import COMPILER, build

SOURCES = ("test/check.cpp", "cpu/begin_step.cpp", "cpu/isa_portable.cpp", "cpu/isa_avx2.cpp", "cpu/isa_avx512.cpp")
CPU = Path("/proc/cpuinfo")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels_are_clean(sanitizers: str, tmp_path: Path) -> None:
    sources: list[str | Path] = list(SOURCES)
    if not (CPU.is_file() and "avx512f" in CPU.read_text()):  # what this CPU cannot run is not worth the time
        sources[-1] = tmp_path / "no_avx512.cpp"
        sources[-1].write_text("namespace icon2 { struct Kernels; const Kernels* avx512() { return nullptr; } }")
    flags = ("-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    program = build(tmp_path / "check", sources, *flags)
    # A sanitizer maps its shadow at a fixed place, which address randomisation may have taken.
    command = ([setarch, "-R"] if (setarch := shutil.which("setarch")) else []) + [str(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[0] == "portable"
