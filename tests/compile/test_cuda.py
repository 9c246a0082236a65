"""The .cu files for every architecture that nvcc knows of ours, held to the budgets written beside the kernels. Shared
memory is the launch's own; the emulator refuses a block with more than any GPU has."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import setuptools
import triton

from icon2_rt.kernels.budget import Budget

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc", path=str(Path(os.environ["CUDA_HOME"]) / "bin") if "CUDA_HOME" in os.environ else None)
pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")

ROOT = CSRC.parent
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# As written in the files: registers per thread, and what is on the stack, where spilled registers would be too.
BUDGETS = {
    "sample": {"scan_kernel": Budget(64, 0, 0), "choose_kernel": Budget(128, 0, 0, stack=16)},
    "skinny_linear": {"linear_kernel": Budget(96, 0, 0)},
}


@cache
def known() -> list[str]:
    assert NVCC is not None
    said = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ARCHITECTURES if f"compute_{arch.rstrip('a')}" in said]


@pytest.mark.parametrize("name", BUDGETS)
def test_within_budget(name: str, tmp_path: Path) -> None:
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known()]
    command = [str(NVCC), "-std=c++17", "-O3", "-fmad=false", f"-I{CSRC}", *code, "-Xptxas=-v", "-c"]
    run = subprocess.run(
        [*command, str(CSRC / "cuda" / f"{name}.cu"), "-o", str(tmp_path / "o")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        run.stderr,
        re.DOTALL,
    )
    seen = set()
    for symbol, arch, stack, stores, loads, registers in found:
        kernel = next(k for k in BUDGETS[name] if k in symbol)
        seen.add((kernel, arch))
        budget = BUDGETS[name][kernel]
        used = {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads)}
        assert used["registers"] <= budget.registers, (symbol, arch, used)
        assert used["stack"] <= budget.stack and used["spills"] == 0, (symbol, arch, used)
    assert seen == {(kernel, f"sm_{arch}") for kernel in BUDGETS[name] for arch in known()}


def test_what_a_launch_waits_for_is_in_the_code(tmp_path: Path) -> None:
    """Weights in 16-byte asynchronous copies, products on tensor cores, and dependent launch where there is one."""
    for arch, early in (("80", False), ("90a", True)):
        target = tmp_path / f"{arch}.ptx"
        command = [str(NVCC), "-std=c++17", "-O3", f"-I{CSRC}", f"-arch=sm_{arch}", "-ptx"]
        subprocess.run([*command, str(CSRC / "cuda/skinny_linear.cu"), "-o", str(target)], check=True)
        code = target.read_text()
        assert "mma.sync.aligned.m16n8k16" in code
        assert "cp.async.cg.shared.global" in code
        assert ("griddepcontrol.wait" in code) is early


def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py's class that runs nvcc."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py"))["Nvcc"](str(NVCC))


def test_devices_without_machine_code_of_their_own_find_ptx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_120, and what comes after: the driver compiles the PTX of the oldest."""
    nvcc = build(monkeypatch)
    code, names = nvcc.targets()
    oldest = nvcc.architectures[0]
    assert names.endswith(f", PTX of compute_{oldest}")
    target = tmp_path / "o"
    small = tmp_path / "small.cu"
    small.write_text("__global__ void kernel(float* x) { x[0] = 1.0f; }\n")
    subprocess.run([str(NVCC), *code, "-c", str(small), "-o", str(target)], check=True)

    def lists(what: str) -> list[str]:
        command = [triton.knobs.nvidia.cuobjdump.path, f"--list-{what}", str(target)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return re.findall(r"sm_(\w+)\.", said)

    assert lists("elf") == nvcc.architectures
    assert lists("ptx") == [oldest]


@pytest.mark.parametrize("name", BUDGETS)
def test_a_launch_leaves_the_current_device_alone(name: str, tmp_path: Path) -> None:
    """The CUDA runtime in the extension is not torch's: it asks the driver which device is current, and sets none. And
    what may begin early is decided by the code there is, not by the device: PTX of sm_80 on a newer one cannot wait."""
    target = tmp_path / "o"
    command = [str(NVCC), "-std=c++17", f"-I{CSRC}", "-arch=sm_80", "-c", str(CSRC / "cuda" / f"{name}.cu")]
    subprocess.run([*command, "-o", str(target)], check=True)
    names = set(re.findall(rb"cu[A-Z]\w+|cuda[A-Z]\w+", target.read_bytes()))
    assert {b"cuCtxGetDevice", b"cudaFuncGetAttributes"} <= names
    assert not {b"cudaSetDevice", b"cudaGetDevice", b"cudaDeviceGetAttribute"} & names
