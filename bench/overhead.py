"""What steering, sharing and branches cost: two seatings of one engine in turns, and the ratio of their step times.

Both sides of a comparison have the same weights, the same KV memory and the same graphs. They are seated in turns,
three rounds; a ratio is that of the medians of one round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from bench.seats import Seating, Seats
from bench.stage import WARM_UP, Stage, attempt, parse, step_times, timing_of
from bench.timing import Timing

ROUNDS = 3
MODELS = ("llama3-8b", "qwen2-1.5b")


@dataclass(frozen=True)
class Comparison:
    """``times`` · (step time of ``over``) / (step time of ``under``)."""

    name: str
    over: Seating
    under: Seating
    times: int = 1


def comparisons(model: str) -> list[Comparison]:
    """Of one model, what is worth most first."""

    def rows(n: int, **how: Any) -> Seating:
        return Seating(model, n // 2, **how)

    def over_off(name: str, n: int, **how: Any) -> Comparison:
        return Comparison(f"{name} over steering off", rows(n, **how), rows(n, steering="off"))

    one = rows(256, distinct=1)
    found = [
        over_off("all blocks", 256),
        over_off("3 directions × all blocks", 256, terms=3),
        Comparison("256 distinct steerings over 1", replace(one, distinct=256), one),
        over_off("idle", 256, steering="idle"),
        over_off("one block", 256, blocks="one"),
        over_off("all blocks", 2),
        over_off("3 directions × all blocks", 2, terms=3),
        *(over_off("all blocks", n) for n in (16, 64)),
        *(over_off("3 directions × all blocks", n, terms=3) for n in (16, 64)),
    ]
    more = [Comparison(f"{n} distinct steerings over 1", replace(one, distinct=n), one) for n in (2, 16, 64)]
    if model == "qwen2-1.5b":
        return found + more
    single = Seating(model, 1, branches=1, prompt=2048)
    ladder = Comparison("8 sequential branches over a ladder of 8", single, replace(single, branches=8), times=8)
    pairs = [
        Comparison("a pair over a single branch", Seating(model, n, prompt=p), Seating(model, n, branches=1, prompt=p))
        for n, p in ((1, 2048), (8, 2048), (1, 256), (8, 256), (4, 2048), (2, 2048))
    ]
    sharing = [
        Comparison("unshared over shared", Seating(model, n, prompt=p, shared=False), Seating(model, n, prompt=p))
        for n, p in ((32, 2048), (32, 8192), (16, 8192), (8, 2048))
    ]
    return [*found[:4], ladder, pairs[0], sharing[0], pairs[1], sharing[1], *found[4:], *pairs[2:], *sharing[2:], *more]


def dry_comparisons() -> list[Comparison]:
    """One of each kind, small."""
    small = Seating("dry", 2, prompt=40)
    off = replace(small, steering="off")
    single = Seating("dry", 1, branches=1, prompt=40)
    many = Seating("dry", 100, prompt=300)
    return [
        Comparison("all blocks over steering off", small, off),
        Comparison("3 directions × all blocks over steering off", replace(small, terms=3), off),
        Comparison("idle over steering off", replace(small, steering="idle"), off),
        Comparison("one block over steering off", replace(small, blocks="one"), off),
        Comparison("256 distinct steerings over 1", replace(small, distinct=4), small),
        Comparison("8 sequential branches over a ladder of 8", single, replace(single, branches=8), times=8),
        Comparison("a pair over a single branch", small, replace(small, branches=1)),
        Comparison("unshared over shared", replace(small, shared=False), small),
        Comparison("unshared over shared", replace(many, shared=False), many),
    ]


def main(argv: list[str] | None = None) -> None:
    stage, models = parse("overhead", __doc__, argv, MODELS)
    for n, model in enumerate(models):
        # The first model may take its share of the time and no more: the second is the hard case.
        run(stage, model, until=0.4 * stage.left if n == 0 and len(models) > 1 else 0.0)


def run(stage: Stage, model: str, until: float) -> None:
    """A model's comparisons, while more than ``until`` seconds are left; its memory is free again afterwards."""
    seats = Seats(stage.engine(model, max_rows=256))
    for comparison in dry_comparisons() if stage.dry else comparisons(model):
        over = comparison.over
        figure: dict[str, Any] = {
            "model": model,
            "name": comparison.name,
            "rows": over.rows,
            "groups": over.groups,
            "prompt": over.prompt,
            "over": str(over),
            "under": str(comparison.under),
        }
        if stage.left < until:
            stage.keep({**figure, "status": "not reached: out of time"})
        else:
            stage.keep({**figure, **compared(stage, seats, comparison)})


def compared(stage: Stage, seats: Seats, comparison: Comparison) -> dict[str, Any]:
    over, under = comparison.over, comparison.under
    itemsize = seats.engine.model.dtype.itemsize
    predicted = [seating.load(itemsize).milliseconds(stage.machine) for seating in (over, under)]

    def work() -> dict[str, Any]:
        times: dict[str, list[list[float]]] = {"over": [], "under": []}
        for turn in range(ROUNDS):
            sides = [("over", over), ("under", under)]
            for name, seating in sides if turn % 2 else sides[::-1]:
                times[name].append(step_times(seats, seating, stage.steps, stage.device))
        ratios = [comparison.times * median(a) / median(b) for a, b in zip(times["over"], times["under"], strict=True)]
        return {
            "milliseconds": {name: timing_of([t for turn in turns for t in turn]) for name, turns in times.items()},
            "ratio": Timing.of(ratios).record(),
            "graphed": seats.graphed(max(over.rows, under.rows)),
        }

    found = attempt(work, seats, WARM_UP + stage.steps + 8, over, under)
    return {**found, "predicted_ratio": comparison.times * predicted[0] / predicted[1]}


if __name__ == "__main__":
    main()
