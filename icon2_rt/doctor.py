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

from icon2_rt import ops, qualify
from icon2_rt.engine import EngineOptions
from icon2_rt.ops import prefill
from icon2_rt.qualify import facts
from icon2_rt.versions import installed

State = Literal["ok", "missing", "note"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    "native (CUDA)": "linear and sample in CUDA C++: right on an emulator; compiled for sm_80, sm_90a, sm_100 and PTX",
    "triton": "kernels and graphs: right under Triton's interpreter, and compiled from sm_80 to sm_120",
    **{path.name: "prefill attention; how it is called is tested" for path in prefill.PATHS if not path.measured_on},
}


def examine() -> list[Finding]:
    """Everything, in the order in which it is worth reading."""
    return [*_versions(), *_devices(), *_backends(), *_proven(), *_model(), *_choice()]


def qualified(
    model: str | None, *, device: str = "auto", dtype: str = "auto", again: bool = False
) -> qualify.Qualification:
    """What a CUDA device proves for a model's sizes: a stored verdict, or a trial now.

    Args:
        model: a path, a hub id or "tiny"; None: the sizes of Llama-3-8B. dtype: "auto" is the checkpoint's own.

    Raises:
        ValueError: there is no CUDA device, an unknown dtype, an unsupported architecture. OSError: no such model.
    """
    where = _device() if device == "auto" else torch.device(device)
    if where.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"--qualify: there is no CUDA device to try the kernels on ({_why_no_cuda()})")
    subject = _subject(model, dtype)
    return qualify.qualify(subject, facts.read(where), asked=True, again=again)


def _subject(model: str | None, dtype: str) -> qualify.Subject:
    """What is tried for ``model``, with the engine's usual page sizes."""
    names = ("float32", "bfloat16", "float16")
    if dtype not in ("auto", *names):
        raise ValueError(f"--dtype: must be one of auto, {', '.join(names)}, not {dtype!r}")
    usual = EngineOptions()
    pages = (usual.page_size, usual.split_pages, usual.max_terms)
    if model is None:
        return qualify.Subject(qualify.LLAMA_3_8B, "bfloat16" if dtype == "auto" else dtype, *pages)
    from transformers import AutoConfig

    from icon2_rt import models, tiny

    config = AutoConfig.from_pretrained(tiny.path() if model == "tiny" else model)
    family = models.find_family((config.architectures or [type(config).__name__])[0])
    own = str(config.dtype or torch.bfloat16).removeprefix("torch.")
    return qualify.Subject(models.spec_of_config(config, family), own if dtype == "auto" else dtype, *pages)


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
        found.append(Finding("devices", "cuda", "none", "note", _why_no_cuda()))
        return found
    for i in range(torch.cuda.device_count()):
        here = facts.read(torch.device("cuda", i))
        major, minor = here.capability
        value = f"{here.name}, sm_{major}{minor}, {here.memory >> 30} GiB, driver {here.driver}"
        obstacle = here.obstacle()
        found.append(Finding("devices", f"cuda:{i}", value, "note" if obstacle else "ok", obstacle or _flash(major)))
    return found


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    here = facts.by_driver(0)
    return (here and here.obstacle()) or "torch finds no CUDA device"


def _flash(major: int) -> str:
    """Which flash-attn fits the card, and whether it is there."""
    fitting = [p for p in prefill.PATHS if p.name.startswith("flash-attn") and p.takes(major, 128)]
    if not fitting:
        return "no flash-attn has kernels for it: prefill takes torch's own"
    missing = fitting[0].why_not()
    extra = "flash" if fitting[0].name == "flash-attn 4" else "flash2"
    return f"{fitting[0].name} is there" if missing is None else f"faster prefill: pip install 'icon2_rt[{extra}]'"


def _backends() -> list[Finding]:
    found: list[Finding] = []
    for name, why_not in ops.available(_device()).items():
        value, state = ("available", "ok") if why_not is None else ("not available", "note")
        found.append(Finding("backends", name, value, state, why_not or _BACKENDS[name]))  # type: ignore[arg-type]
    return [*found, *(Finding("never run on", name, "", "note", why) for name, why in NEVER_RUN_ON_HARDWARE.items())]


_BACKENDS = {
    "reference": "plain PyTorch: the definition of every operation, runs everywhere",
    "triton": "Triton kernels and CUDA graphs, for CUDA devices that prove them",
    "native": f"C++, compiled at installation: {ops.native.describe()}",
}


def _proven() -> list[Finding]:
    """What each CUDA device has proven, by dtype."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", i)
        verdicts = {str(dtype)[6:]: qualify.stored(device, dtype) for dtype in DTYPES}
        for dtype, verdict in verdicts.items():
            if verdict is not None:
                found.append(Finding("proven", f"cuda:{i} {dtype}", str(verdict), advice=verdict.stored or ""))
        if not any(verdicts.values()):
            advice = "the first model that is loaded tries the kernels, or icon2 doctor --qualify"
            found.append(Finding("proven", f"cuda:{i}", "nothing yet", "note", advice))
    return found


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
    backend: str = ops.select("auto", device).backend
    others = [name for name, reason in ops.available(device).items() if reason is None and name != backend]
    because = "the only one here"
    if device.type == "cuda":
        verdict = next((v for dtype in DTYPES if (v := qualify.stored(device, dtype)) is not None), None)
        backend = "what the first model proves" if verdict is None else verdict.backend
        because = "nothing is stored yet: icon2 doctor --qualify" if verdict is None else str(verdict)
    elif backend == "native":
        because = "stored results show it right and faster than the reference on a CPU"
    elif others:
        because = f"no stored result shows {' or '.join(others)} right and faster on a CPU"
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
