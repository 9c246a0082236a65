"""Bytes reach the disk whole or not at all, so that a kill or a full disk never leaves a torn file behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Files that are being written carry this ending (and a leading dot, so that dataset loaders pass them by).
PARTIAL = ".partial"


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: after a crash at any moment the path holds its old content or all of the new.

    The data goes to a hidden file in the same folder, is flushed to the disk, and takes the name in one step.

    Raises:
        OSError: the folder cannot be written or the disk is full; the message names the file; the old content stays.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = error.strerror or str(error)
        raise type(error)(
            error.errno, f"cannot write {len(data)} bytes ({reason}); what was finished before is kept", str(path)
        ) from error


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk only once its folder is: without this a power cut could undo a finished shard."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial(folder: Path) -> None:
    """Delete what a killed run was in the middle of writing."""
    for path in folder.rglob(f".*{PARTIAL}"):
        path.unlink()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def to_json(value: Any) -> bytes:
    """Readable JSON, the same bytes for the same value. NaN raises: no other reader would take it."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def to_jsonl(records: Iterable[Mapping[str, Any]]) -> bytes:
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records)
    return "".join(line + "\n" for line in lines).encode()


def from_jsonl(data: bytes, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, one by one.

    Raises:
        ValueError: a line that is not a JSON object, with ``name`` and the line's number.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error.msg}): {line[:60]!r}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{name}, line {number}: each line must be a JSON object, not {line[:60]!r}")
        yield record
