"""The GPU lane: every test here is marked ``gpu`` and skipped, with the reason, where there is no CUDA GPU.

``GPU_LANE_DEVICE=cpu pytest tests/gpu`` runs what it can on the CPU, with the reference ops in the fixed buffers that
graphs read: that shows that the tests are right, not the kernels. With ``TRITON_INTERPRET=1`` in front it is the
kernels, under Triton's interpreter: slow; bf16 is right there by tests/interpreter.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
