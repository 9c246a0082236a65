"""What is installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable


def installed(name: str) -> str | None:
    """The version of the distribution ``name``, None where it is not installed; torch's with its build, as in
    ``2.11.0+cu130``, of which the wheels that carry CUDA tell nothing but in the module itself."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if name == "torch":
        import torch

        return str(torch.__version__)
    return found


def versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of those of ``names`` that are installed."""
    return {name: version for name in names if (version := installed(name)) is not None}
