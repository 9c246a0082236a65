"""Dataset cards: what ``README.md`` in a run's folder says. Every sentence follows from the config or the report.

A card is published with the data, so it claims nothing that a setting can make untrue: who chose the strengths, what
came from outside the model, what each column holds in this very run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from icon2_rt.pipeline import acted, dataset
from icon2_rt.pipeline.config import SCALES, RunConfig
from icon2_rt.pipeline.functions import function_file
from icon2_rt.pipeline.instructions import read_instructions


def given(config: RunConfig) -> dict[str, Any]:
    """What a run took from files: their names, and how many of the instructions came with a criterion; {} for nothing.

    Part of ``report.json``, so that its readers need no config.
    """
    files = {
        "directions": config.directions.file,
        "features": config.directions.features_file,
        "instructions": config.instructions.file,
    }
    found: dict[str, Any] = {what: Path(path).name for what, path in files.items() if path is not None}
    if config.instructions.file is not None:
        read = read_instructions(config.instructions.file)
        found["with_criterion"] = sum(record.get("criterion") is not None for _, record in read)
    return found


def card(config: RunConfig, report: Mapping[str, Any]) -> str:
    """The card of a run of the method."""
    pairs, strengths, counts = report["pairs"], report["strengths"], report["counts"]["instructions"]
    lines = [
        f"Made by icon2_rt from `{config.model}`{_outside(config, report.get('given', {}))}",
        "",
        f"- {pairs['pairs']} pairs from {counts['kept']} instructions kept of {counts['drawn']} {_origin(report)}",
        f"- criteria: {', '.join(f'{name} {n}' for name, n in pairs['per_criterion'].items())}",
        f"- strengths in residual units, {_strengths(config)}: γ⁺ {_gamma(strengths['positive'])}, "
        f"γ⁻ {_gamma(strengths['negative'])}, "
        f"after blocks {strengths['layers'][0]} to {strengths['layers'][-1]} (0-based)",
        *([f"- steering acted on {acted.how_much(steering)}"] if (steering := report["steering"]) else []),
        f"- identical pairs {pairs['identical']:.1%}, length ratio chosen/rejected {pairs['length_ratio']:.2f}, "
        f"cut off {pairs['chosen']['cut_off']:.1%} / {pairs['rejected']['cut_off']:.1%}",
        *_warnings(report),
    ]
    columns = {name: text for name, text in meanings(config).items() if name in report["columns"]}
    return dataset.card("Steered preference pairs", "\n".join(lines), columns)


def baseline_card(config: RunConfig, report: Mapping[str, Any]) -> str:
    """The card of a baseline."""
    assert config.baseline is not None
    pairs, counts, recipe = report["pairs"], report["counts"]["instructions"], config.baseline.recipe
    by = f", whose judge is `{_name(config.baseline.judge)}`" if recipe == "best_of_n" and config.baseline.judge else ""
    lines = [
        f"Made by icon2_rt from `{config.model}` with the baseline `{recipe}`{by}.",
        "",
        f"- {report['counts']['pairs']} pairs from {counts['clean']} instructions of {counts['drawn']} "
        f"{_origin(report)}",
    ]
    if report["counts"]["pairs"]:
        lines.append(f"- length ratio chosen/rejected {pairs['length_ratio']:.2f}")
    columns = {name: text for name, text in meanings(config).items() if name in report["columns"]}
    return dataset.card("Preference pairs of a baseline", "\n".join([*lines, *_warnings(report)]), columns)


def meanings(config: RunConfig) -> dict[str, str]:
    """Every column's meaning in a run with this config."""
    found = dict(dataset.COLUMNS | dataset.OPTIONAL)
    if config.baseline is not None:
        return found | _baseline_meanings(config)
    several = {
        "each": "the criterion whose direction steered the pair; every instruction has a pair for each criterion",
        "sum": "the criteria whose directions steered the pair together, joined by +",
    }
    if config.pairs.directions in several:
        found["criterion"] = several[config.pairs.directions]
    if config.pairs.directions == "each":
        found["score"] = "consistency score of the instruction under the pair's criterion"
        found["margin"] = "where that is c*: its distance to the second-best criterion; else null"
    if config.pairs.directions == "sum":
        found |= {side: text.replace("the criterion", "the criteria") for side, text in found.items() if side in _SIDES}
    if config.pairs.shared_tokens:
        seeds = ("chosen_seed", "rejected_seed", "neutral_seed", "responses_seed")
        found |= {name: f"{found[name]} behind the shared beginning" for name in seeds}
    found["neutral_logprob"] = "sum of log-probabilities (nats) under the unsteered model, which wrote it"
    return found


_SIDES = ("chosen", "rejected")
_STEERING = ("score", "margin", "strength_positive", "strength_negative")


def _baseline_meanings(config: RunConfig) -> dict[str, str]:
    assert config.baseline is not None
    recipe = config.baseline.recipe
    judge = {
        "best_of_n": "the judge",
        "self_rewarding": "the model itself, as its judge,"
        if config.baseline.self_judge == "grade"
        else "the likelihood under the criteria's system prompts",
    }.get(recipe, "")
    chosen, rejected = {
        "self_refine": ("the refinement that the model wrote with all samples before it", "the first sample"),
        "opposing_prompts": (
            "the response under the criterion's positive system prompt",
            "the response under its negative system prompt",
        ),
    }.get(recipe, (f"the sample that {judge} put first", f"the sample that {judge} put last"))
    unit = "under the unsteered model, given the instruction alone"
    found = {
        **dict.fromkeys(_STEERING, "null: nothing is steered"),
        "criterion": "the criterion whose system prompts wrote the pair"
        if recipe == "opposing_prompts"
        else "null: the recipe has none",
        "chosen": chosen,
        "rejected": rejected,
    }
    for side in _SIDES:
        found[f"{side}_logprob"] = "sum of log-probabilities (nats) given the prompt that it was drawn for"
        found[f"{side}_logprob_unsteered"] = f"the same {unit}"
        found[f"{side}_reward"] = f"what {judge} gave it"
    return found


def _outside(config: RunConfig, files: Mapping[str, Any]) -> str:
    """What the first sentence goes on with: that nothing came from outside the model, or what did."""
    came = []
    if "directions" in files:
        came.append(f"the directions (`{files['directions']}`)")
    if "features" in files:
        came.append(f"the feature instructions (`{files['features']}`)")
    if "instructions" in files:
        with_criteria = f", {files['with_criterion']} of them with a criterion" if files["with_criterion"] else ""
        came.append(f"the instructions (`{files['instructions']}`{with_criteria})")
    if config.filter.scale not in SCALES:
        came.append(f"the scores that chose criteria and instructions (`{_name(config.filter.scale)}`)")
    judge = config.calibration.judge if config.calibrates and config.calibration is not None else None
    if judge is not None:
        came.append(f"the judgements by which the strengths were chosen (`{_name(judge)}`)")
    free = []
    if judge is None and config.filter.scale in SCALES:
        free.append("no reward model, no judge")
        if "directions" not in files and not files.get("with_criterion"):
            free.append("no human labels")
    sentence = f": {', '.join(free)}." if free else "."
    return sentence + (f" From outside the model came {_listed(came)}." if came else "")


def _origin(report: Mapping[str, Any]) -> str:
    return "given" if "instructions" in report.get("given", {}) else "drawn"


def _strengths(config: RunConfig) -> str:
    if config.calibrates:
        return "calibrated by dose on this model"
    if config.pairs.unit == "dose":
        return "given as doses"
    own = [getattr(config.pairs, name) is not None for name in ("positive", "negative")]
    if all(own):
        return "as given"
    if not any(own):
        return "those printed in the paper"
    return "γ⁺ as given and γ⁻ as printed in the paper" if own[0] else "γ⁻ as given and γ⁺ as printed in the paper"


def _name(function_or_model: str) -> str:
    """A function without the folder of its file, which means nothing elsewhere; a model as it is."""
    file = function_file(function_or_model)
    return function_or_model if file is None else f"{Path(file).name}:{function_or_model.rpartition(':')[2]}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _warnings(report: Mapping[str, Any]) -> Iterable[str]:
    if report["warnings"]:
        yield from ("", "Warnings:", "", *(f"- {warning}" for warning in report["warnings"]))


def _gamma(by_criterion: Mapping[str, float]) -> str:
    """One number where all criteria have the same strength, else each with its name."""
    if len(set(by_criterion.values())) == 1:
        return f"{next(iter(by_criterion.values())):.4g}"
    return " / ".join(f"{gamma:.4g} ({name})" for name, gamma in by_criterion.items())
