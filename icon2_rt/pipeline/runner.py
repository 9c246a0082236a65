"""A whole run in a folder: directions, instructions, consistency, strengths, pairs, their effect, report.

Every piece of work is an artifact of the :class:`~icon2_rt.pipeline.folder.RunFolder`. A run that is started again with
the same command takes the finished ones from there and makes the rest, so that it ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from icon2_rt.pipeline import comparison, costs, dataset, manifest, page, stages
from icon2_rt.pipeline.config import RunConfig, controlled_layers
from icon2_rt.pipeline.files import to_json
from icon2_rt.pipeline.folder import RunFolder
from icon2_rt.pipeline.loading import end_tokens, instruction_room, load_runtime
from icon2_rt.pipeline.report import card, compose
from icon2_rt.pipeline.stages import Job, Watch, silent
from icon2_rt.pipeline.templates import chat_frame

if TYPE_CHECKING:
    from icon2_rt import Runtime

T = TypeVar("T")


@dataclass(frozen=True)
class RunResult:
    """Where a finished run lies and what it says about itself (``report.json`` and ``manifest.json``)."""

    path: Path
    report: Mapping[str, Any]
    manifest: Mapping[str, Any]
    seconds: Mapping[str, float]

    def records(self) -> Iterator[dict[str, Any]]:
        """The pairs, in order, shard by shard."""
        for path in sorted((self.path / "data").glob("*.parquet")):
            yield from dataset.from_parquet(path.read_bytes())


def finished_run(folder: str | Path) -> RunResult:
    """A run that was finished earlier, from its folder.

    Raises:
        ValueError: the folder holds no run, or one that is not finished.
    """
    path = Path(folder)
    if not (path / "manifest.json").is_file():
        raise ValueError(f"{path} is not a run's folder: there is no manifest.json in it")
    about = json.loads((path / "manifest.json").read_bytes())
    if not about.get("finished"):
        raise ValueError(f"the run in {path} is not finished; the command that began it continues it")
    return RunResult(path, json.loads((path / "report.json").read_bytes()), about, {})


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

        def timed(step: str, work: Callable[[], T]) -> T:
            began = perf_counter()
            value = work()
            seconds[step] = perf_counter() - began
            folder.log(step, seconds=round(seconds[step], 3))
            return value

        before = folder.manifest()
        identity = manifest.asked_for(config)
        manifest.refuse_another(before, identity, folder.path)
        folder.log("resumed" if before else "started")
        if rt is None:
            watch("model", 0, 1)
            rt = timed("model", lambda: load_runtime(config, before["identity"].get("machine") if before else None))
            watch("model", 1, 1)
        eos = end_tokens(rt)
        frame = chat_frame(rt.tokenizer, eos)
        layers = tuple(controlled_layers(config.pairs.layers, rt.spec.n_layers))
        job = Job(config, folder, rt, frame, eos, layers, instruction_room(rt, frame, config), watch)
        identity |= manifest.found(rt, frame)
        manifest.refuse_another(before, identity, folder.path)
        about = before or manifest.compose(config, identity, frame, layers, eos)
        folder.write_manifest(about)
        rt.usage.take()  # whatever it was used for before

        def finish(report: dict[str, Any], readme: str) -> RunResult:
            report = {**report, "costs": costs.account(folder.artifacts(), job.rt.spec, report["counts"]["pairs"])}
            folder.write_result("report.json", to_json(report))
            folder.write_result("report.html", page.render(report, about).encode())
            folder.write_result("README.md", readme.encode())
            finished = {**about, "counts": report["counts"], "finished": True}
            folder.write_manifest(finished)
            folder.log("finished")
            return RunResult(folder.path, report, finished, seconds)

        if config.baseline is not None:
            judge = timed("judge", lambda: comparison.load_judge(job))
            raw, scored = timed("instructions", lambda: stages.instructions(job, None, None))
            shards, counts = timed("pairs", lambda: comparison.pairs(job, raw, scored, judge))
            report = comparison.compose(job, counts, shards)
            return finish(report, comparison.card(config, report))
        features, feature_list = timed("feature instructions", lambda: stages.feature_instructions(job))
        directions, direction_set = timed("directions", lambda: stages.directions(job, features, feature_list))
        raw, scored = timed("instructions", lambda: stages.instructions(job, directions, direction_set))
        kept, kept_list = timed("consistency", lambda: stages.keep(job, raw, scored, feature_list, direction_set))
        sample = feature_list or scored.instructions
        strong, strengths = timed("strengths", lambda: stages.strengths(job, directions, sample, direction_set))
        inputs = [directions, kept, strong]
        shards = timed("pairs", lambda: stages.pairs(job, inputs, kept_list, direction_set, strengths))

        effect = timed("effect", lambda: stages.effect(job, directions, shards, direction_set))
        report = compose(job, direction_set, features, kept, strong, shards, effect)
        return finish(report, card(config, report))
