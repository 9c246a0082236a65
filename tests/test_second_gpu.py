"""A model on a GPU that is not the current one: what torch and Triton take from the current device is given to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from icon2_rt.engine import upload
from icon2_rt.engine.forward import computing
from icon2_rt.engine.graphs import StepGraphs
from icon2_rt.ops import native_cuda

SECOND = torch.device("cuda", 1)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The current devices, the innermost last."""
    entered = [torch.device("cuda", 0)]

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", enter)
    return entered


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_work_is_done_on_the_models_device(current):
    with computing(SimpleNamespace(device=SECOND)):  # type: ignore[arg-type]
        assert current[-1] == SECOND
    with computing(SimpleNamespace(device=torch.device("cpu"))):  # type: ignore[arg-type]
        assert len(current) == 1


def test_graphs_are_captured_on_its_device_in_a_stream_of_it(current, monkeypatch):
    found: list[Any] = []
    streams: list[torch.device] = []

    class Graph:
        def capture_begin(self, **options: Any) -> None:
            found.append(streams[-1])

        def capture_end(self) -> None:
            pass

    @contextmanager
    def enter(stream: torch.device) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    graphs = StepGraphs(lambda rows: found.append(current[-1]), [1, 2], SECOND)
    assert found == [SECOND] * 3  # the step to warm up, the stream, the step that is captured
    graphs.run(1, lambda rows: None)
    assert found[3:] == [SECOND]
    assert len(current) == 1


def test_results_are_awaited_on_its_stream(monkeypatch):
    recorded: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=recorded.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    upload.end_of_work(SECOND)
    assert recorded == [SECOND]


def test_the_extension_is_called_with_the_tensors_device_current(current, monkeypatch):
    """It refuses any other: the CUDA runtime in it is a copy of its own and may not change what is current."""
    called: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=(device, 7)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    extension = SimpleNamespace(
        cuda_linear=lambda *arguments: called.append((current[-1], arguments[-1])),
        cuda_sample=lambda *arguments: called.append((current[-1], arguments[-1])),
        cuda_why_not=lambda index: called.append((current[-1], index)),
        cuda_sample_scratch=lambda rows, vocab: 8,
        cuda_linear_scratch=8,
        build="a double",
    )
    monkeypatch.setattr(native_cuda, "extension", extension)
    monkeypatch.setattr(native_cuda, "why_no_extension", None)
    monkeypatch.setattr(native_cuda, "_scratch", {})
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: None)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: None)
    x = SimpleNamespace(shape=(2, 8), dtype=torch.bfloat16, device=SECOND)
    native_cuda.skinny_linear(x, x)  # type: ignore[arg-type]
    how, state = MagicMock(), MagicMock()
    native_cuda.sample(x, how, state)  # type: ignore[arg-type]
    assert called == [(SECOND, (SECOND, 7))] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    native_cuda.why_not(SECOND)
    assert called[-1] == (1, 1)
    assert len(current) == 1
