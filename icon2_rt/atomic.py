"""Files that are there whole or not at all: written beside their place, flushed to disk, then renamed into it.

So a kill, a full disk or a power cut never leaves a torn file behind.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Files that are being written carry this ending (and a leading dot, so that dataset loaders pass them by).
PARTIAL = ".partial"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write to the path this yields; leaving the block without an error puts that file in the place of ``path``.

    The temporary file is in the same folder, because a rename is atomic only within one file system. A reader sees the
    old file or the new one, whatever happens in between.

    Raises:
        OSError: a full disk, a read-only or missing folder; the message names the file. ``path`` is as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        # Not tempfile: its files are private to the user, and this one becomes a file like any other.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)  # a rename is on the disk only once its folder is
    except OSError as error:
        _discard(temporary)
        reason = f"cannot write {path}: {error.strerror or error}. What was there before is unchanged"
        raise OSError(error.errno, reason, str(path)) from error
    except BaseException:
        _discard(temporary)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whose folder is made if need be.

    Raises:
        OSError: as :func:`replacing`.
    """
    with suppress(OSError):  # replacing says why it cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def remove_partial(folder: Path) -> None:
    """Delete what a killed process was in the middle of writing, anywhere below ``folder``."""
    for path in folder.rglob(f".*{PARTIAL}"):
        path.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
