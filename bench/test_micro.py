"""Micro benchmarks of every op (`pytest bench --benchmark-enable`); figures go to bench/results/micro-DEVICE.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import micro
from bench.environment import environment, write

Figures = list[dict[str, Any]]


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    """What the tests below measured; written at the end, if anything was."""
    found: Figures = []
    yield found
    if found:
        settings = {"dtype": "float32", "backend": "reference", "copy_bytes": micro.COPY_BYTES}
        record = {"benchmark": "micro", "settings": settings, "environment": environment(), "figures": found}
        write("micro", record)


def measure(benchmark: Any, case: micro.Case, figures: Figures) -> None:
    with torch.inference_mode():
        benchmark(case.calls())
    if benchmark.stats is None:  # benchmarks are off: the op ran once, and that is all
        return
    stats = benchmark.stats.stats
    micros = {name: getattr(stats, name) * 1e6 for name in ("median", "min", "iqr")}
    speed = case.n_bytes / stats.median / 1e9
    benchmark.extra_info["GB/s"] = round(speed, 2)
    figures.append(
        {
            "op": case.name,
            "model": case.model,
            "rows": case.rows,
            "bytes": case.n_bytes,
            "microseconds": {**micros, "rounds": stats.rounds},
            "gb_per_second": speed,
        }
    )


def test_device_copy(benchmark: Any, figures: Figures) -> None:
    measure(benchmark, micro.copy(), figures)


@pytest.mark.parametrize("model", micro.SPECS)
@pytest.mark.parametrize("rows", [2, 16, 64])
@pytest.mark.parametrize("name", [case.name for case in micro.cases_of("tiny", 2)])
def test_op(benchmark: Any, figures: Figures, model: str, rows: int, name: str) -> None:
    case = next(case for case in micro.cases_of(model, rows) if case.name == name)
    measure(benchmark, case, figures)
