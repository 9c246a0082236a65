"""Files of instructions: plain text, JSON, tables. Each becomes records, and each record says where it stands.

- ``.txt``, ``.text`` or no ending: an instruction on each line. Newlines and carriage returns end a line; the other
  characters that Unicode breaks lines at are part of the text.
- ``.jsonl``: a JSON object on each line. ``.json``: that, or one array of objects or texts.
- ``.csv``, ``.tsv``: a table with a header; ``.parquet``: a table. The column ``instruction`` is needed.

A byte order mark at the beginning is no text.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from icon2_rt.pipeline.files import numbered_jsonl, text_of

Record = tuple[str, Mapping[str, Any]]  # where it stands: "line 3"; the record
Reader = Callable[[bytes, str], Iterator[Record]]  # the file's content and name


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file, by the ending of its name.

    Raises:
        ValueError: an ending that is not known, or content that is not what the ending says. OSError: it cannot be
            read.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: instructions are read from {', '.join(ending for ending in _READERS if ending)} files, not from "
            f"{path.suffix}"
        )
    yield from reader(path.read_bytes(), str(path))


def _plain(data: bytes, name: str) -> Iterator[Record]:
    lines = io.StringIO(text_of(data, name), newline=None)  # \n, \r\n and \r end a line, and nothing else does
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"line {number}", {"instruction": line}


def _jsonl(data: bytes, name: str) -> Iterator[Record]:
    return ((f"line {number}", record) for number, record in numbered_jsonl(data, name))


def _json(data: bytes, name: str) -> Iterator[Record]:
    text = text_of(data, name)
    if not text.lstrip().startswith("["):
        yield from _jsonl(data, name)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    for number, record in enumerate(records, start=1):
        if isinstance(record, str):
            record = {"instruction": record}
        if not isinstance(record, dict):
            raise ValueError(f"{name}, entry {number}: must be an object or a text, not {record!r:.60}")
        yield f"entry {number}", record


def _table(delimiter: str) -> Reader:
    def read(data: bytes, name: str) -> Iterator[Record]:
        rows = csv.reader(io.StringIO(text_of(data, name), newline=""), delimiter=delimiter, strict=True)
        header: list[str] = []
        begins = 1
        try:
            for row in rows:
                where, begins = f"line {begins}", rows.line_num + 1
                if not any(cell.strip() for cell in row):
                    continue
                if not header:
                    header = [cell.strip() for cell in row]
                    _needs_instruction(header, name)
                elif len(row) != len(header):
                    raise ValueError(f"{name}, {where}: {len(row)} cells in a table of {len(header)} columns")
                else:
                    yield where, _typed(dict(zip(header, row, strict=True)))
        except csv.Error as error:
            raise ValueError(f"{name}, line {rows.line_num}: {error}") from None

    return read


def _typed(record: dict[str, Any]) -> dict[str, Any]:
    """A cell is text: an empty one is none, and an id is a number."""
    found = {name: cell for name, cell in record.items() if cell or name == "instruction"}
    number = found.get("id", "").strip()
    return {**found, "id": int(number)} if re.fullmatch(r"[0-9]{1,20}", number) else found


def _parquet(data: bytes, name: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} is not a Parquet file, or damaged: {error}") from None
    _needs_instruction(table.column_names, name)
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", record


def _needs_instruction(columns: list[str], name: str) -> None:
    if "instruction" not in columns:
        raise ValueError(f'{name}: one column must be named "instruction"; there are {", ".join(map(repr, columns))}')
    if len({*columns}) < len(columns):
        raise ValueError(f"{name}: two columns have the same name")


_READERS: dict[str, Reader] = {
    "": _plain, ".txt": _plain, ".text": _plain, ".jsonl": _jsonl, ".json": _json, ".csv": _table(","),
    ".tsv": _table("\t"), ".parquet": _parquet,
}  # fmt: skip
