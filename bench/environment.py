"""Where and when a figure was measured: without this a figure means nothing."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import RESULTS, ROOT
from icon2_rt import qualify
from icon2_rt.versions import versions

PACKAGES = ("icon2_rt", "torch", "triton", "transformers", "numpy", "safetensors")


def environment(where: torch.device | None = None) -> dict[str, Any]:
    """Device, versions, commit and load, now. ``where``: what is measured, if not the CPU."""
    commit, changed = _commit()
    return {
        "device": device(),
        "gpu": _gpu(where) if where is not None and where.type == "cuda" else None,
        "architecture": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": commit,
        "changed_files": changed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": load(),
    }


def load() -> list[float]:
    """Runnable processes, averaged over the last 1, 5 and 15 minutes; this one counts too."""
    return [round(x, 2) for x in os.getloadavg()]


def device() -> str:
    """The CPU's name as the system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(gpu: dict[str, Any] | None) -> str:
    """What was measured, as a part of a file name: the GPU, or the CPU and its threads."""
    words = re.sub(r"[^a-z0-9]+", "-", (gpu["name"] if gpu else device()).lower()).strip("-")
    return words if gpu else f"{words}-{torch.get_num_threads()}t"


def write(name: str, record: dict[str, Any], out: Path | None = None) -> Path:
    """Store ``record`` under ``bench/results/``, one file per benchmark and device: a newer run replaces it.

    Args:
        out: a folder to take instead, or a file (``*.json``).
    """
    path = out if out is not None and out.suffix == ".json" else None
    path = path or (out or RESULTS) / f"{name}-{slug(record['environment']['gpu'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")  # a run that is cut off in the middle of writing leaves the file before it
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(path)
    print(f"wrote {path}", file=sys.stderr)
    return path


def _gpu(where: torch.device) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(where)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "name": found.name,
        "capability": f"sm_{found.major}{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": round(found.L2_cache_size / 2**20),
        "cuda": torch.version.cuda,
        "driver": driver,
        "qualification": _qualification(where),
    }


def _qualification(where: torch.device) -> dict[str, Any] | str:
    """What the device has proven, by dtype, as ``backend="auto"`` would find it now."""
    found = {name: qualify.stored(where, getattr(torch, name)) for name in ("bfloat16", "float16", "float32")}
    return {name: verdict.brief() for name, verdict in found.items() if verdict is not None} or "no verdict is stored"


def _commit() -> tuple[str | None, list[str]]:
    """The commit, and the tracked files that differ from it (stored results do not count)."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!bench/RESULTS.md"
        )
    except (OSError, subprocess.CalledProcessError):
        return None, []
    return commit, [line[3:] for line in changed.splitlines()]


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout
