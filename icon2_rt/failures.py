"""What ended a command: a bug of ours, or something that the user can do something about."""

from __future__ import annotations

import dis
import re
from pathlib import Path
from types import TracebackType

_PACKAGE = Path(__file__).resolve().parent
REPORT = (
    "this is a bug in icon2_rt, and your input is not to blame. Please report it where you got icon2_rt from (its "
    "repository's issues), with the traceback above, the command or config, and what `icon2 doctor` prints."
)
# Python's own words where a program handles its own values wrongly.
_OWN_MISTAKES = re.compile(r"^(not enough values to unpack|too many values to unpack|zip\(\) argument \d+ is )")
_BUGS = (AssertionError, AttributeError, LookupError, NameError, RecursionError, ZeroDivisionError, StopIteration)
_ADVICE: dict[str, str] = {
    "FloatingPointError": "Lower the strengths (pairs.positive and pairs.negative, or the doses of a calibration), or "
    'set runtime.dtype to "bfloat16" or "float32".',
    "OutOfMemoryError": "Set runtime.kv_memory or runtime.max_rows lower, or close what else uses the device.",
    "MemoryError": "Set runtime.kv_memory or runtime.max_rows lower, or close what else uses the memory.",
}


def is_bug(error: BaseException) -> bool:
    """Is it a mistake in this package?

    What this package raises on purpose is for the user, and so is what libraries and the system raise about values that
    they cannot take. What Python raises by itself about types, names, keys and attributes is a mistake of a program.
    """
    frame = _innermost(error.__traceback__)
    ours = frame is not None and _PACKAGE in Path(frame.tb_frame.f_code.co_filename).resolve().parents
    if isinstance(error, ImportError):
        return (error.name or "").partition(".")[0] == "icon2_rt"
    if isinstance(error, _BUGS):
        return True
    if isinstance(error, TypeError):
        return not _raised_on_purpose(frame)
    if isinstance(error, RuntimeError):
        return ours and _raised_on_purpose(frame)  # how this package marks states that cannot be
    return _OWN_MISTAKES.match(str(error)) is not None


def paragraph(error: BaseException) -> str:
    """The error for people: what was said, and what to do where that is known."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        said = error.strerror
        return said if str(error.filename) in said else f"{error.filename}: {said}"
    text = str(error).strip()
    if isinstance(error, ValueError | TypeError | OSError) and text:
        return text
    kind = type(error).__name__
    text = re.split(r"\n\s*\n", text)[0]  # libraries add stacks and advice of their own
    text = f"{kind}: {text}" if text else kind
    advice = _ADVICE.get(kind, "ICON2_TRACEBACK=1 shows where it came from.")
    return f"{text.rstrip('.')}. {advice}"


def _innermost(place: TracebackType | None) -> TracebackType | None:
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place


def _raised_on_purpose(place: TracebackType | None) -> bool:
    """By a ``raise`` statement, and not by Python or a compiled function."""
    if place is None:
        return True
    return dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
