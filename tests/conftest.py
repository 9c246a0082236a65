"""What holds for every test: no network, quiet, few threads, and a GPU test that says why it was skipped."""

from __future__ import annotations

import os

# Before torch and transformers are imported: both read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Small models: more threads only wait for each other, and for whatever else the machine does.
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.interpreter import mend_bf16

        mend_bf16()


@pytest.hookimpl(trylast=True)  # tests/gpu marks its own first
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("GPU_LANE_DEVICE") == "cpu":
        return
    reason = "needs a CUDA GPU: torch.cuda.is_available() is False here"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
