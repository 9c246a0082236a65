"""What a finished run says about itself: every health check in one table, and the dataset's card for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from icon2_rt.pipeline import acted, checks, dataset, health, rendering, separability
from icon2_rt.pipeline.config import RunConfig
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
    report: dict[str, Any] = {
        "counts": {
            "features": dict(features.facts["counts"]) if features else None,
            "instructions": dict(kept.facts["counts"]),
            "pairs": sections["pairs"]["pairs"],
            "shards": len(shards),
        },
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
    return {"checks": [check.to_dict() for check in found], "warnings": [*strangers, *checks.warnings(found)], **report}


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


def card(config: RunConfig, report: Mapping[str, Any]) -> str:
    """The content of ``README.md``: a dataset card with the figures that matter first."""
    pairs, strengths, counts = report["pairs"], report["strengths"], report["counts"]["instructions"]
    how = "calibrated by dose on this model" if config.calibration is not None else "as given"
    lines = [
        f"Made by icon2_rt from `{config.model}`: no reward model, no judge, no human labels.",
        "",
        f"- {pairs['pairs']} pairs from {counts['kept']} instructions kept of {counts['drawn']} drawn",
        f"- criteria: {', '.join(f'{name} {n}' for name, n in pairs['per_criterion'].items())}",
        f"- strengths in residual units, {how}: γ⁺ {_gamma(strengths['positive'])}, "
        f"γ⁻ {_gamma(strengths['negative'])}, "
        f"after blocks {strengths['layers'][0]} to {strengths['layers'][-1]} (0-based)",
        *([f"- steering acted on {acted.how_much(steering)}"] if (steering := report["steering"]) else []),
        f"- identical pairs {pairs['identical']:.1%}, length ratio chosen/rejected {pairs['length_ratio']:.2f}, "
        f"cut off {pairs['chosen']['cut_off']:.1%} / {pairs['rejected']['cut_off']:.1%}",
    ]
    if report["warnings"]:
        lines += ["", "Warnings:", "", *(f"- {warning}" for warning in report["warnings"])]
    columns = dataset.columns_of(dict.fromkeys(report["columns"]))
    return dataset.card("Steered preference pairs", "\n".join(lines), columns)


def _gamma(by_criterion: Mapping[str, float]) -> str:
    """One number where all criteria have the same strength, else each with its name."""
    if len(set(by_criterion.values())) == 1:
        return f"{next(iter(by_criterion.values())):.4g}"
    return " / ".join(f"{gamma:.4g} ({name})" for name, gamma in by_criterion.items())
