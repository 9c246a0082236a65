"""What is installed, what can run here, what would be used and why: the first thing to look at when something is slow.

Returns data; the command line prints it.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from icon2_rt import ops
from icon2_rt.ops import prefill
from icon2_rt.versions import installed

State = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what that means or how to change it."""

    section: str
    name: str
    value: str
    state: State = "ok"
    advice: str = ""


# What the package asks for; the ranges that are tested.
_NEEDED = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.17", "5.24"),
    "safetensors": ("0.8", "1"),
    "numpy": ("2", "3"),
    "triton": ("3.6", "3.8"),
}
_OPTIONAL = {
    "gguf": "reads and writes llama.cpp control vectors",
    "pyarrow": "writes datasets",
    "datasets": "loads datasets: pip install 'icon2_rt[train]'",
    "trl": "trains with DPO: pip install 'icon2_rt[train]'",
    "matplotlib": "plots: pip install 'icon2_rt[plot]'",
}

# Written, and tested where the interpreter or a compiler can, but never run on the hardware that it is for.
NEVER_RUN_ON_HARDWARE = {
    "cuda": "no run of this version on a CUDA device is recorded; the CPU is what is tested",
    "native (CUDA)": "linear and sample in CUDA C++: right on an emulator, and compiled for sm_80, sm_90a and sm_100",
    "triton": "kernels and graphs: right under Triton's interpreter, and compiled for sm_80, sm_90 and sm_100",
    **{path.name: "prefill attention; how it is called is tested" for path in prefill.PATHS if not path.measured_on},
}


def examine() -> list[Finding]:
    """Everything, in the order in which it is worth reading."""
    return [*_versions(), *_devices(), *_backends(), *_model(), *_choice()]


def _versions() -> list[Finding]:
    found = [
        Finding("versions", "python", platform.python_version(), advice=sys.executable),
        Finding("versions", "icon2_rt", installed("icon2_rt") or "not installed, imported from a folder"),
    ]
    for name, (low, high) in _NEEDED.items():
        version = installed(name)
        if version is None:
            state: State = "note" if name == "triton" and sys.platform != "linux" else "missing"
            found.append(Finding("versions", name, "not installed", state, f"needs {low} to below {high}"))
        elif not _number(low) <= _number(version) < _number(high):
            found.append(Finding("versions", name, version, "note", f"tested with {low} to below {high}"))
        else:
            found.append(Finding("versions", name, version))
    found.append(_extension())
    for name, use in _OPTIONAL.items():
        version = installed(name)
        what = use if version is None else use.split(":")[0]
        found.append(Finding("versions", name, version or "not installed", "ok" if version else "note", what))
    return found


def _extension() -> Finding:
    """Which of the three builds this is: pure Python, with C++ for CPUs, or with CUDA C++ too."""
    if ops.native.extension is None:
        return Finding("versions", "extension", "none: pure Python", "note", str(ops.native.why_not))
    build = str(ops.native.extension.build)
    why = "C++ for CPUs and CUDA C++" if build != "cpu" else "C++ for CPUs; no nvcc was found when it was built"
    return Finding("versions", "extension", build, advice=why)


def _devices() -> list[Finding]:
    cpu = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    found = [Finding("devices", "cpu", cpu, advice=f"torch uses {torch.get_num_threads()} thread(s)")]
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        found.append(Finding("devices", "cuda", "none", "note", why))
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(Finding("devices", f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB"))
    return found


def _backends() -> list[Finding]:
    found = []
    for name, why_not in ops.available(_device()).items():
        value, state = ("available", "ok") if why_not is None else ("not available", "note")
        found.append(Finding("backends", name, value, state, why_not or _BACKENDS[name]))  # type: ignore[arg-type]
    return [*found, *(Finding("never run on", name, "", "note", why) for name, why in NEVER_RUN_ON_HARDWARE.items())]


_BACKENDS = {
    "reference": "plain PyTorch: the definition of every operation, runs everywhere",
    "triton": "Triton kernels and CUDA graphs, for CUDA devices",
    "native": f"C++, compiled at installation: {ops.native.describe()}",
}


def _model() -> list[Finding]:
    from icon2_rt import tiny

    path = tiny.path()
    there = (path / "config.json").is_file()
    size = sum(file.stat().st_size for file in Path(path).glob("*")) if there else 0
    value = f"{size / 2**20:.1f} MiB" if there else "not there"
    advice = "the chat model that ships with the package"
    return [Finding("model", "tiny", value, "ok" if there else "missing", advice)]


def _choice() -> list[Finding]:
    device = _device()
    why = "a CUDA device is there" if device.type == "cuda" else "there is no CUDA device"
    backend = ops.select("auto", device).backend
    others = [name for name, reason in ops.available(device).items() if reason is None and name != backend]
    because = "the only one here"
    if backend == "native":
        because = "stored results show it right and faster than the reference on a CPU"
    elif others:
        because = f"no stored result shows {' or '.join(others)} right and faster here"
    return [
        Finding("would be used", "device", str(device), advice=why),
        Finding("would be used", "backend", backend, advice=because),
    ]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _number(version: str) -> tuple[int, ...]:
    """2.13.0+cpu → (2, 13, 0)."""
    digits = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        digits.append(int(part))
    return tuple(digits)
