"""Small HTML tables for notebooks. Every text is escaped: what a model wrote is shown, never interpreted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_TEXT = ' style="text-align: left; vertical-align: top; white-space: pre-wrap"'


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a caption; floats are shown with three decimals, None as a dash."""
    top = "".join(f"<th{_TEXT}>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td{_TEXT}>{escape(_shown(cell))}</td>' for cell in row)}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>"
    return f"<table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def short(text: str, most: int = 60) -> str:
    """The text as Python writes it, its end left out where it is long."""
    return repr(text if len(text) <= most else text[: most - 1] + "…")


def _shown(cell: object) -> str:
    return "–" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)
