"""The C++ of csrc/ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, as a program of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = ("test/check.cpp", "cpu/begin_step.cpp", "cpu/isa_portable.cpp", "cpu/isa_avx2.cpp", "cpu/isa_avx512.cpp")
CPU = Path("/proc/cpuinfo")
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels_are_clean(sanitizers: str, tmp_path: Path) -> None:
    program = tmp_path / "check"
    flags = (
        "-std=c++17",
        "-O1",
        "-g1",
        "-w",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
        "-ffp-contract=off",
    )
    # One compiler for each file, at once: together they take half a minute.
    sources = [CSRC / source for source in SOURCES]
    if not (CPU.is_file() and "avx512f" in CPU.read_text()):  # what this CPU cannot run is not worth the time
        sources[-1] = tmp_path / "no_avx512.cpp"
        sources[-1].write_text("namespace icon2 { struct Kernels; const Kernels* avx512() { return nullptr; } }")
    running = [
        subprocess.Popen(
            (
                str(COMPILER),
                *flags,
                f"-I{CSRC}",
                "-c",
                str(CSRC / source),
                "-o",
                str(tmp_path / f"{i}.o"),
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, source in enumerate(sources)
    ]
    errors = [process.communicate()[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(errors)
    objects = [str(tmp_path / f"{i}.o") for i in range(len(SOURCES))]
    linked = subprocess.run(
        (str(COMPILER), f"-fsanitize={sanitizers}", *objects, "-pthread", "-o", str(program)),
        capture_output=True,
        text=True,
    )
    if linked.returncode and "cannot find" in linked.stderr:
        pytest.skip(f"this compiler has no runtime for -fsanitize={sanitizers}")
    assert linked.returncode == 0, linked.stderr
    # A sanitizer maps its shadow at a fixed place, which address randomisation may have taken.
    command = ([setarch, "-R"] if (setarch := shutil.which("setarch")) else []) + [str(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[0] == "portable"
