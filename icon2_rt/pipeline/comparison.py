"""A run of a baseline: instructions as in any run, then one of the recipes in place of directions, filter and steering.

It has a run's folder, records and manifest, and continues like one, so that the method and what it is compared with
differ in nothing but the recipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from icon2_rt.pipeline import baselines, checks, dataset, judges, stages
from icon2_rt.pipeline.cards import given
from icon2_rt.pipeline.config import BaselineConfig
from icon2_rt.pipeline.folder import Artifact
from icon2_rt.pipeline.judges import Judge, RewardModel
from icon2_rt.pipeline.report import pair_sections
from icon2_rt.pipeline.stages import Job, Scored


def load_judge(job: Job) -> Judge | None:
    """What best-of-n asks, loaded before any work; None for the recipes that ask nobody."""
    baseline = _settings(job)
    if baseline.recipe != "best_of_n" or baseline.judge is None:
        return None
    return judges.load_judge(baseline.judge, baseline.label, job.rt.device, "baseline.judge")


def pairs(
    job: Job, raw: Sequence[Artifact], scored: Scored, judge: Judge | None
) -> tuple[list[Artifact], dict[str, int]]:
    """The recipe's records by shards, and the counts of the instructions behind them."""
    unique, counts = stages.distinct(raw, scored)
    criterion_of = dict(zip((item.id for item in scored.instructions), scored.given, strict=True))
    shards, paths = stages.data_shards(job, unique)
    artifacts: list[Artifact] = []
    done = 0
    for shard, path in zip(shards, paths, strict=True):
        job.watch("pairs", done, len(unique))
        name = f"pairs-{len(artifacts):05d}"
        artifact = job.folder.finished(name, raw)
        if artifact is None:
            job.rt.usage.begin("pairs")
            read_before = judge.tokens if isinstance(judge, RewardModel) else 0
            records, dropped = baselines.make(
                job.rt,
                job.frame,
                shard,
                [criterion_of[item.id] for item in shard],
                _settings(job),
                job.config.pairs,
                job.config.resolved_criteria(),
                job.eos,
                job.config.seed,
                judge,
            )
            records = dataset.rendered_with(records, job.frame.template.variables)
            files = {path: dataset.to_parquet(records)} if records else {}
            facts: dict[str, Any] = {"pairs": len(records), "dropped": dict(sorted(dropped.items()))}
            if isinstance(judge, RewardModel):
                facts["judge"] = {"tokens": judge.tokens - read_before, "parameters": judge.parameters}
            artifact = job.write(name, files, inputs=raw, facts=facts)
            job.folder.log("shard", name=name)
        artifacts.append(artifact)
        done += len(shard)
    job.watch("pairs", len(unique), len(unique))
    return artifacts, {**counts, "kept": len(unique)}


def compose(job: Job, counts: Mapping[str, int], shards: Sequence[Artifact]) -> dict[str, Any]:
    """The content of ``report.json`` for a baseline."""
    dropped = sum((Counter(shard.facts["dropped"]) for shard in shards), Counter())
    sections = pair_sections(job, shards)
    report: dict[str, Any] = {
        "baseline": {"recipe": _settings(job).recipe, "samples": _settings(job).n_samples, "dropped": dict(dropped)},
        "counts": {"instructions": dict(counts), "pairs": sections["pairs"]["pairs"], "shards": len(shards)},
        **({"given": files} if (files := given(job.config)) else {}),
        **sections,
    }
    found = checks.examine(report)
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(dropped.items()))
    lost = [f"{dropped.total()} of {counts['kept']} instructions gave no pair ({reasons})"] if dropped else []
    return {"checks": [check.to_dict() for check in found], "warnings": [*lost, *checks.warnings(found)], **report}


def _settings(job: Job) -> BaselineConfig:
    assert job.config.baseline is not None
    return job.config.baseline
