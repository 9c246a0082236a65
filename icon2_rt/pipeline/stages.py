"""The method's steps as artifacts of a run folder: each is taken from there if it is finished, else made and kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from icon2_rt.pipeline import acted, calibrate, consistency, costs, dataset, health, quality
from icon2_rt.pipeline.config import SCALES, RunConfig, given_strengths
from icon2_rt.pipeline.directions import extract
from icon2_rt.pipeline.effect import SAMPLE
from icon2_rt.pipeline.effect import measure as measure_effect
from icon2_rt.pipeline.files import from_jsonl, to_json, to_jsonl
from icon2_rt.pipeline.folder import RAN, Artifact, RunFolder
from icon2_rt.pipeline.functions import load_function
from icon2_rt.pipeline.instructions import RARE, REASONS, Instruction, read_instructions, synthesise, without_duplicates
from icon2_rt.pipeline.judges import Judge, load_judge
from icon2_rt.pipeline.loading import check_directions, read_directions, system_tokens
from icon2_rt.pipeline.pairs import Kept, Strengths, decode, n_records, residual_profile
from icon2_rt.pipeline.templates import ChatFrame
from icon2_rt.steering import DirectionSet

if TYPE_CHECKING:
    from icon2_rt import Runtime

# How many instructions the mean residual norm is taken over; it varies by a few per cent between instructions.
NORM_SAMPLE = 64

T = TypeVar("T")

Watch = Callable[[str, int, int], None]  # step, done, total


def silent(step: str, done: int, total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Job:
    """What every step needs. ``bands``: the blocks that may be steered, by the text that names them in the config (more
    than one where a calibration chooses); ``room``: the most tokens of an instruction's chat."""

    config: RunConfig
    folder: RunFolder
    rt: Runtime
    frame: ChatFrame
    eos: tuple[int, ...]
    bands: Mapping[str, tuple[int, ...]]
    room: int
    watch: Watch

    def write(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        inputs: Sequence[Artifact] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """:meth:`RunFolder.write`, with what it cost: counts among its facts, seconds and memory in the log. How much
        steering acted, and which code ran, are facts too."""
        work = self.rt.usage.take()
        peak = costs.peak_memory(self.rt.device)
        for step, done in work.items():
            self.folder.log("work", artifact=name, step=step, seconds=round(done.seconds, 4), peak_bytes=peak)
        cost = {step: done.counts() for step, done in work.items() if any(done.counts().values())}
        given = {**(facts or {}), "cost": cost, RAN: acted.facts(work)}
        return self.folder.write(name, files, inputs=inputs, facts=given)


@dataclass(frozen=True)
class Scored:
    """D_raw: clean instructions, their projections ``[n, m, n_layers]``, and the criteria that some came with."""

    instructions: list[Instruction]
    projections: Tensor
    given: list[str | None]


def feature_instructions(job: Job) -> tuple[Artifact | None, list[Instruction]]:
    """D_feat: what the directions are extracted from, and the calibration's held-out instructions."""
    config, name, path = job.config.directions, "features", "features.jsonl"
    if config.file is not None and not job.config.calibrates:
        return None, []
    artifact = job.folder.finished(name)
    if artifact is None:
        job.watch("feature instructions", 0, config.features)
        job.rt.usage.begin("features")
        # They are read under the system prompts, and a calibration scores whole responses under them.
        room = job.room - system_tokens(job.rt, job.frame, job.config.resolved_criteria())
        if config.features_file is not None:
            given = [instruction for instruction, _ in read_instructions(config.features_file)]
            drawn, counts = _those_that_fit(job, given, room)
        else:
            drawn, counts = synthesise(
                job.rt, job.frame, range(config.features), job.config.instructions, job.config.seed, room
            )
        features, counts["duplicate"] = without_duplicates(drawn)
        if len(features) < 2:
            raise ValueError(
                f"only {len(features)} usable feature instructions came of {counts['drawn']} ({_dropped(counts)}); "
                f"directions need at least 2: raise directions.features, or give directions.features_file"
            )
        artifact = job.write(name, {path: to_lines(features)}, facts={"counts": _counts(counts, len(features))})
    job.watch("feature instructions", config.features, config.features)
    return artifact, _from_lines(job.folder.read(path), path)


def directions(
    job: Job, features: Artifact | None, feature_list: Sequence[Instruction]
) -> tuple[Artifact, DirectionSet]:
    """Step 1, or the directions of ``directions.file``; a copy lies in the run folder either way."""
    name, path = "directions", "directions.safetensors"
    inputs = [features] if features else []
    artifact = job.folder.finished(name, inputs)
    if artifact is None:
        if job.config.directions.file is not None:
            made = read_directions(job.config.directions.file, job.rt.spec.n_layers)
            check_directions(made, job.rt.spec.n_layers, job.rt.spec.hidden_size, job.bands)
        else:
            criteria = job.config.resolved_criteria()
            job.rt.usage.begin("directions")
            job.watch("directions", 0, len(criteria))
            made = extract(
                job.rt,
                job.frame,
                criteria,
                feature_list,
                job.config.directions.method,
                lambda done: job.watch("directions", done, len(criteria)),
            )
        artifact = job.write(name, {path: _direction_bytes(made)}, inputs=inputs)
    job.watch("directions", 1, 1)
    return artifact, DirectionSet.load(job.folder.path / path)


def instructions(
    job: Job, directions: Artifact | None, direction_set: DirectionSet | None
) -> tuple[list[Artifact], Scored]:
    """Step 2a, or the instructions of ``instructions.file``: D_raw by shards, each with its projections.

    Without directions (a baseline has none) there are no projections: ``[n, 0, n_layers]``.
    """
    config = job.config.instructions
    inputs = [] if directions is None else [directions]
    given: dict[int, Mapping[str, Any]] = {}
    work: Sequence[Any]  # instructions, or the ids of draws
    if config.file is not None:
        read = read_instructions(config.file)
        given = {instruction.id: record for instruction, record in read}
        work = [instruction for instruction, _ in read]
    else:
        first = job.config.directions.features  # the draws before it are the feature instructions
        work = range(first, first + config.draws)
    room = job.room
    if job.config.filter.scale == "contrast" or direction_set is None:  # they are read under the system prompts too
        room -= system_tokens(job.rt, job.frame, job.config.resolved_criteria())
    artifacts: list[Artifact] = []
    found: list[Instruction] = []
    projections: list[Tensor] = []
    for start in range(0, len(work), config.shard_size):
        job.watch("instructions", start, len(work))
        number = len(artifacts)
        name, stem = f"instructions-{number:05d}", f"instructions/shard-{number:05d}"
        artifact = job.folder.finished(name, inputs)
        if artifact is None:
            job.rt.usage.begin("synthesis")
            shard: Sequence[Any] = work[start : start + config.shard_size]
            if config.file is not None:
                drawn, counts = _those_that_fit(job, shard, room)
            else:
                drawn, counts = synthesise(job.rt, job.frame, shard, config, job.config.seed, room)
            projected = torch.empty(len(drawn), len(direction_set or ()), job.rt.spec.n_layers)
            if drawn and direction_set is not None:
                job.rt.usage.begin("scoring")
                projected = _project(job, drawn, direction_set)
            files = {f"{stem}.jsonl": to_lines(drawn), f"{stem}.safetensors": _tensor_bytes(projected)}
            facts = {"counts": _counts(counts, len(drawn))}
            artifact = job.write(name, files, inputs=inputs, facts=facts)
        artifacts.append(artifact)
        found += _from_lines(job.folder.read(f"{stem}.jsonl"), stem)
        projections.append(_tensor(job.folder.read(f"{stem}.safetensors")))
    job.watch("instructions", len(work), len(work))
    criteria = [given.get(instruction.id, {}).get("criterion") for instruction in found]
    return artifacts, Scored(found, torch.cat(projections), criteria)


def _project(job: Job, instructions: Sequence[Instruction], direction_set: DirectionSet) -> Tensor:
    """What the filter's scale judges by: ``[n, m, n_layers]``."""
    if job.config.filter.scale == "contrast":
        criteria = job.config.resolved_criteria()
        return consistency.contrasts(job.rt, job.frame, instructions, direction_set, criteria)
    return consistency.projections(job.rt, job.frame, instructions, direction_set)


def _those_that_fit(job: Job, given: Sequence[Instruction], room: int) -> tuple[list[Instruction], Counter[str]]:
    """Given instructions pass the one rule that the model itself sets."""
    fitting = [item for item in given if job.frame.length(job.frame.messages(item.text)) <= room]
    return fitting, Counter({"drawn": len(given), "too long": len(given) - len(fitting)})


def distinct(
    raw: Sequence[Artifact], scored: Scored, seen: Sequence[Instruction] = ()
) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions without duplicates over all shards, and the counts of the whole.

    Raises:
        ValueError: none is left.
    """
    unique, duplicates = without_duplicates(scored.instructions, seen, scored.given)
    counts = sum((Counter(a.facts["counts"]) for a in raw), Counter())
    counts["duplicate"] = duplicates
    if not unique:
        raise ValueError(
            f"no usable instruction came of {counts['drawn']} ({_dropped(counts)}): raise instructions.draws or "
            f"instructions.max_new_tokens, or give instructions.file"
        )
    return unique, _counts(counts, len(unique))


def keep(
    job: Job, raw: Sequence[Artifact], scored: Scored, features: Sequence[Instruction], direction_set: DirectionSet
) -> tuple[Artifact, list[Kept]]:
    """Step 2b: drop duplicates over all shards and keep the share that agrees best with a direction."""
    name, path = "consistency", "kept.jsonl"
    artifact = job.folder.finished(name, raw)
    if artifact is None:
        # What the model wrote for the directions and the calibration is not used twice; a user's own files are theirs.
        seen = features if job.config.instructions.file is None else ()
        row_of = {instruction.id: row for row, instruction in enumerate(scored.instructions)}
        unique, counts = distinct(raw, scored, seen)
        rows = [row_of[instruction.id] for instruction in unique]
        verdict = _judge(job, unique, scored.projections[rows], direction_set)
        verdict = consistency.with_given(verdict, [scored.given[row] for row in rows])
        chosen = consistency.select(verdict, job.config.filter)
        if not chosen:
            raise ValueError(f"filter.margin: no instruction reaches {job.config.filter.margin}; lower it")
        kept = [_kept(unique[i], verdict, i) for i in chosen]
        facts = {
            "counts": {**counts, "kept": len(kept)},
            "kept_share": len(kept) / len(unique),
            "histogram": verdict.histogram,
            "kept_histogram": {n: sum(item.criterion == n for item in kept) for n in verdict.names},
            "scores": {n: _spread(verdict.scores[:, column].tolist()) for column, n in enumerate(verdict.names)},
            "score": _spread(verdict.score.tolist()),
            "distributions": {
                "score": health.histograms({"clean": verdict.score.tolist(), "kept": [item.score for item in kept]}),
                "by_criterion": health.histograms(
                    {n: verdict.scores[:, column].tolist() for column, n in enumerate(verdict.names)}
                ),
            },
            "warnings": consistency.warnings(verdict),
        }
        artifact = job.write(name, {path: to_jsonl(item.to_dict() for item in kept)}, inputs=raw, facts=facts)
    job.watch("consistency", 1, 1)
    return artifact, [Kept.from_dict(record) for record in from_jsonl(job.folder.read(path), path)]


def _judge(
    job: Job, instructions: Sequence[Instruction], projected: Tensor, direction_set: DirectionSet
) -> consistency.Consistency:
    name = job.config.filter.scale
    scale = name if name in SCALES else load_function(name, "filter.scale")
    return consistency.judge(projected, direction_set.names, scale, [item.text for item in instructions])


def _kept(instruction: Instruction, verdict: consistency.Consistency, row: int) -> Kept:
    margin = float(verdict.margin[row]) if len(verdict.names) > 1 else None
    scores = dict(zip(verdict.names, verdict.scores[row].tolist(), strict=True))
    return Kept(instruction, verdict.names[int(verdict.best[row])], float(verdict.score[row]), margin, scores)


def strengths(
    job: Job, directions: Artifact, sample: Sequence[Instruction], direction_set: DirectionSet
) -> tuple[Artifact, Strengths]:
    """γ⁺ and γ⁻, as given or from a calibration by dose; ``sample`` are instructions that are not used for pairs."""
    config, name, path = job.config, "strengths", "strengths.json"
    artifact = job.folder.finished(name, [directions])
    if artifact is None:
        job.watch("strengths", 0, 1)
        job.rt.usage.begin("strengths")
        states = job.rt.hidden_states([job.frame.messages(item.text) for item in sample[:NORM_SAMPLE]])
        norms = health.residual_norms(states)
        facts: dict[str, Any] = {"residual_norms": norms}
        if config.calibrates:
            made, facts["calibration"] = _calibrated(job, sample, direction_set, norms)
        else:
            [layers] = job.bands.values()
            band = [norms[i] for i in layers]
            unit = fmean(band) if config.pairs.unit == "dose" else 1.0
            positive, negative = (
                {name: unit * value for name, value in by_criterion.items()}
                for by_criterion in given_strengths(config.pairs, direction_set.names)
            )
            made = Strengths(positive, negative, layers, residual_profile(band, config.pairs.unit))
        facts |= {
            "positive": dict(made.positive),
            "negative": dict(made.negative),
            "layers": list(made.layers),
            "profile": list(made.profile),
            "dose": health.doses(made, norms, direction_set),
        }
        artifact = job.write(name, {path: to_json(facts)}, inputs=[directions], facts=facts)
    job.watch("strengths", 1, 1)
    facts = dict(artifact.facts)
    return artifact, Strengths(facts["positive"], facts["negative"], tuple(facts["layers"]), tuple(facts["profile"]))


def _calibrated(
    job: Job, sample: Sequence[Instruction], direction_set: DirectionSet, norms: Sequence[float]
) -> tuple[Strengths, dict[str, Any]]:
    """The strengths that a calibration chooses, and what it has to say about them."""
    config = job.config.calibration
    assert config is not None
    items = _with_criteria(job, sample[: config.instructions], direction_set)
    judge = _quality(job, items)
    ladders = calibrate.climb(
        job.rt, job.frame, items, direction_set, job.bands, norms, judge, config, job.config.pairs, job.eos,
        job.config.seed,
    )  # fmt: skip
    rule = calibrate.Rule.of(config)
    choices = [calibrate.choose(ladder, rule, job.config.seed) for ladder in ladders]
    chosen = calibrate.best(choices, rule)
    by_name = dict.fromkeys(direction_set.names, chosen)
    if config.per_criterion:
        by_name = calibrate.per_criterion(chosen, items, direction_set.names, rule, job.config.seed)
    made = Strengths(
        {name: choice.positive.gamma for name, choice in by_name.items()},
        {name: choice.negative.gamma for name, choice in by_name.items()},
        chosen.ladder.layers,
        chosen.ladder.profile,
    )
    facts = {
        "quality": config.judge or config.quality,
        "instructions": len(items),
        **chosen.to_dict(),
        "bands": [choice.to_dict() for choice in choices],
        "per_criterion": {n: choice.to_dict() for n, choice in by_name.items()} if config.per_criterion else {},
    }
    return made, facts


def _quality(job: Job, items: Sequence[Kept]) -> Judge | None:
    """What says how good the calibration's responses are; None for the projection, which depends on the band."""
    config = job.config.calibration
    assert config is not None
    if config.judge is not None:
        return load_judge(config.judge, config.label, job.rt.device, "calibration.judge")
    if config.quality == "projection":
        return None
    return quality.agreement(job.rt, job.frame, job.config.resolved_criteria(), [item.criterion for item in items])


def _with_criteria(job: Job, sample: Sequence[Instruction], direction_set: DirectionSet) -> list[Kept]:
    """Instructions with the criterion that the run's own filter would give them."""
    verdict = _judge(job, sample, _project(job, sample, direction_set), direction_set)
    return [_kept(instruction, verdict, row) for row, instruction in enumerate(sample)]


def data_shards(job: Job, items: Sequence[T]) -> tuple[list[Sequence[T]], list[str]]:
    """What is answered, cut into shards, and the file of each.

    Raises:
        ValueError: the data folder holds files that this run does not write.
    """
    size = job.config.pairs.shard_size
    shards = [items[i : i + size] for i in range(0, len(items), size)]
    paths = [f"data/shard-{number:05d}.parquet" for number in range(len(shards))]
    if strangers := job.folder.strangers("data", paths):
        raise ValueError(
            f"out: {job.folder.path}/data holds {', '.join(strangers[:3])}, which this run did not write and a dataset "
            f"loader would read along; move it away"
        )
    return shards, paths


def pairs(
    job: Job, inputs: Sequence[Artifact], kept: Sequence[Kept], direction_set: DirectionSet, strengths: Strengths
) -> list[Artifact]:
    """Step 3 by shards: a shard is a fixed list of kept instructions, decoded in one call."""
    shards, paths = data_shards(job, kept)
    artifacts = []
    done = 0
    for number, (shard, path) in enumerate(zip(shards, paths, strict=True)):
        job.watch("pairs", done, len(kept))
        name = f"pairs-{number:05d}"
        artifact = job.folder.finished(name, inputs)
        if artifact is None:
            job.rt.usage.begin("pairs")
            base = done
            records = decode(
                job.rt,
                job.frame,
                shard,
                direction_set,
                strengths,
                job.config.pairs,
                job.eos,
                job.config.seed,
                lambda n, base=base: job.watch("pairs", base + n, len(kept)),  # type: ignore[misc]
            )
            records = dataset.rendered_with(records, job.frame.template.variables)
            facts = {"pairs": len(records)}
            lost = n_records(shard, direction_set, job.config.pairs) - len(records)
            if lost:
                facts["not_finite"] = lost
            artifact = job.write(name, {path: dataset.to_parquet(records)}, inputs=inputs, facts=facts)
            job.folder.log("shard", name=name)
        artifacts.append(artifact)
        done += len(shard)
    job.watch("pairs", len(kept), len(kept))
    return artifacts


def effect(
    job: Job,
    directions: Artifact,
    shards: Sequence[Artifact],
    direction_set: DirectionSet,
    strengths: Strengths,
) -> dict[str, Any]:
    """What the unsteered model makes of a sample of the pairs, beside responses of its own."""
    name, path, inputs = "effect", "effect.json", [directions, *shards]
    if job.folder.finished(name, inputs) is None:
        job.watch("effect", 0, 1)
        job.rt.usage.begin("checks")
        found = measure_effect(
            job.rt,
            job.frame,
            _sampled(job, shards),
            direction_set,
            job.config.resolved_criteria(),
            strengths.layers,
            job.config.pairs,
            job.eos,
            job.config.seed,
        )
        job.write(name, {path: to_json(found)}, inputs=inputs)
    job.watch("effect", 1, 1)
    return json.loads(job.folder.read(path))


def _sampled(job: Job, shards: Sequence[Artifact]) -> list[dict[str, Any]]:
    """Records of the dataset, evenly spaced; only the shards that hold one are read."""
    wanted = health.spaced(sum(shard.facts["pairs"] for shard in shards), SAMPLE)
    found, first = [], 0
    for shard in shards:
        mine = [place - first for place in wanted if first <= place < first + shard.facts["pairs"]]
        if mine:
            [path] = shard.files
            records = dataset.from_parquet(job.folder.read(path))
            found += [records[place] for place in mine]
        first += shard.facts["pairs"]
    return found


def to_lines(items: Sequence[Instruction]) -> bytes:
    """Instructions as JSON lines, as :func:`~icon2_rt.pipeline.instructions.read_instructions` reads them."""
    return to_jsonl({"id": item.id, "instruction": item.text} for item in items)


def _from_lines(data: bytes, name: str) -> list[Instruction]:
    return [Instruction(record["id"], record["instruction"]) for record in from_jsonl(data, name)]


def _counts(counts: Mapping[str, int], clean: int) -> dict[str, int]:
    """drawn = clean + what each rule dropped."""
    reasons = [reason for reason in REASONS if counts.get(reason) or reason not in RARE]
    return {"drawn": counts["drawn"], **{reason: counts.get(reason, 0) for reason in reasons}, "clean": clean}


def _dropped(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts.get(reason)) or "none dropped"


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "mean": fmean(values), "max": max(values)}


def _direction_bytes(made: DirectionSet) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "directions.safetensors"
        made.save(path)
        return path.read_bytes()


def _tensor_bytes(projected: Tensor) -> bytes:
    from safetensors.torch import save

    return save({"projections": projected.contiguous()})


def _tensor(data: bytes) -> Tensor:
    from safetensors.torch import load

    return load(data)["projections"]
