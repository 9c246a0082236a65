"""A whole run in a folder: directions, instructions, consistency, strengths, pairs, dataset, summary.

Every piece of work is an artifact of the :class:`~icon2_rt.pipeline.folder.RunFolder`. A run that is started again with
the same command takes the finished ones from there and makes the rest, so that it ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from icon2_rt.pipeline import calibrate, consistency, dataset, health
from icon2_rt.pipeline.config import PAPER_STRENGTHS, RunConfig, controlled_layers
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.directions import extract
from icon2_rt.pipeline.environment import machine, versions
from icon2_rt.pipeline.files import from_jsonl, sha256, to_json, to_jsonl
from icon2_rt.pipeline.folder import Artifact, RunFolder
from icon2_rt.pipeline.instructions import (
    REASONS,
    Instruction,
    instruction_sampling,
    read_instructions,
    synthesise,
    without_duplicates,
)
from icon2_rt.pipeline.pairs import Kept, Strengths, decode, response_sampling
from icon2_rt.pipeline.sampling import stage_seed
from icon2_rt.pipeline.templates import ChatFrame, chat_frame
from icon2_rt.steering import DirectionSet

if TYPE_CHECKING:
    from icon2_rt import Runtime

# How many instructions the mean residual norm is taken over; it varies by a few per cent between instructions.
NORM_SAMPLE = 64

Watch = Callable[[str, int, int], None]  # step, done, total


def silent(step: str, done: int, total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class RunResult:
    """Where a finished run lies and what it says about itself (``summary.json`` and ``manifest.json``)."""

    path: Path
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    seconds: Mapping[str, float]

    def records(self) -> Iterator[dict[str, Any]]:
        """The pairs, in order, shard by shard."""
        for path in sorted((self.path / "data").glob("*.parquet")):
            yield from dataset.from_parquet(path.read_bytes())


@dataclass
class _Run:
    """What every step needs."""

    config: RunConfig
    folder: RunFolder
    rt: Runtime
    frame: ChatFrame
    eos: tuple[int, ...]
    layers: tuple[int, ...]
    room: int
    watch: Watch


def model_path(name: str) -> str:
    """ "tiny" is the model that ships with the package; anything else is a path or a hub id already."""
    if name == "tiny":
        from icon2_rt import tiny

        return str(tiny.path())
    return name


def load_runtime(config: RunConfig, as_on: Mapping[str, Any] | None = None) -> Runtime:
    """The runtime that a config asks for.

    ``as_on`` is the ``machine`` part of a manifest: what the config leaves to circumstances (KV memory by what is free,
    threads) is then set as it was, because the schedule of a decode depends on it.
    """
    from icon2_rt import Runtime

    options, as_on = config.runtime, as_on or {}
    threads = options.threads or as_on.get("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    extra: dict[str, Any] = {"dtype": options.dtype}
    if options.revision is not None:
        extra["revision"] = options.revision
    return Runtime.from_pretrained(
        model_path(config.model),
        device=options.device,
        backend=options.backend,
        kv_memory=as_on.get("kv_bytes", options.kv_memory),
        max_rows=options.max_rows,
        page_size=options.page_size,
        prefill_chunk=options.prefill_chunk,
        **extra,
    )


def run(config: RunConfig, out: str | Path, *, watch: Watch = silent, rt: Runtime | None = None) -> RunResult:
    """Do everything that ``config`` asks for, or what is left of it, in the folder ``out``.

    Args:
        config: as checked by :meth:`RunConfig.load` or :meth:`RunConfig.from_dict`.
        out: a new or empty folder, or one that an earlier call with the same config has begun.
        watch: called with a step's name, how much of it is done, and of how much.
        rt: a runtime that is loaded already; by default the config's model is loaded.

    Raises:
        ValueError: settings that cannot work with this model; a folder that belongs to another run, or was made with
            other settings, versions or on another machine: what differs is listed.
        OSError: the folder cannot be written. What was finished stays, and the same call continues.
    """
    config = RunConfig.from_dict(config.to_dict())  # one made in Python is checked like one from a file
    seconds: dict[str, float] = {}
    with RunFolder(out) as folder:
        before = folder.manifest()
        identity: dict[str, Any] = {"config": config.to_dict(), "files": _input_files(config)}
        if before is not None:
            _same_identity(before["identity"], identity, folder.path)
        watch("model", 0, 1)
        started = perf_counter()
        if rt is None:
            rt = load_runtime(config, before["identity"].get("machine") if before is not None else None)
        seconds["model"] = perf_counter() - started
        watch("model", 1, 1)
        eos = end_tokens(rt)
        frame = chat_frame(rt.tokenizer, eos)
        layers = tuple(controlled_layers(config.pairs.layers, rt.spec.n_layers))
        room = check_room(rt, frame, config)
        identity |= {
            "model": {
                "fingerprint": rt.fingerprint,
                "n_layers": rt.spec.n_layers,
                "hidden_size": rt.spec.hidden_size,
                "vocab_size": rt.spec.vocab_size,
            },
            "chat_template": frame.to_dict(),
            "versions": versions(),
            "machine": machine(rt),
        }
        if before is not None:
            _same_identity(before["identity"], identity, folder.path)
        manifest = before or _manifest(config, identity, frame, layers, eos)
        folder.write_manifest(manifest)
        folder.log("resumed" if before else "started")
        state = _Run(config, folder, rt, frame, eos, layers, room, watch)

        def timed(step: str, work: Callable[[], Any]) -> Any:
            begun = perf_counter()
            value = work()
            seconds[step] = perf_counter() - begun
            folder.log(step, seconds=round(seconds[step], 3))
            return value

        features, feature_list = timed("feature instructions", lambda: _features(state))
        directions, direction_set = timed("directions", lambda: _directions(state, features, feature_list))
        raw, instructions = timed("instructions", lambda: _instructions(state, directions, direction_set))
        kept, kept_list = timed("consistency", lambda: _filter(state, raw, instructions, feature_list, direction_set))
        strong, strengths = timed(
            "strengths", lambda: _strengths(state, directions, feature_list or instructions, direction_set)
        )
        shards = timed("pairs", lambda: _pairs(state, [directions, kept, strong], kept_list, direction_set, strengths))
        summary = _summary(state, direction_set, features, kept, strong, strengths, shards)
        folder.write_result("summary.json", to_json(summary))
        folder.write_result("README.md", _card(config, summary).encode())
        manifest = {**manifest, "counts": summary["counts"], "finished": True}
        folder.write_manifest(manifest)
        folder.log("finished")
        return RunResult(folder.path, summary, manifest, seconds)


def end_tokens(rt: Runtime) -> tuple[int, ...]:
    """The tokens that end a response: the checkpoint's own, else the tokenizer's."""
    ids = rt.generation_config.eos_token_id
    if ids is None:
        ids = rt.tokenizer.eos_token_id if rt.tokenizer is not None else None
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def check_room(rt: Runtime, frame: ChatFrame, config: RunConfig) -> int:
    """How many tokens the chat of an instruction may have, so that a whole response fits behind it.

    Raises:
        ValueError: a token limit that the model's positions cannot hold.
    """
    positions, shortest = rt.spec.max_length, len(rt.encode(frame.messages("a")))
    for key, limit, before in (
        ("instructions.max_new_tokens", config.instructions.max_new_tokens, len(frame.pre_query)),
        ("pairs.max_new_tokens", config.pairs.max_new_tokens, shortest),
    ):
        if before + limit > positions:
            raise ValueError(
                f"{key}: {limit} tokens do not fit: the model has {positions} positions, and its chat template alone "
                f"takes {before}; at most {positions - before}"
            )
    return positions - config.pairs.max_new_tokens


def system_tokens(rt: Runtime, frame: ChatFrame, criteria: Mapping[str, Criterion]) -> int:
    """How many tokens the longest of the contrastive system prompts adds to a chat."""
    bare = len(rt.encode(frame.messages("a")))
    prompts = [text for criterion in criteria.values() for text in (criterion.positive, criterion.negative)]
    return max(len(rt.encode(frame.messages("a", system=text))) for text in prompts) - bare


def _input_files(config: RunConfig) -> dict[str, str]:
    """Checksums of the files that the config names: another content is another run."""
    named = {
        "directions.file": config.directions.file,
        "directions.features_file": config.directions.features_file,
        "instructions.file": config.instructions.file,
    }
    return {key: sha256(Path(path).read_bytes()) for key, path in named.items() if path is not None}


def _same_identity(then: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuse to mix two runs in one folder; only the parts that ``now`` knows are compared."""
    differences = []
    for part in now:
        old, new = _flat(then.get(part, {})), _flat(now[part])
        for key in [*old, *(k for k in new if k not in old)]:
            if old.get(key) != new.get(key):
                name = key if part == "config" else f"{part}.{key}"
                differences.append(f"  {name}: {_brief(old.get(key))} there, {_brief(new.get(key))} now")
    if differences:
        raise ValueError(
            f"out: the run in {path} was made with other settings; continuing would mix two runs. Name a new folder, "
            f"or restore what differs:\n" + "\n".join(differences)
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _brief(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _manifest(
    config: RunConfig, identity: Mapping[str, Any], frame: ChatFrame, layers: Sequence[int], eos: Sequence[int]
) -> dict[str, Any]:
    """Everything that decides the bytes, written before the first of them."""
    notes = []
    if frame.default_system is not None:
        notes.append(
            f"the chat template puts in a system prompt of its own when none is given ({frame.default_system!r}): it "
            f"is there in instructions, scores and pairs, and the contrastive prompts replace it for the directions"
        )
    if frame.system == "user":
        notes.append("the chat template has no system turn: the contrastive prompts stand in front of the user's text")
    criteria = {} if config.directions.file else config.resolved_criteria()
    return {
        "format": 1,
        "identity": dict(identity),
        "criteria": {name: dataclasses.asdict(criterion) for name, criterion in criteria.items()},
        "controlled_layers": list(layers),
        "seeds": {
            "run": config.seed,
            **{stage: stage_seed(config.seed, stage) for stage in ("instructions", "calibration", "pairs")},
        },
        "sampling": {
            "instructions": instruction_sampling(config.instructions, frame).to_diff_dict(),
            "pairs": response_sampling(config.pairs, eos).to_diff_dict(),
        },
        "notes": notes,
        "finished": False,
    }


def _features(run: _Run) -> tuple[Artifact | None, list[Instruction]]:
    """D_feat: what the directions are extracted from, and the calibration's held-out instructions."""
    config, name, path = run.config.directions, "features", "features.jsonl"
    if config.file is not None:
        return None, []
    artifact = run.folder.finished(name)
    if artifact is None:
        run.watch("feature instructions", 0, config.features)
        if config.features_file is not None:
            drawn = [instruction for instruction, _ in read_instructions(config.features_file)]
            counts = Counter(drawn=len(drawn))
        else:
            # They are read under the system prompts, and a calibration scores whole responses under them.
            room = run.room - system_tokens(run.rt, run.frame, run.config.resolved_criteria())
            drawn, counts = synthesise(
                run.rt, run.frame, range(config.features), run.config.instructions, run.config.seed, room
            )
        features, counts["duplicate"] = without_duplicates(drawn)
        if len(features) < 2:
            raise ValueError(
                f"only {len(features)} usable feature instructions came of {counts['drawn']} ({_dropped(counts)}); "
                f"directions need at least 2: raise directions.features, or give directions.features_file"
            )
        artifact = run.folder.write(name, {path: _to_lines(features)}, facts=_counts(counts, len(features)))
    run.watch("feature instructions", config.features, config.features)
    return artifact, _from_lines(run.folder.read(path), path)


def _directions(
    run: _Run, features: Artifact | None, feature_list: Sequence[Instruction]
) -> tuple[Artifact, DirectionSet]:
    name, path = "directions", "directions.safetensors"
    inputs = [features] if features else []
    artifact = run.folder.finished(name, inputs)
    if artifact is None:
        if run.config.directions.file is not None:
            found = DirectionSet.load(run.config.directions.file)
            _check_directions(run, found)
        else:
            criteria = run.config.resolved_criteria()
            run.watch("directions", 0, len(criteria))
            found = extract(
                run.rt,
                run.frame,
                criteria,
                feature_list,
                run.config.directions.method,
                lambda done: run.watch("directions", done, len(criteria)),
            )
        artifact = run.folder.write(name, {path: _saved(found)}, inputs=inputs)
    run.watch("directions", 1, 1)
    return artifact, DirectionSet.load(run.folder.path / path)


def _check_directions(run: _Run, found: DirectionSet) -> None:
    spec = run.rt.spec
    for d in found:
        if (d.n_layers, d.hidden_size) != (spec.n_layers, spec.hidden_size):
            raise ValueError(
                f"directions.file: {d.name!r} has {d.n_layers} blocks of size {d.hidden_size}, the model has "
                f"{spec.n_layers} of size {spec.hidden_size}: it was made on another model"
            )
        if not set(run.layers) & set(d.layers):
            raise ValueError(f"pairs.layers: direction {d.name!r} has no vector on blocks {list(run.layers)}")


def _instructions(
    run: _Run, directions: Artifact, direction_set: DirectionSet
) -> tuple[list[Artifact], list[tuple[Instruction, torch.Tensor, str | None]]]:
    """D_raw by shards, each with the projections of its instructions: (instruction, [m, n_layers], given criterion)."""
    config = run.config.instructions
    if config.file is not None:
        given = read_instructions(config.file)
        _check_given_criteria(given, direction_set)
        shards: list[Any] = [given[i : i + config.shard_size] for i in range(0, len(given), config.shard_size)]
        total = len(given)
    else:
        first = run.config.directions.features  # the draws before it are the feature instructions
        ids = range(first, first + config.draws)
        shards = [ids[i : i + config.shard_size] for i in range(0, config.draws, config.shard_size)]
        total = config.draws
    artifacts: list[Artifact] = []
    found: list[tuple[Instruction, torch.Tensor, str | None]] = []
    done = 0
    for number, shard in enumerate(shards):
        run.watch("instructions", done, total)
        name, stem = f"instructions-{number:05d}", f"instructions/shard-{number:05d}"
        artifact = run.folder.finished(name, [directions])
        if artifact is None:
            if config.file is not None:
                drawn, counts = [instruction for instruction, _ in shard], Counter(drawn=len(shard))
            else:
                drawn, counts = synthesise(run.rt, run.frame, shard, config, run.config.seed, run.room)
            projected = (
                consistency.projections(run.rt, run.frame, drawn, direction_set)
                if drawn
                else torch.empty(0, len(direction_set), run.rt.spec.n_layers)
            )
            files = {f"{stem}.jsonl": _to_lines(drawn), f"{stem}.safetensors": _tensor_bytes(projected)}
            artifact = run.folder.write(name, files, inputs=[directions], facts=_counts(counts, len(drawn)))
        instructions = _from_lines(run.folder.read(f"{stem}.jsonl"), stem)
        projected = _tensor(run.folder.read(f"{stem}.safetensors"))
        criteria = [record.get("criterion") for _, record in shard] if config.file else [None] * len(instructions)
        found += zip(instructions, projected, criteria, strict=True)
        artifacts.append(artifact)
        done += len(shard)
    run.watch("instructions", total, total)
    return artifacts, found


def _check_given_criteria(given: Sequence[tuple[Instruction, Mapping[str, Any]]], direction_set: DirectionSet) -> None:
    for instruction, record in given:
        criterion = record.get("criterion")
        if criterion is not None and criterion not in direction_set.names:
            raise ValueError(
                f"instructions.file: instruction {instruction.id} wants the criterion {criterion!r}; "
                f"there are {direction_set.names}"
            )


def _filter(
    run: _Run,
    raw: Sequence[Artifact],
    instructions: Sequence[tuple[Instruction, torch.Tensor, str | None]],
    features: Sequence[Instruction],
    direction_set: DirectionSet,
) -> tuple[Artifact, list[Kept]]:
    """Drop duplicates over all shards and keep the share that agrees best."""
    name, path = "consistency", "kept.jsonl"
    artifact = run.folder.finished(name, raw)
    if artifact is None:
        by_id = {instruction.id: (tensor, given) for instruction, tensor, given in instructions}
        unique, duplicates = without_duplicates((instruction for instruction, _, _ in instructions), features)
        counts = sum((Counter(a.facts["counts"]) for a in raw), Counter())
        counts["duplicate"] = duplicates
        if not unique:
            raise ValueError(
                f"no usable instruction came of {counts['drawn']} ({_dropped(counts)}): raise instructions.draws or "
                f"instructions.max_new_tokens, or give instructions.file"
            )
        projected = torch.stack([by_id[instruction.id][0] for instruction in unique])
        verdict = consistency.judge(projected, direction_set.names, run.config.filter.scale)
        verdict = consistency.with_given(verdict, [by_id[instruction.id][1] for instruction in unique])
        rows = consistency.select(verdict, run.config.filter)
        if not rows:
            raise ValueError(f"filter.margin: no instruction reaches {run.config.filter.margin}; lower it")
        kept = [_kept(unique[row], verdict, row) for row in rows]
        lines = [
            {**item.to_dict(), "scores": dict(zip(verdict.names, verdict.scores[row].tolist(), strict=True))}
            for item, row in zip(kept, rows, strict=True)
        ]
        facts = {
            "counts": {**_counts(counts, len(unique))["counts"], "kept": len(kept)},
            "kept_share": len(kept) / len(unique),
            "histogram": verdict.histogram,
            "kept_histogram": {n: sum(item.criterion == n for item in kept) for n in verdict.names},
            "scores": {n: _spread(verdict.scores[:, column].tolist()) for column, n in enumerate(verdict.names)},
            "score": _spread(verdict.score.tolist()),
            "warnings": consistency.warnings(verdict),
        }
        artifact = run.folder.write(name, {path: to_jsonl(lines)}, inputs=raw, facts=facts)
    run.watch("consistency", 1, 1)
    return artifact, [Kept.from_dict(record) for record in from_jsonl(run.folder.read(path), path)]


def _kept(instruction: Instruction, verdict: consistency.Consistency, row: int) -> Kept:
    margin = float(verdict.margin[row]) if len(verdict.names) > 1 else None
    return Kept(instruction, verdict.names[int(verdict.best[row])], float(verdict.score[row]), margin)


def _strengths(
    run: _Run,
    directions: Artifact,
    sample: Sequence[Any],
    direction_set: DirectionSet,
) -> tuple[Artifact, Strengths]:
    """γ⁺ and γ⁻: as given, or from a calibration by dose on the feature instructions."""
    config, name, path = run.config, "strengths", "strengths.json"
    artifact = run.folder.finished(name, [directions])
    if artifact is None:
        run.watch("strengths", 0, 1)
        texts = [item if isinstance(item, Instruction) else item[0] for item in sample]
        states = run.rt.hidden_states([run.frame.messages(item.text) for item in texts[:NORM_SAMPLE]])
        norms = health.residual_norms(states)
        facts: dict[str, Any] = {"residual_norms": norms}
        if config.calibration is None:
            given = (config.pairs.positive, config.pairs.negative)
            positive, negative = (
                paper if value is None else value for value, paper in zip(given, PAPER_STRENGTHS, strict=True)
            )
        else:
            items = _calibration_items(run, texts[: config.calibration.instructions], direction_set)
            rungs = calibrate.climb(
                run.rt,
                run.frame,
                items,
                direction_set,
                config.resolved_criteria(),
                run.layers,
                fmean(norms[i] for i in run.layers),
                config.calibration.doses,
                config.pairs,
                run.eos,
                config.seed,
            )
            calibration = calibrate.choose(rungs)
            positive, negative = calibration.positive.gamma, calibration.negative.gamma
            facts["calibration"] = calibration.to_dict()
        strengths = Strengths(positive, negative, run.layers)
        facts |= {**dataclasses.asdict(strengths), "dose": health.doses(strengths, norms)}
        artifact = run.folder.write(name, {path: to_json(facts)}, inputs=[directions], facts=facts)
    run.watch("strengths", 1, 1)
    facts = dict(artifact.facts)
    return artifact, Strengths(facts["positive"], facts["negative"], tuple(facts["layers"]))


def _calibration_items(run: _Run, features: Sequence[Instruction], direction_set: DirectionSet) -> list[Kept]:
    """Feature instructions with the criterion that the run's own filter would give them."""
    projected = consistency.projections(run.rt, run.frame, features, direction_set)
    verdict = consistency.judge(projected, direction_set.names, run.config.filter.scale)
    return [_kept(instruction, verdict, row) for row, instruction in enumerate(features)]


def _pairs(
    run: _Run, inputs: Sequence[Artifact], kept: Sequence[Kept], direction_set: DirectionSet, strengths: Strengths
) -> list[Artifact]:
    size = run.config.pairs.shard_size
    shards = [kept[i : i + size] for i in range(0, len(kept), size)]
    paths = [f"data/shard-{number:05d}.parquet" for number in range(len(shards))]
    if strangers := run.folder.strangers("data", paths):
        raise ValueError(
            f"out: {run.folder.path}/data holds {', '.join(strangers[:3])}, which this run did not write and a dataset "
            f"loader would read along; move it away"
        )
    artifacts = []
    done = 0
    for number, (shard, path) in enumerate(zip(shards, paths, strict=True)):
        run.watch("pairs", done, len(kept))
        name = f"pairs-{number:05d}"
        artifact = run.folder.finished(name, inputs)
        if artifact is None:
            base = done
            records = decode(
                run.rt,
                run.frame,
                shard,
                direction_set,
                strengths,
                run.config.pairs,
                run.eos,
                run.config.seed,
                lambda n, base=base: run.watch("pairs", base + n, len(kept)),  # type: ignore[misc]
            )
            artifact = run.folder.write(
                name, {path: dataset.to_parquet(records)}, inputs=inputs, facts={"pairs": len(records)}
            )
            run.folder.log("shard", name=name)
        artifacts.append(artifact)
        done += len(shard)
    run.watch("pairs", len(kept), len(kept))
    return artifacts


def _summary(
    run: _Run,
    direction_set: DirectionSet,
    features: Artifact | None,
    kept: Artifact,
    strong: Artifact,
    strengths: Strengths,
    shards: Sequence[Artifact],
) -> dict[str, Any]:
    """The health checks of the whole run, from the artifacts alone."""
    figures = []
    for shard in shards:
        for path in shard.files:
            figures += [health.without_text(record) for record in dataset.from_parquet(run.folder.read(path))]
    pairs = health.pair_health(figures)
    warnings = [
        *health.direction_warnings(direction_set, run.layers),
        *kept.facts["warnings"],
        *strong.facts.get("calibration", {}).get("notes", ()),
        *health.pair_warnings(pairs),
    ]
    return {
        "counts": {
            "features": dict(features.facts["counts"]) if features else None,
            "instructions": dict(kept.facts["counts"]),
            "pairs": pairs["pairs"],
            "shards": len(shards),
        },
        "directions": {
            "names": direction_set.names,
            "health": health.direction_health(direction_set),
            "cosines": health.similarities(direction_set),
        },
        "consistency": {
            "scale": run.config.filter.scale,
            **{key: kept.facts[key] for key in ("kept_share", "histogram", "kept_histogram", "scores", "score")},
        },
        "strengths": dict(strong.facts),
        "pairs": pairs,
        "warnings": warnings,
    }


def _card(config: RunConfig, summary: Mapping[str, Any]) -> str:
    pairs, strengths, counts = summary["pairs"], summary["strengths"], summary["counts"]["instructions"]
    how = "calibrated by dose on this model" if config.calibration is not None else "as given"
    lines = [
        f"Made by icon2_rt from `{config.model}`: no reward model, no judge, no human labels.",
        "",
        f"- {pairs['pairs']} pairs from {counts['kept']} instructions kept of {counts['drawn']} drawn",
        f"- criteria: {', '.join(f'{name} {n}' for name, n in pairs['per_criterion'].items())}",
        f"- strengths in residual units, {how}: γ⁺ {strengths['positive']:.4g}, γ⁻ {strengths['negative']:.4g}, "
        f"after blocks {strengths['layers'][0]} to {strengths['layers'][-1]} (0-based)",
        f"- identical pairs {pairs['identical']:.1%}, length ratio chosen/rejected {pairs['length_ratio']:.2f}, "
        f"cut off {pairs['chosen']['cut_off']:.1%} / {pairs['rejected']['cut_off']:.1%}",
    ]
    if summary["warnings"]:
        lines += ["", "Warnings:", "", *(f"- {warning}" for warning in summary["warnings"])]
    lines += ["", "`summary.json` has every figure, `manifest.json` what the run was made with."]
    return dataset.card("Steered preference pairs", "\n".join(lines))


def _counts(counts: Mapping[str, int], clean: int) -> dict[str, Any]:
    """drawn = clean + what each rule dropped."""
    return {"counts": {"drawn": counts["drawn"], **{r: counts.get(r, 0) for r in REASONS}, "clean": clean}}


def _dropped(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts.get(reason)) or "none dropped"


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "mean": fmean(values), "max": max(values)}


def _to_lines(instructions: Sequence[Instruction]) -> bytes:
    return to_jsonl({"id": item.id, "instruction": item.text} for item in instructions)


def _from_lines(data: bytes, name: str) -> list[Instruction]:
    return [Instruction(record["id"], record["instruction"]) for record in from_jsonl(data, name)]


def _saved(directions: DirectionSet) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "directions.safetensors"
        directions.save(path)
        return path.read_bytes()


def _tensor_bytes(projected: torch.Tensor) -> bytes:
    from safetensors.torch import save

    return save({"projections": projected.contiguous()})


def _tensor(data: bytes) -> torch.Tensor:
    from safetensors.torch import load

    return load(data)["projections"]
