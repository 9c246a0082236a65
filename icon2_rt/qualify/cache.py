"""Where verdicts are kept: one small JSON file for each device, set of versions and sources, and model sizes.

``ICON2_CACHE`` names the folder; else it is ``$XDG_CACHE_HOME/icon2_rt``, else ``~/.cache/icon2_rt``. Anything that
could change what a kernel does is in a file's key, so a verdict never outlives what it is about.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from icon2_rt import ops
from icon2_rt.atomic import write_atomic
from icon2_rt.models import DecoderSpec
from icon2_rt.qualify.facts import DeviceFacts
from icon2_rt.qualify.verdict import Qualification
from icon2_rt.versions import versions

NEGATIVE_DAYS = 7
PACKAGES = ("icon2_rt", "torch", "triton", "flash_attn", "flash_attn_4")
# What of the environment reaches the compiler, the driver or the matrix products.
ENVIRONMENT = (
    "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_DEVICE_MAX_CONNECTIONS",
)  # fmt: skip
_UNIMPORTANT = ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR", "TRITON_OVERRIDE_DIR", "TRITON_LIBCUDA_PATH")
# What is tried where no model is named.
LLAMA_3_8B = DecoderSpec("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, None, 1e-5, 1.0, False)
SOURCES = ("ops", "engine", "models", "kernels", "trial")


@dataclass(frozen=True)
class Subject:
    """What a trial is made for: a decoder's sizes, its dtype ("bfloat16"), and the engine's page sizes and terms."""

    spec: DecoderSpec
    dtype: str
    page_size: int = 32
    split_pages: int = 4
    max_terms: int = 8

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Subject:
        return cls(**{**data, "spec": DecoderSpec(**data["spec"])})

    @property
    def sizes(self) -> dict[str, Any]:
        """What kernels are specialised on. The number of blocks, the longest context and what is tied are not."""
        others = ("n_layers", "max_position", "sliding_window", "tied_embeddings")
        spec = {k: v for k, v in asdict(self.spec).items() if k not in others}
        return {**self.to_dict(), "spec": spec}


def folder() -> Path:
    """Where verdicts are kept; the folder need not exist."""
    given = os.environ.get("ICON2_CACHE")
    if given:
        return Path(given).expanduser() / "qualification"
    base = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # no home at all
        return (Path(base) if base else Path.home() / ".cache") / "icon2_rt" / "qualification"
    return Path("/nonexistent/icon2_rt/qualification")


def place(facts: DeviceFacts) -> dict[str, Any]:
    """The part of a key that is not the model's: device, driver, versions, sources, environment."""
    env = {name: value for name, value in os.environ.items() if name in ENVIRONMENT or name.startswith("TRITON_")}
    device = {k: v for k, v in asdict(facts).items() if k not in ("index", "compute_mode", "mps", "uuid")}
    return {
        "device": json.loads(json.dumps(device)),
        "versions": versions(PACKAGES),
        "sources": _sources(),
        "native": None if ops.native.extension is None else f"{ops.native.extension.build} {_native_hash()}",
        "environment": {name: env[name] for name in sorted(env) if name not in _UNIMPORTANT},
    }


@cache
def _sources() -> str:
    """A hash of the Python code that a trial runs, and of the rules of its verdict."""
    package = Path(__file__).resolve().parent.parent
    import icon2_rt.kernels

    folders = {name: package / name for name in SOURCES}
    folders["kernels"] = Path(icon2_rt.kernels.__path__[0])
    digest = hashlib.sha256()
    files = [(name, path) for name, where in folders.items() for path in sorted(where.rglob("*.py"))]
    for name, path in [*files, ("qualify", package / "qualify" / "verdict.py")]:
        digest.update(f"{name}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _native_hash() -> str:
    path = Path(ops.native.extension.__file__)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """A verdict's place: ``path`` holds it once there is one."""

    path: Path
    key: Mapping[str, Any]

    @classmethod
    def of(cls, facts: DeviceFacts, subject: Subject, where: Path | None = None) -> Entry:
        key = {"place": place(facts), "subject": subject.sizes}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        return cls((where or folder()) / f"{name}.json", key)

    @property
    def marker(self) -> Path:
        """There while a trial runs: what it is at, on the disk before it is begun."""
        return self.path.with_suffix(".trying")

    def load(self, now: float | None = None) -> Qualification | None:
        """The verdict that holds, None where there is none, or it is damaged, of another key, or has expired."""
        return _read(self.path, self.key, time.time() if now is None else now)

    def store(self, verdict: Qualification) -> tuple[Qualification, str | None]:
        """Keep ``verdict``; returns it with its place, and None or why it could not be kept."""
        data = json.dumps({"key": self.key, "verdict": verdict.to_dict()}, indent=1)
        try:
            write_atomic(self.path, data.encode())
        except OSError as error:
            why = (
                f"the verdict could not be stored ({error.strerror}), so the next start tries again: set ICON2_CACHE "
                f"to a folder that can be written"
            )
            return verdict, why
        return replace(verdict, stored=str(self.path)), None

    @contextmanager
    def locked(self, seconds: float) -> Iterator[bool]:
        """Hold the entry alone, after waiting at most ``seconds``; False where another process has it still. Where no
        lock can be made (a folder that cannot be written) there is none, and True is given."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            yield True
            return
        try:
            yield _acquire(handle, time.monotonic() + seconds)
        finally:
            os.close(handle)  # which lets the lock go


def _acquire(handle: int, until: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EINTR):
                return True  # a file system without locks
        else:
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)


def proven_here(facts: DeviceFacts, dtype: str, where: Path | None = None) -> Qualification | None:
    """The newest verdict of this device, whatever the model's sizes, that proves kernels for ``dtype``."""
    there = place(facts)
    found = []
    with suppress(OSError):
        for path in sorted((where or folder()).glob("*.json")):
            verdict = _read(path, None, time.time(), there, dtype)
            if verdict is not None and verdict.status == "proven":
                found.append(verdict)
    return max(found, key=lambda verdict: verdict.when, default=None)


def _read(
    path: Path,
    key: Mapping[str, Any] | None,
    now: float,
    there: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Qualification | None:
    try:
        data = json.loads(path.read_bytes())
        stored, verdict = data["key"], Qualification.from_dict(data["verdict"])
        same = stored == key if key is not None else (stored["place"], stored["subject"]["dtype"]) == (there, dtype)
        age = now - float(verdict.when)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not same or (verdict.status != "proven" and not 0 <= age <= NEGATIVE_DAYS * 86400):
        return None
    return replace(verdict, stored=str(path), cached=True)
