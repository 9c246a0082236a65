"""Single steps without a run folder, for the commands that do only one thing."""

from __future__ import annotations

from collections.abc import Mapping

from icon2_rt.pipeline.config import RunConfig
from icon2_rt.pipeline.directions import extract
from icon2_rt.pipeline.instructions import read_instructions, synthesise, without_duplicates
from icon2_rt.pipeline.loading import find_frame, glance_frame, load_runtime, system_tokens
from icon2_rt.pipeline.preflight import preflight
from icon2_rt.pipeline.stages import Watch, silent, to_lines
from icon2_rt.steering import DirectionSet


def directions(config: RunConfig, watch: Watch = silent) -> DirectionSet:
    """Step 1: directions for the config's criteria, from the config's feature instructions or the model's own."""
    criteria, section = config.resolved_criteria(), config.directions
    preflight(config)
    given = read_instructions(section.features_file) if section.features_file is not None else None
    glance_frame(config)
    watch("model", 0, 1)
    rt = load_runtime(config)
    watch("model", 1, 1)
    frame = find_frame(rt, config)
    rt.template = frame.template
    if given is not None:
        features = [instruction for instruction, _ in given]
    else:
        watch("feature instructions", 0, section.features)
        room = rt.spec.max_length - system_tokens(rt, frame, criteria)
        drawn, _ = synthesise(rt, frame, range(section.features), config.instructions, config.seed, room)
        features, _ = without_duplicates(drawn)
        watch("feature instructions", section.features, section.features)
    watch("directions", 0, len(criteria))
    return extract(rt, frame, criteria, features, section.method, lambda n: watch("directions", n, len(criteria)))


def instructions(config: RunConfig, watch: Watch = silent) -> tuple[bytes, Mapping[str, int]]:
    """Step 2a: the model's own instructions as JSON lines, and the counts of what hygiene dropped."""
    section = config.instructions
    glance_frame(config)
    watch("model", 0, 1)
    rt = load_runtime(config)
    watch("model", 1, 1)
    frame = find_frame(rt, config)
    rt.template = frame.template
    found, counts = [], None
    for start in range(0, section.draws, section.shard_size):
        watch("instructions", start, section.draws)
        ids = range(start, min(start + section.shard_size, section.draws))
        drawn, dropped = synthesise(rt, frame, ids, section, config.seed, rt.spec.max_length)
        found += drawn
        counts = dropped if counts is None else counts + dropped
    assert counts is not None
    kept, counts["duplicate"] = without_duplicates(found)
    counts["clean"] = len(kept)
    watch("instructions", section.draws, section.draws)
    return to_lines(kept), counts
