"""Whether Triton can launch a kernel on this machine, asked before anything depends on it.

Triton compiles a C helper at its first use (and before 3.7 a C launcher for every kernel signature). That takes a C
compiler, ``Python.h`` and the driver's ``libcuda.so.1``, which it looks for with ``/sbin/ldconfig``. Images made to run
programs often lack one of them, and the failure then comes at the first launch. Building the helper is the only full
test; it creates no CUDA context.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

LDCONFIG = "/sbin/ldconfig"


def build_helper() -> bool:
    """Build (or load from Triton's cache) the helper; whether this Triton also compiles a launcher for every kernel.

    Raises:
        Exception: whatever stops Triton.
    """
    import triton
    from triton.backends.nvidia import driver

    _ = triton.runtime.driver.active.utils
    return hasattr(driver, "make_launcher")


@cache
def why_not() -> str | None:
    """None where kernels can be launched, else what is missing and how to get it; looked at once a process."""
    return reason(build_helper)


def reason(build: Callable[[], bool]) -> str | None:
    """:func:`why_not` for a given way to build the helper."""
    error: Exception | None = None
    try:
        if not build():
            return None  # nothing else is compiled: what is in Triton's cache is enough
    except Exception as failure:  # Triton raises RuntimeError, AssertionError, CalledProcessError, FileNotFoundError …
        error = failure
    missing = _compiler() or _header()
    if error is not None:
        missing = missing or _libcuda()
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return missing or f"Triton cannot build its launch helper: {said}"
    return missing


def _compiler() -> str | None:
    given = os.environ.get("CC")
    if given is not None:
        if shutil.which(given.split()[0] if given.split() else given) is None:
            return f"Triton needs a C compiler, and CC={given!r} is not a program here: correct or unset CC"
        return None
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton needs a C compiler: install gcc or clang (Debian, Ubuntu: apt-get install gcc), or set CC"
    return None


def _header() -> str | None:
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if (Path(folder) / "Python.h").is_file():
        return None
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"Triton compiles C against Python.h, which is not in {folder}: install this Python's headers (Debian, Ubuntu: "
        f"apt-get install {python}-dev; Fedora: dnf install python3-devel)"
    )


def _libcuda() -> str | None:
    """What keeps Triton from finding the driver's library, in the order in which it looks."""
    given = os.environ.get("TRITON_LIBCUDA_PATH")
    if given:
        if not (Path(given) / "libcuda.so.1").exists():
            return f"TRITON_LIBCUDA_PATH={given!r} holds no libcuda.so.1: correct or unset it"
        return None
    try:
        listed = subprocess.run([LDCONFIG, "-p"], capture_output=True, check=True).stdout.decode(errors="ignore")
    except (OSError, subprocess.CalledProcessError) as error:
        return (
            f"Triton finds the driver's libcuda.so.1 with {LDCONFIG}, which does not run here ({error}): install "
            f"libc-bin, or set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1"
        )
    folders = [Path(line.split()[-1]).parent for line in listed.splitlines() if "libcuda.so.1" in line]
    folders = folders or [Path(f) for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    if not any((folder / "libcuda.so.1").exists() for folder in folders):
        return (
            "the driver's libcuda.so.1 is not found: run ldconfig as root if the driver is installed (in a container, "
            "start it with --gpus), or set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1"
        )
    return None
