"""What the files of a run folder are made of: JSON, JSON lines, checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


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
