"""The run folder: a list of artifacts, each finished or not, so that the same command continues after any kill.

An *artifact* is the result of one piece of work (the directions, one shard of instructions, one shard of pairs): one or
more files and a record in ``steps/`` that is written last. The record holds the files' checksums and the digests of
the artifacts that it was made from. An artifact counts as finished only if its record is there, every file matches its
checksum, and the inputs are still the same; otherwise it is made again and replaced. Nothing in a folder holds a time
but ``log.jsonl`` and the costs on the page ``report.html``, so that an interrupted run ends with the same bytes as an
uninterrupted one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icon2_rt.atomic import remove_partial, write_atomic
from icon2_rt.pipeline.files import sha256, to_json

# The fact that says which code ran: it decides no byte.
RAN = "ran"


@dataclass(frozen=True)
class Artifact:
    """A finished piece of work: ``files`` maps a path in the folder to its sha256; ``facts`` are counts and figures."""

    name: str
    files: Mapping[str, str]
    inputs: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Any]:
        """The facts without the one that only says which code ran."""
        return {key: value for key, value in self.facts.items() if key != RAN}

    @property
    def digest(self) -> str:
        """Changes whenever any byte of its files or figures does."""
        return sha256(to_json([dict(self.files), self.figures]))


class RunFolder:
    """One run's folder, held exclusively while open.

    Raises:
        ValueError: the path is no folder, another process works in it, or it holds something that is not a run.
        OSError: it cannot be created or written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: {self.path} is a file; a run needs a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._file("manifest.json").exists():
            foreign = sorted(p.name for p in self.path.iterdir() if p.name not in _OWN and not p.name.startswith("."))
            if foreign:
                raise ValueError(
                    f"out: {self.path} holds other things ({', '.join(foreign[:3])}) and no run; name a new folder"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._file(".lock"), "a+")  # noqa: SIM115  # held for as long as the folder is open
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process dies
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise ValueError(
                f"out: another run (process {holder}) is at work in {self.path}; wait for it or name another folder"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        remove_partial(self.path)

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, name: str) -> Path:
        return self.path / name

    def _record_path(self, name: str) -> Path:
        return self._file(f"steps/{name}.json")

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of the run that was started here, or None in a new folder."""
        path = self._file("manifest.json")
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); name another folder, or delete this one") from None
        if not isinstance(manifest, dict) or "identity" not in manifest:
            raise ValueError(f"{path} is not the manifest of a run; name another folder")
        return manifest

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        self._replace("manifest.json", to_json(manifest))

    def _replace(self, name: str, data: bytes) -> None:
        """Write only what differs: a finished run that is started again touches nothing."""
        path = self._file(name)
        if not path.exists() or path.read_bytes() != data:
            write_atomic(path, data)

    def finished(self, name: str, inputs: Sequence[Artifact] = ()) -> Artifact | None:
        """The artifact ``name`` if it is complete, undamaged and made from these inputs; else None."""
        try:
            record = json.loads(self._record_path(name).read_bytes())
            artifact = Artifact(name, record["files"], record["inputs"], record["facts"])
            intact = artifact.inputs == _digests(inputs) and all(
                sha256(self._file(path).read_bytes()) == checksum for path, checksum in artifact.files.items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # whatever is wrong with it, the answer is the same: it is made again
        return artifact if intact else None

    def write(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        inputs: Sequence[Artifact] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Write the files, then the record that makes them count."""
        checksums = {path: sha256(data) for path, data in files.items()}
        artifact = Artifact(name, checksums, _digests(inputs), dict(facts or {}))
        with contextlib.suppress(FileNotFoundError):
            self._record_path(name).unlink()  # the old record must not vouch for half-replaced files
        for path, data in files.items():
            self._replace(path, data)
        record = {"files": checksums, "inputs": artifact.inputs, "facts": artifact.facts}
        write_atomic(self._record_path(name), to_json(record))
        return artifact

    def artifacts(self) -> list[Artifact]:
        """Every artifact that has a record, by name."""
        found = []
        for path in sorted(self._file("steps").glob("[!.]*.json")):
            try:
                record = json.loads(path.read_bytes())
                found.append(Artifact(path.stem, record["files"], record["inputs"], record["facts"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no record of finished work, or damaged: delete it") from error
        return found

    def read(self, path: str) -> bytes:
        return self._file(path).read_bytes()

    def write_result(self, path: str, data: bytes) -> None:
        """A file that is derived from the artifacts alone (report, card): rewritten at the end of every run."""
        self._replace(path, data)

    def strangers(self, folder: str, expected: Iterator[str] | Sequence[str]) -> list[str]:
        """Files in ``folder`` that this run does not write; a dataset loader would read them as part of the data."""
        known = set(expected)
        present = sorted(p for p in self._file(folder).glob("*") if not p.name.startswith("."))
        return [p.name for p in present if f"{folder}/{p.name}" not in known]

    def log(self, event: str, **facts: Any) -> None:
        """One line of ``log.jsonl``: when what happened."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, ensure_ascii=False)
        with open(self._file("log.jsonl"), "a", encoding="utf-8") as file:
            file.write(line + "\n")


_OWN = {"steps", "log.jsonl"}


def _digests(inputs: Sequence[Artifact]) -> dict[str, str]:
    return {artifact.name: artifact.digest for artifact in inputs}
