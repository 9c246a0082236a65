"""The C++ of csrc/ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: the kernels as a program of
their own, the whole extension in a Python whose threads use it at the same time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
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


THREADS = """
import importlib.util, sys, threading
import torch
spec = importlib.util.spec_from_file_location("icon2_rt._native", sys.argv[1])
sys.modules["icon2_rt._native"] = extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
from icon2_rt.ops import native
assert native.extension is extension, native.why_not

def work(rows, wrong):
    x, weight = torch.randn(rows, 256), torch.randn(300, 256)
    right = native.silu_mul(native.linear(x, weight))
    for _ in range(20):
        made = []
        repeat = native.capture(lambda: made.append(native.silu_mul(native.linear(x, weight))))
        made[0].fill_(torch.nan)
        repeat()
        if len(repeat.__self__) != 2 or not torch.equal(made[0], right):
            wrong.append(rows)

wrong = []
threads = [threading.Thread(target=work, args=(4 + k, wrong)) for k in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong
print("done")
"""


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="no C++ compiler here")
def test_threads_that_capture_steps_share_nothing(tmp_path: Path) -> None:
    """One OpenMP thread: the barriers of its runtime are unknown to the sanitizer."""
    pybind11 = pytest.importorskip("pybind11")
    runtime = subprocess.run(
        [str(COMPILER), "-print-file-name=libtsan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("this compiler has no shared ThreadSanitizer runtime")
    none = tmp_path / "portable_alone.cpp"
    none.write_text(
        "namespace icon2 { struct Kernels; const Kernels* avx2() { return nullptr; } "
        "const Kernels* avx512() { return nullptr; } }"
    )
    sources = ("bind.cpp", "cpu/begin_step.cpp", "cpu/isa_portable.cpp", "cpu/parallel.cpp", none)
    flags = ("-O1", "-g1", "-fsanitize=thread", "-fvisibility=hidden")
    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    extension = build(tmp_path / "_native.so", sources, *flags, *includes)
    command = ([setarch, "-R"] if (setarch := shutil.which("setarch")) else []) + [sys.executable, "-c", THREADS]
    environment = {"OMP_NUM_THREADS": "1", "LD_PRELOAD": runtime, "TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}
    done = subprocess.run([*command, str(extension)], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0 and done.stdout == "done\n", done.stdout + done.stderr
