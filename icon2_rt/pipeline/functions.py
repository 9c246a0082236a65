"""Functions that a config names: "module:function", or "file.py:function" with the file relative to the config.

A run may leave a choice to the user's own code (which criterion an instruction gets, how good a response is). The text
form keeps the config plain data: it can be stored in a manifest and compared, and a file's content is part of the
identity of the run.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

FUNCTION_FORM = 'a function of your own as "module:function" or "file.py:function"'


def is_function(text: str) -> bool:
    """Does a setting name a function?"""
    return re.fullmatch(r"(?:[\w.]+|.+\.py):[A-Za-z_][\w.]*", text) is not None


def function_file(text: str) -> str | None:
    """The file in "file.py:function"; None for a module, and for what names no function."""
    file = text.rpartition(":")[0]
    return file if is_function(text) and file.endswith(".py") else None


def load_function(text: str, setting: str) -> Callable[..., Any]:
    """The function that ``text`` names; ``setting`` is the config key, for the error.

    Raises:
        ValueError: no such module or file, an error while it is imported, or nothing callable of that name in it.
    """
    place, _, name = text.rpartition(":")
    file = function_file(text)
    try:
        if file is None:
            found: Any = importlib.import_module(place)
        else:
            spec = importlib.util.spec_from_file_location(Path(file).stem, file)
            assert spec is not None and spec.loader is not None
            found = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found)
    except Exception as error:  # it is the user's code, and may raise anything
        raise ValueError(f"{setting}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{setting}: there is no function {name!r} in {place}")
    return found
