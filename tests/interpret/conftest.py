"""The interpret lane: Triton kernels run by its interpreter, on a CPU, against the reference.

The interpreter is chosen when ``@triton.jit`` runs, so this lane is a process of its own: ``make test`` runs
``TRITON_INTERPRET=1 pytest tests/interpret``. bf16 is what a GPU makes of it only with tests/interpreter.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    skip = pytest.mark.skip(
        reason="the interpret lane is a process of its own: TRITON_INTERPRET=1 pytest tests/interpret"
    )
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)
