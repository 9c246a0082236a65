"""How much steering acted in a run, and which code it ran through: kept with every artifact, added up over a run.

The figures come from the records of the calls that made an artifact, so they are the same however often a run was
interrupted. They do not decide any byte of the data, so they are no part of an artifact's digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from icon2_rt.outputs import Fired, Paths, add_up
from icon2_rt.pipeline.folder import RAN, Artifact
from icon2_rt.usage import Work


def facts(work: Mapping[str, Work]) -> dict[str, Any]:
    """What an artifact's record holds: by step, the terms that acted, and the paths."""
    return {
        step: {"steering": [fired.to_dict() for fired in done.steering], "paths": done.paths.to_dict()}
        for step, done in work.items()
        if done.paths is not None
    }


def by_step(artifacts: Iterable[Artifact]) -> dict[str, Any]:
    """The same for a whole run. Artifacts that were made before such figures were kept are left out."""
    steering: dict[str, tuple[Fired, ...]] = {}
    paths: dict[str, Paths] = {}
    for artifact in artifacts:
        for step, ran in artifact.facts.get(RAN, {}).items():
            steering[step] = add_up((*steering.get(step, ()), *map(Fired.from_dict, ran["steering"])))
            found = Paths.from_dict(ran["paths"])
            paths[step] = paths[step] + found if step in paths else found
    return {
        step: {"steering": [fired.to_dict() for fired in steering[step]], "paths": paths[step].to_dict()}
        for step in paths
    }


def on_pairs(shards: Sequence[Artifact]) -> dict[str, int] | None:
    """How much the steering of the pairs acted: ``rows``, ``blocks``, ``tokens``, ``total`` (see
    :class:`~icon2_rt.outputs.Fired`), and the ``idle`` rows. A row with several terms is one row.

    None where some shard was made before such figures were kept.
    """
    if any("pairs" not in shard.facts.get(RAN, {}) for shard in shards):
        return None
    fired = add_up(Fired.from_dict(one) for shard in shards for one in shard.facts[RAN]["pairs"]["steering"])
    rows: dict[tuple[str, int], tuple[int, int, int]] = {}  # (branch, term) → rows, idle, tokens
    for one in fired:
        before = rows.get((one.branch, one.term), (0, 0, 0))
        rows[one.branch, one.term] = (before[0] + one.rows, before[1] + one.idle, before[2] + one.tokens)
    each = [max(counts for (of, _), counts in rows.items() if of == branch) for branch in {one.branch for one in fired}]
    return {
        "rows": sum(counts[0] for counts in each),
        "idle": sum(counts[1] for counts in each),
        "blocks": len({layer for one in fired for layer in one.layers}),
        "tokens": sum(counts[2] for counts in each),
        "total": sum(one.total for one in fired),
    }


def how_much(steering: Mapping[str, int]) -> str:
    """How much the pairs' steering acted, for people."""
    return (
        f"{steering['rows']:,} responses × {steering['blocks']:,} blocks × {steering['tokens']:,} tokens, "
        f"{steering['total']:,} times in all"
    )
