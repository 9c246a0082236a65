"""A trial's process as seen from the one that waits for it: started apart, listened to, and ended when it is late.

A kernel that reads where it must not can take its whole process along, and one that hangs never returns. So a trial
runs in a session of its own. It writes one JSON object a line into a pipe made for that: whatever libraries print goes
to a file. Every line is a sign of life and says what comes next and how long that may take.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Literal

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Limits:
    """Seconds: without a line while something compiles (or is loaded), without one while a kernel runs, of a trial in
    all, and how long a killed process is waited for."""

    compile: float = 120.0
    run: float = 20.0
    total: float = 240.0
    wait: float = 5.0


@dataclass(frozen=True)
class End:
    """How a trial's process ended: it said that it is "done", it "died" by itself before that, or was "late" and has
    been killed. ``at``: the last ``begin`` event; ``detail``: in words."""

    how: Literal["done", "died", "late"]
    at: Event
    detail: str = ""


def listen(
    command: Sequence[str], request: Mapping[str, Any], limits: Limits, until: float, hear: Callable[[Event], None]
) -> End:
    """Run ``command`` with ``--request JSON --pipe N`` and hand every event to ``hear``, until it ends or is late. What
    can be imported here can be imported there.

    Args:
        until: the moment (of :func:`time.monotonic`) when it is late whatever it is at.

    Raises:
        OSError: it cannot be started. KeyboardInterrupt, or whatever ``hear`` raises: after the process was killed.
    """
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                [*command, "--request", json.dumps(request), "--pipe", str(writing)],
                stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, pass_fds=(writing,), start_new_session=True,
                env=os.environ | {"PYTHONPATH": _import_path()},
            )  # fmt: skip
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        try:
            return _listen(process, reading, printed, limits, until, hear)
        finally:
            os.close(reading)
            kill(process, limits.wait)


def _import_path() -> str:
    """Where this process looks for modules. Python passes over entries that are no text, such as a Path."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path if isinstance(path, str))


def _listen(
    process: subprocess.Popen[bytes],
    reading: int,
    printed: IO[bytes],
    limits: Limits,
    until: float,
    hear: Callable[[Event], None],
) -> End:
    at: Event = {"event": "begin", "what": "start", "phase": "compile"}
    deadline = time.monotonic() + limits.compile
    rest, open_ = b"", True
    while True:
        now = time.monotonic()
        if now >= min(deadline, until):
            whole = "in all" if until <= deadline else f"without a sign of life while it was to {at['phase']}"
            seconds = limits.total if until <= deadline else _limit(at, limits)
            detail = f"no end after {seconds:g} s {whole}"
            if not kill(process, limits.wait):
                detail += f"; process {process.pid} cannot be killed: a driver call hangs"
            return End("late", at, detail)
        ended = process.poll() is not None
        if open_:
            ready, _, _ = select.select([reading], [], [], 0.0 if ended else min(0.2, min(deadline, until) - now))
            data = _read(reading) if ready else b""
            open_ = not ready or bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for event in map(_event, lines):
                if event is None:
                    continue
                if event["event"] == "begin":
                    at = event
                hear(event)
                if event["event"] == "done":
                    return End("done", at)
                deadline = time.monotonic() + _limit(at, limits)
            if data:
                continue
        elif not ended:
            time.sleep(0.02)  # it closed the pipe, and may be on its way out
        if ended:
            return End("died", at, _last_words(process, printed))


def _limit(at: Event, limits: Limits) -> float:
    return limits.run if at.get("phase") == "run" else limits.compile


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return b""


def _event(line: bytes) -> Event | None:
    """What a line says; None where it is not one of ours."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("event"), str) else None


def _last_words(process: subprocess.Popen[bytes], printed: IO[bytes]) -> str:
    code = process.returncode
    try:
        how = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
    except ValueError:
        how = f"it was ended by signal {-code}"
    printed.seek(max(0, os.fstat(printed.fileno()).st_size - 4096))
    lines = printed.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{how}: {last[:200]}" if last else how


def kill(process: subprocess.Popen[bytes], wait: float) -> bool:
    """End the process and all it has started; False where it is still there ``wait`` seconds later."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        return False
    return True
