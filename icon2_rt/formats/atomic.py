"""Files that are there whole or not at all: written beside their place, flushed to disk, then renamed into it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write to the path this yields; leaving the block without an error puts that file in the place of ``path``.

    The temporary file is in the same folder, because a rename is atomic only within one file system. A reader sees the
    old file or the new one, whatever happens in between, a power cut included.

    Raises:
        OSError: a full disk, a read-only or missing folder. ``path`` is as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Not tempfile: its files are private to the user, and this one becomes a file like any other.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        _discard(temporary)
        reason = f"cannot write {path}: {error.strerror or error}. What was there before is unchanged"
        raise OSError(error.errno, reason) from error
    except BaseException:
        _discard(temporary)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
