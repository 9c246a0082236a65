"""What can be refused before the model is loaded: inputs that a config names and that could not work later.

The config itself is checked when it is read (:mod:`icon2_rt.pipeline.config`); here the files, functions and judges
behind it are opened, as far as that costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from icon2_rt.pipeline.config import SCALES, RunConfig, incomplete_strengths
from icon2_rt.pipeline.functions import is_function, load_function
from icon2_rt.pipeline.instructions import read_instructions, without_duplicates
from icon2_rt.pipeline.judges import check_reward_model, load_judge
from icon2_rt.steering import DirectionSet


def preflight(config: RunConfig) -> None:
    """Open what the config names.

    Raises:
        ValueError: the first thing that is wrong, with the key of its setting. OSError: a file that cannot be read.
    """
    names = _names(config)
    _features(config)
    _given_criteria(config, names)
    if config.filter.scale not in SCALES:
        _takes(load_function(config.filter.scale, "filter.scale"), ("instructions", "projections", "names"))
    if config.calibrates and config.calibration is not None:
        _judge(config.calibration.judge, config.calibration.label, "calibration.judge")
    if config.baseline is not None:
        _judge(config.baseline.judge, config.baseline.label, "baseline.judge")


def _takes(function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """A function that cannot be called at all is found before its turn comes; what it returns is not known before."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ValueError(f"filter.scale: the function is called with ({', '.join(arguments)}): {error}") from None
    except ValueError:
        pass  # built in, without a signature


def _names(config: RunConfig) -> list[str]:
    """The criteria of the run, from their prompts or from the file of directions."""
    if config.directions.file is None:
        return list(config.resolved_criteria())
    names = DirectionSet.load(config.directions.file).names
    if config.criteria and sorted(config.criteria) != sorted(names):
        raise ValueError(
            f"criteria: directions.file holds {', '.join(names)}; tables beside it give the prompts of exactly those, "
            f"and there are {', '.join(config.criteria)}"
        )
    if unknown := [name for name in config.pairs.weights if name not in names]:
        raise ValueError(f"pairs.weights.{unknown[0]}: directions.file has no such direction, only {names}")
    if wrong := incomplete_strengths(config.pairs, names):
        raise ValueError("\n".join(wrong))
    return names


def _features(config: RunConfig) -> None:
    """Directions are a principal component of differences: one difference, or copies of one, have none."""
    if config.directions.features_file is None:
        return
    found, dropped = without_duplicates(item for item, _ in read_instructions(config.directions.features_file))
    if len(found) < 2:
        raise ValueError(
            f"directions.features_file: {config.directions.features_file} holds {len(found) + dropped} instructions, "
            f"{len(found)} of them different; directions need at least 2 (the paper takes 1024)"
        )


def _given_criteria(config: RunConfig, names: list[str]) -> None:
    """An instruction may come with its criterion, which must then be one of the run's."""
    if config.instructions.file is None:
        return
    for item, record in read_instructions(config.instructions.file):
        criterion = record.get("criterion")
        if criterion is not None and criterion not in names:
            raise ValueError(
                f"instructions.file: instruction {item.id} wants the criterion {criterion!r}; there are {names}"
            )


def _judge(judge: str | None, label: str | None, setting: str) -> None:
    """A judge that raises, or does not give a number, is found before anything is decoded for it; of a reward model,
    only the config is read here."""
    if judge is None:
        return
    if is_function(judge):
        load_judge(judge, None, "cpu", setting)
        return
    try:
        check_reward_model(judge, label)
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting}: {error}") from error
