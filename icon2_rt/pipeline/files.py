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


def text_of(data: bytes, name: str) -> str:
    """UTF-8 text; a byte order mark, with which some editors begin a file, is no part of it.

    Raises:
        ValueError: it is not UTF-8.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{name} is not UTF-8 text but UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from None


def from_jsonl(data: bytes, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, one by one.

    Raises:
        ValueError: a line that is not a JSON object, with ``name`` and the line's number.
    """
    return (record for _, record in numbered_jsonl(data, name))


def numbered_jsonl(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """:func:`from_jsonl`, each object with the number of its line."""
    for number, line in enumerate(text_of(data, name).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = getattr(error, "msg", str(error))
            raise ValueError(f"{name}, line {number}: not JSON ({said}): {line[:60]!r}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{name}, line {number}: each line must be a JSON object, not {line[:60]!r}")
        yield number, record
