"""What a finished run says about itself: every figure and health check, from its artifacts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from icon2_rt.pipeline import acted, checks, dataset, health, rendering, separability
from icon2_rt.pipeline.cards import given
from icon2_rt.pipeline.effect import token_ids
from icon2_rt.pipeline.folder import Artifact
from icon2_rt.pipeline.stages import Job
from icon2_rt.steering import DirectionSet

# Of each criterion so many pairs are shown, the first ones of the dataset that differ.
EXAMPLES = 4


def compose(
    job: Job,
    direction_set: DirectionSet,
    features: Artifact | None,
    kept: Artifact,
    strengths: Artifact,
    shards: Sequence[Artifact],
    effect: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of ``report.json``, from the artifacts alone."""
    sections = pair_sections(job, shards)
    keys = ("kept_share", "histogram", "kept_histogram", "scores", "score", "distributions", "warnings")
    lost = sum(shard.facts.get("not_finite", 0) for shard in shards)
    report: dict[str, Any] = {
        "counts": {
            "features": dict(features.facts["counts"]) if features else None,
            "instructions": dict(kept.facts["counts"]),
            "pairs": sections["pairs"]["pairs"],
            **({"not_finite": lost} if lost else {}),
            "shards": len(shards),
        },
        **({"given": files} if (files := given(job.config)) else {}),
        "directions": {
            "names": direction_set.names,
            "health": health.direction_health(direction_set),
            "cosines": health.similarities(direction_set),
        },
        "consistency": {"scale": job.config.filter.scale, **{key: kept.facts[key] for key in keys}},
        "strengths": strengths.figures,
        "steering": acted.on_pairs(shards),
        **sections,
        "effect": effect,
    }
    found = checks.examine(report)
    strangers = health.made_elsewhere(direction_set, job.rt.fingerprint)
    warnings = [*strangers, *checks.warnings(found)]
    if lost:
        warnings.append(
            f"{lost} pairs are left out: of each, a branch ended where its logits were not finite. Lower the "
            f'strengths, or set runtime.dtype to "bfloat16" or "float32"'
        )
    return {"checks": [check.to_dict() for check in found], "warnings": warnings, **report}


def pair_sections(job: Job, shards: Sequence[Artifact]) -> dict[str, Any]:
    """What the dataset itself has to say, however it was made: columns, figures, separability, examples.

    It is read once, shard by shard; of most records only the figures are kept.
    """
    probed = set(health.spaced(sum(shard.facts["pairs"] for shard in shards), separability.PAIRS))
    figures: list[dict[str, Any]] = []
    rendered = set(health.spaced(sum(shard.facts["pairs"] for shard in shards), rendering.SAMPLE))
    texts: list[tuple[str, str]] = []
    sample: list[dict[str, Any]] = []
    columns: list[str] = []
    shown: dict[str | None, list[dict[str, Any]]] = {}
    for shard in shards:
        for path in shard.files:
            for record in dataset.from_parquet(job.folder.read(path)):
                if len(figures) in probed:
                    texts.append((record["chosen"][0]["content"], record["rejected"][0]["content"]))
                if len(figures) in rendered:
                    sample.append(record)
                figures.append(health.without_text(record))
                columns = columns or list(dataset.columns_of(record))
                examples = shown.setdefault(record["criterion"], [])
                if record["first_difference"] is not None and len(examples) < EXAMPLES:
                    examples.append(_example(record))
    return {
        "columns": columns,
        "pairs": {**health.pair_health(figures), "same_draws": job.config.pairs.same_draws},
        **({"rendering": rendering.examine(job.frame, sample)} if sample else {}),
        "separability": separability.probe(texts, token_ids(job.rt)),
        "examples": _by_turns(list(shown.values())),
    }


def _example(record: Mapping[str, Any]) -> dict[str, Any]:
    texts = {key: record[key][0]["content"] for key in ("prompt", "chosen", "rejected")}
    return {"criterion": record["criterion"], **texts}


def _by_turns(queues: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The first of each, the second of each …: no choosing of pretty ones."""
    rounds = max((len(queue) for queue in queues), default=0)
    return [queue[i] for i in range(rounds) for queue in queues if i < len(queue)]
