"""What a trial says while it runs, to :mod:`icon2_rt.qualify.child`: a JSON object a line; and a marker on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icon2_rt.atomic import write_atomic
from icon2_rt.qualify.gate import boot_id
from icon2_rt.qualify.verdict import EngineResult, FormResult


class Teller:
    """Writes events into ``pipe`` (None: nowhere), and before anything that may bring the machine down a file
    ``marker`` that says what, and on which ``machine``: it is on the disk before the attempt is made."""

    def __init__(self, pipe: int | None = None, marker: str | None = None, machine: str = ""):
        self._pipe, self._marker, self._machine = pipe, Path(marker) if marker else None, machine
        self._at = ""
        self._before: Mapping[str, Any] = {}
        if self._marker is not None:
            with suppress(OSError, ValueError):
                found = json.loads(self._marker.read_bytes())
                self._before = found if isinstance(found, dict) else {}

    def __call__(self, event: str, **fields: Any) -> None:
        if self._pipe is not None:
            os.write(self._pipe, (json.dumps({"event": event, **fields}) + "\n").encode())

    def begin(self, what: str, form: str | None = None, *, running: bool = False, **fields: Any) -> None:
        """``form`` of ``what`` is next: something compiles first, or (``running``) kernels run."""
        at = f"{what} ({form})" if form else what
        if at != self._at:
            self._at = at
            self._mark(at)
        self("begin", what=what, form=form, phase="run" if running else "compile", **fields)

    def beat(self) -> None:
        """Still alive."""
        self("beat")

    def result(self, result: FormResult | EngineResult) -> None:
        self("form" if isinstance(result, FormResult) else "engine", **asdict(result))

    def _mark(self, at: str) -> None:
        if self._marker is None:
            return
        times = int(self._before.get("times", 0)) + 1 if self._before.get("at") == at else 1
        data = {"machine": self._machine, "boot": boot_id(), "at": at, "times": times}
        with suppress(OSError):  # a folder that cannot be written: nothing is remembered
            write_atomic(self._marker, json.dumps(data).encode())
