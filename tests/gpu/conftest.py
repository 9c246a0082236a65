"""The GPU lane: every test here is marked ``gpu`` and skipped, with the reason, where there is no CUDA GPU.

``GPU_LANE_DEVICE=cpu pytest tests/gpu`` runs what it can on the CPU, with the reference ops in the fixed buffers that
graphs read: that shows that the tests are right, not the kernels. With ``TRITON_INTERPRET=1`` in front it is the
kernels, under Triton's interpreter: slow; bf16 is right there by tests/interpreter.py.

After a CUDA fault nothing more works in its process, so the run ends with the test that met it. ``GPU_LANE_BEGUN``
names a file that keeps the tests that have begun: started again with the same file, a run goes on behind the fault.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What the driver says when the context is lost; every later call to it fails with the same words.
FAULT = re.compile(
    "illegal memory access|device-side assert|unspecified launch failure|misaligned address|illegal instruction"
    "|launch timed out"
)
BEGUN = os.environ.get("GPU_LANE_BEGUN")


def pytest_configure() -> None:
    # A watchdog's SIGTERM ends the run as Ctrl-C does: with a report of what has failed by then.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
    if BEGUN and Path(BEGUN).exists():
        begun = set(Path(BEGUN).read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in begun])
        items[:] = [item for item in items if item.nodeid not in begun]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if BEGUN:
        with open(BEGUN, "a") as file:
            file.write(f"{item.nodeid}\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    report = yield
    if call.excinfo is not None and (found := FAULT.search(str(call.excinfo.value))):
        item.session.shouldfail = (
            f"CUDA fault: {found[0]} in {item.nodeid}; nothing more works in this process, and the tests after it "
            "were not run"
        )
    return report
