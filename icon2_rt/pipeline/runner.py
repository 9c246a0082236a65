"""A whole run in a folder: directions, instructions, consistency, strengths, pairs, their effect, report.

Every piece of work is an artifact of the :class:`~icon2_rt.pipeline.folder.RunFolder`. A run that is started again with
the same command takes the finished ones from there and makes the rest, so that it ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from icon2_rt.pipeline import acted, cards, comparison, costs, dataset, manifest, page, stages
from icon2_rt.pipeline.config import RunConfig, controlled_bands
from icon2_rt.pipeline.files import to_json
from icon2_rt.pipeline.folder import RAN, RunFolder
from icon2_rt.pipeline.ladder_plot import ladder_svg
from icon2_rt.pipeline.loading import find_frame, instruction_room, load_runtime, look, rendering
from icon2_rt.pipeline.preflight import preflight
from icon2_rt.pipeline.report import compose
from icon2_rt.pipeline.stages import Job, Watch, silent
from icon2_rt.pipeline.templates import ChatFrame

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
            try:
                yield from dataset.from_parquet(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path} is damaged; `icon2 run` with the same config makes it again") from error


def finished_run(folder: str | Path) -> RunResult:
    """A run that was finished earlier, from its folder.

    Raises:
        ValueError: the folder holds no run, or one that is not finished.
    """
    path = Path(folder)
    if not (path / "manifest.json").is_file():
        raise ValueError(f"{path} is not a run's folder: there is no manifest.json in it")
    about = _table_in(path / "manifest.json")
    if not about.get("finished"):
        raise ValueError(f"the run in {path} is not finished; the command that began it continues it")
    return RunResult(path, _table_in(path / "report.json"), about, {})


def _table_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged; `icon2 run` with the same config makes it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not of a run: it holds no JSON object")
    return found


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
    with RunFolder(out) as folder, _Work(config, folder, watch, rt) as work:
        job, timed = work.job, work.timed
        if job.config.baseline is not None:
            judge = timed("judge", lambda: comparison.load_judge(job))
            raw, scored = timed("instructions", lambda: stages.instructions(job, None, None))
            shards, counts = timed("pairs", lambda: comparison.pairs(job, raw, scored, judge))
            report = comparison.compose(job, counts, shards)
            return work.finish(report, cards.baseline_card(job.config, report))
        features, feature_list = timed("feature instructions", lambda: stages.feature_instructions(job))
        directions, direction_set = timed("directions", lambda: stages.directions(job, features, feature_list))
        raw, scored = timed("instructions", lambda: stages.instructions(job, directions, direction_set))
        kept, kept_list = timed("consistency", lambda: stages.keep(job, raw, scored, feature_list, direction_set))
        sample = feature_list or scored.instructions
        strong, strengths = timed("strengths", lambda: stages.strengths(job, directions, sample, direction_set))
        inputs = [directions, kept, strong]
        shards = timed("pairs", lambda: stages.pairs(job, inputs, kept_list, direction_set, strengths))

        effect = timed("effect", lambda: stages.effect(job, directions, shards, direction_set, strengths))
        report = compose(job, direction_set, features, kept, strong, shards, effect)
        return work.finish(report, cards.card(job.config, report))


def find_strengths(
    config: RunConfig, out: str | Path, *, watch: Watch = silent, rt: Runtime | None = None
) -> Mapping[str, Any]:
    """Only the strengths: what a run with a calibration does up to there, in a folder that such a run continues.

    Arguments and errors as for :func:`run`; a config without a ``[calibration]`` section gets its defaults.

    Returns: the content of ``strengths.json``; beside it ``calibration.svg`` shows the ladder.
    """
    if not config.calibrates:  # one that does is left as it is: `run` with it must find its own folder
        config = dataclasses.replace(config, calibrate=True)
    with RunFolder(out) as folder, _Work(config, folder, watch, rt) as work:
        job, timed = work.job, work.timed
        features, feature_list = timed("feature instructions", lambda: stages.feature_instructions(job))
        directions, direction_set = timed("directions", lambda: stages.directions(job, features, feature_list))
        strong, _ = timed("strengths", lambda: stages.strengths(job, directions, feature_list, direction_set))
        folder.write_result("calibration.svg", ladder_svg(strong.facts["calibration"]).encode())
        folder.log("calibrated")
        return strong.figures


class _Work:
    """A run that has begun: its folder is found to be its own, its model loaded, its manifest written.

    Attributes:
        job: what the steps need. about: the manifest. seconds: how long each step took.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, watch: Watch, rt: Runtime | None):
        config = RunConfig.from_dict(config.to_dict())  # one made in Python is checked like one from a file
        self._folder = folder
        self.seconds: dict[str, float] = {}
        before = folder.manifest()
        identity = manifest.asked_for(config)
        manifest.refuse_another(before, identity, folder.path)
        preflight(config)
        folder.log("resumed" if before else "started")
        if rt is None:
            look(config)
            watch("model", 0, 1)
            as_on = before["identity"].get("machine") if before else None
            rt = self.timed("model", lambda: load_runtime(config, as_on))
            watch("model", 1, 1)
        frame = find_frame(rt, config, before["identity"].get("chat_template") if before else None)
        self._until_closed = ExitStack()
        self._until_closed.enter_context(rendering(rt, frame))
        bands = controlled_bands(config, rt.spec.n_layers)
        try:
            self._begin(config, rt, frame, bands, before, identity, watch)
        except BaseException:
            self._until_closed.close()
            raise

    def _begin(
        self,
        config: RunConfig,
        rt: Runtime,
        frame: ChatFrame,
        bands: Mapping[str, tuple[int, ...]],
        before: Mapping[str, Any] | None,
        identity: dict[str, Any],
        watch: Watch,
    ) -> None:
        """Write the manifest of a run that begins, or find that this is the one that it continues."""
        folder, eos = self._folder, frame.end_token_ids
        self.job = Job(config, folder, rt, frame, eos, bands, instruction_room(rt, frame, config), watch)
        identity |= manifest.found(rt, frame)
        manifest.refuse_another(before, identity, folder.path)
        self.about = before or manifest.compose(config, identity, frame, bands, eos, rt.qualification)
        folder.write_manifest(self.about)
        rt.usage.take()  # whatever it was used for before

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *_: object) -> None:
        self._until_closed.close()

    def timed(self, step: str, work: Callable[[], T]) -> T:
        began = perf_counter()
        value = work()
        self.seconds[step] = perf_counter() - began
        self._folder.log(step, seconds=round(self.seconds[step], 3))
        return value

    def finish(self, report: dict[str, Any], readme: str) -> RunResult:
        """Write what is made from the artifacts alone, and say that the run is whole."""
        folder = self._folder
        report = {**report, "costs": costs.account(folder.artifacts(), self.job.rt.spec, report["counts"]["pairs"])}
        ran = acted.by_step(folder.artifacts())
        finished = {**self.about, "counts": report["counts"], RAN: ran, "finished": True}
        folder.write_result("report.json", to_json(report))
        folder.write_result("report.html", page.render(report, finished, costs.clock(folder.path)).encode())
        folder.write_result("README.md", readme.encode())
        folder.write_manifest(finished)
        folder.log("finished")
        return RunResult(folder.path, report, finished, self.seconds)
