"""Decode step time and achieved bandwidth of steered pairs, on decoders of real sizes with random weights.

All blocks of all rows are steered. KV pages hold random numbers instead of prefilled prompts. Beside each time stand
the bytes that the step has to move at least, and what the roofline predicts with the bandwidth of a device copy.
"""

from __future__ import annotations

from typing import Any

from bench.seats import Seating, Seats
from bench.stage import WARM_UP, Stage, attempt, parse, step_times, timing_of

# (pairs, prompt tokens) of the first decoder and of the second, what is worth most first.
CELLS = (
    [(1, 2048), (8, 2048), (32, 2048), (128, 256), (128, 2048), (1, 256), (32, 8192), (8, 8192), (8, 256), (32, 256),
     (1, 8192), (128, 8192)],
    [(1, 2048), (32, 2048), (128, 2048), (8, 2048), (1, 256), (128, 256), (32, 8192), (8, 256), (32, 256), (1, 8192),
     (8, 8192), (128, 8192)],
)  # fmt: skip
DRY_CELLS = [(1, 40), (3, 300), (100, 300)]
MODELS = ("llama3-8b", "qwen2-7b")


def main(argv: list[str] | None = None) -> None:
    stage, models = parse("step", __doc__, argv, MODELS)
    for model, cells in zip(models, CELLS, strict=False):
        run(stage, model, DRY_CELLS if stage.dry else cells)


def run(stage: Stage, model: str, cells: list[tuple[int, int]]) -> None:
    """All cells of a model; its memory is free again when this returns."""
    seats = Seats(stage.engine(model, max_rows=256))
    for pairs, prompt in cells:
        figure: dict[str, Any] = {"model": model, "pairs": pairs, "prompt": prompt, "rows": 2 * pairs}
        if stage.left < 0:
            stage.keep({**figure, "status": "not reached: out of time"})
        else:
            stage.keep({**figure, **measured(stage, seats, Seating(model, pairs, prompt=prompt))})


def measured(stage: Stage, seats: Seats, seating: Seating) -> dict[str, Any]:
    load = seating.load(itemsize=seats.engine.model.dtype.itemsize)

    def work() -> dict[str, Any]:
        times = timing_of(step_times(seats, seating, stage.steps, stage.device))
        speed = load.bytes / times["median"] / 1e6
        return {
            "milliseconds": times,
            "bytes": load.bytes,
            "gb_per_second": speed,
            "of_copy": speed / stage.record["copy"]["gb_per_second"],
            "predicted_milliseconds": load.milliseconds(stage.machine),
            "graphed": seats.graphed(seating.rows),
        }

    return attempt(work, seats, WARM_UP + stage.steps + 8, seating)


if __name__ == "__main__":
    main()
