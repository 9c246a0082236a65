"""The compile lane: every kernel compiled for GPUs that are not there, and held to the budget written beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    skip = pytest.mark.skip(reason="under TRITON_INTERPRET=1 there is no compiler: run pytest tests/compile without it")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)
