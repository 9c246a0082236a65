"""What the benchmarks of the decode step have in common: the device, the clock that ends them, and seats to measure."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.environment import environment, write
from bench.roofline import H100, Machine
from bench.room import fitting, free_bytes, step_needs
from bench.seats import Seating, Seats, make_engine
from bench.timing import COPY_BYTES, Timing, device_copy, timed
from icon2_rt.engine import Engine

WARM_UP = 4  # steps before those that count: the first ones lay out steering and attention items


@dataclass
class Stage:
    """One benchmark run: where, until when, what is written."""

    name: str
    device: torch.device
    dry: bool
    steps: int
    deadline: float
    out: Path | None
    record: dict[str, Any]

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def machine(self) -> Machine:
        """What predictions are made with: the copy that was measured, and the products of the card that is aimed at."""
        return Machine("here", self.record["copy"]["gb_per_second"] * 1e9, H100.flops)

    def keep(self, figure: dict[str, Any]) -> None:
        """Add a figure and write everything: a run that is cut off keeps what it has."""
        self.record["figures"].append(figure)
        print(figure, file=sys.stderr)
        write(self.name, self.record, self.out)

    def engine(self, model: str, max_rows: int) -> Engine:
        """An engine on random weights. That of the model before has to be gone: this one takes all the memory."""
        begin = time.monotonic()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        engine = make_engine(model, self.device, max_rows)
        self.record["settings"]["backend"] = engine.model.ops.backend
        print(f"{model}: made in {time.monotonic() - begin:.1f} s, {engine.kv.n_pages} KV pages", file=sys.stderr)
        return engine


def parse(name: str, doc: str, argv: list[str] | None, models: tuple[str, ...]) -> tuple[Stage, tuple[str, ...]]:
    """The stage that the command line asks for, and its models: smaller ones where those have no room.

    Without a CUDA device only ``--dry`` runs: the same code, a tiny decoder, on the CPU; its figures mean nothing.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=doc.splitlines()[0])
    parser.add_argument("--model", choices=models, nargs="+", default=list(models))
    parser.add_argument("--steps", type=int, default=48, help="decode steps of each measurement")
    parser.add_argument("--limit", type=float, default=420, help="begin no further cell after so many seconds")
    parser.add_argument("--out", type=Path, help="a folder or a file; default: bench/results/")
    parser.add_argument("--dry", action="store_true", help="a tiny decoder on the CPU, to see that everything runs")
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, and torch finds none here; --dry runs the same code on a tiny decoder")
    if options.dry and options.out is None:
        parser.error("--dry measures nothing that is worth keeping among the results: give it --out FOLDER")
    device = torch.device("cpu" if options.dry else "cuda")
    chosen, told = (["dry"], {}) if options.dry else fitting(options.model, step_needs, free_bytes(device))
    steps = 2 if options.dry else options.steps
    settings: dict[str, Any] = {"steps": steps, "dry": options.dry, "dtype": "float32" if options.dry else "bfloat16"}
    settings["no_room_for"] = told
    record = {
        "benchmark": name,
        "settings": settings,
        "environment": environment(device),
        "copy": device_copy(device, 2**20 if options.dry else COPY_BYTES),
        "figures": [],
    }
    deadline = time.monotonic() + options.limit
    stage = Stage(name, device, options.dry, steps, deadline, options.out, record)
    if not chosen:
        write(name, record, options.out)
        parser.error(f"this GPU has no room for any of the decoders: {told}")
    return stage, tuple(chosen)


def step_times(seats: Seats, seating: Seating, steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each of ``steps`` decode steps of the seating."""
    try:
        batch = seats.take(seating, budget=WARM_UP + steps + 8)

        def step() -> None:  # as the engine does it: a step's results are looked at while later ones are under way
            batch.launch()
            if len(batch.under_way) > batch.behind:
                batch.results()

        times = timed(step, device, steps, WARM_UP)
        running = batch.buffers.state.running[: seating.rows]
        if not bool(running.all()):
            raise RuntimeError(f"rows ended while they were measured: {seating}")
        return times
    finally:
        seats.leave()


def attempt(work: Callable[[], dict[str, Any]], seats: Seats, budget: int, *seatings: Seating) -> dict[str, Any]:
    """What ``work`` measured, or why it could not: its rows do not fit, or the device ran out of memory."""
    for seating in seatings:
        if (why := seats.missing(seating, budget)) is not None:
            return {"status": why}
    try:
        return {"status": "measured", **work()}
    except torch.OutOfMemoryError as error:
        gc.collect()
        torch.cuda.empty_cache()
        return {"status": f"does not fit: {str(error).splitlines()[0]}"}


def timing_of(times: list[float]) -> dict[str, float]:
    return Timing.of(times).record()
