"""What a run is asked to do: read from TOML, checked as a whole, frozen.

A config with five mistakes is reported with all five, each with the path of its key (``pairs.temperature: …``), before
anything is loaded. The sections and their options are the dataclasses below, and their defaults are the paper's
settings where it states them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from icon2_rt.pipeline.criteria import Criterion, default_criteria
from icon2_rt.pipeline.files import text_of
from icon2_rt.pipeline.functions import FUNCTION_FORM, function_file, is_function

Check = Callable[[Any], "str | None"]  # what is wrong with a value, or None


def option(default: Any, *checks: Check) -> Any:
    """A config key: its default, and what its value must satisfy beyond its type."""
    if default is _REQUIRED:
        return field(metadata={"checks": checks})
    return field(default=default, metadata={"checks": checks})


_REQUIRED = object()


def at_least(low: float) -> Check:
    return lambda value: None if value >= low else f"must be at least {low}"


def above(low: float) -> Check:
    return lambda value: None if value > low else f"must be greater than {low}"


def below(high: float) -> Check:
    return lambda value: None if value < high else f"must be less than {high}"


def at_most(high: float) -> Check:
    return lambda value: None if value <= high else f"must be at most {high}"


def not_empty(value: Any) -> str | None:
    return None if len(value) else "must not be empty"


def each(check: Check) -> Check:
    """For a number, or a table with one per criterion."""

    def all_of(value: float | Mapping[str, float]) -> str | None:
        return next((c for v in (value.values() if isinstance(value, Mapping) else [value]) if (c := check(v))), None)

    return all_of


SCALES = ("raw", "zscore", "contrast")


def scale_name(value: str) -> str | None:
    if value in SCALES or is_function(value):
        return None
    return f"must be one of {', '.join(map(repr, SCALES))}{_did_you_mean(value, SCALES)}, or {FUNCTION_FORM}"


def memory_size(value: str | int) -> str | None:
    if isinstance(value, int):
        return at_least(1)(value)
    return None if re.fullmatch(r"\s*\d+(\.\d+)?\s*[a-zA-Z]*\s*", value) else 'must be bytes or a size like "8GiB"'


def layer_range(value: str) -> str | None:
    try:
        parse_layers(value)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class RuntimeConfig:
    """How the model is loaded and run; the keyword arguments of ``Runtime.from_pretrained``.

    ``dtype`` "auto" is the checkpoint's own. ``kv_memory`` is bytes or a size like "8GiB" (none: what is free).
    ``threads`` is torch's thread count on the CPU (none: as torch decides).
    """

    device: str = option("auto", not_empty)
    backend: Literal["auto", "reference", "triton", "native"] = option("auto")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto")
    revision: str | None = option(None)
    max_rows: int = option(64, at_least(2))
    page_size: int = option(32, at_least(1))
    prefill_chunk: int = option(2048, at_least(1))
    kv_memory: str | int | None = option(None, memory_size)
    threads: int | None = option(None, at_least(1))


@dataclass(frozen=True)
class DirectionsConfig:
    """Step 1. ``file`` takes ready directions; otherwise they are extracted from ``features`` instructions that the
    model writes for itself (paper: 1024), or from those in ``features_file``."""

    file: str | None = option(None, not_empty)
    method: Literal["pca", "mean_difference"] = option("pca")
    features: int = option(1024, at_least(2))
    features_file: str | None = option(None, not_empty)


@dataclass(frozen=True)
class InstructionsConfig:
    """Step 2, synthesis. ``draws`` instructions are sampled; hygiene drops some. ``file`` takes ready ones instead."""

    draws: int = option(10_000, at_least(1))
    file: str | None = option(None, not_empty)
    temperature: float = option(1.0, above(0))
    top_p: float = option(1.0, above(0), at_most(1))
    top_k: int = option(0, at_least(0))
    min_p: float = option(0.0, at_least(0), below(1))
    repetition_penalty: float = option(1.0, above(0))
    max_new_tokens: int = option(256, at_least(1))
    min_chars: int = option(1, at_least(1))
    max_chars: int | None = option(None, at_least(1))
    shard_size: int = option(1024, at_least(1))


@dataclass(frozen=True)
class FilterConfig:
    """Step 2, consistency. ``scale`` is "raw", "zscore", "contrast", or a function of the user's own (see
    :mod:`icon2_rt.pipeline.consistency`); ``keep`` the share of the clean instructions that is kept (paper: 10 %);
    ``margin`` the least distance between the best criterion's score and the second's."""

    scale: str = option("raw", scale_name)
    keep: float = option(0.1, above(0), at_most(1))
    margin: float | None = option(None, at_least(0))


@dataclass(frozen=True)
class PairsConfig:
    """Step 3. ``positive`` and ``negative`` are the strengths γ⁺ and γ⁻ (paper: +0.1, −0.05), one number or a table
    with one per criterion; with a calibration they are left out. ``unit`` "residual" takes them as they are, the same
    in all controlled blocks, as the paper does; "dose" as a share of each block's own mean residual norm. ``layers`` is
    "middle" (a third of the blocks, as in the paper), "all" or a 0-based range with an exclusive end, "9:20".

    ``shape`` is what is written per prompt: a "pair", "ternary" (with an unsteered response between the two) or a
    "ladder" of ``rungs`` responses at even steps from γ⁺ to γ⁻. ``directions`` is "best" (c* alone), "each" (a record
    per criterion) or "sum" (all criteria in one steering, by ``weights``; without them 1 each). With ``shared_tokens``
    all responses to a prompt begin with that many tokens of an unsteered one. ``per_token`` keeps the unsteered model's
    log-probability and entropy of every token, not only their means."""

    positive: float | Mapping[str, float] | None = option(None, each(above(0)))
    negative: float | Mapping[str, float] | None = option(None, each(below(0)))
    unit: Literal["residual", "dose"] = option("residual")
    layers: str = option("middle", layer_range)
    temperature: float = option(0.8, at_least(0))
    top_p: float = option(0.95, above(0), at_most(1))
    top_k: int = option(0, at_least(0))
    min_p: float = option(0.0, at_least(0), below(1))
    repetition_penalty: float = option(1.0, above(0))
    max_new_tokens: int = option(512, at_least(1))
    noise: Literal["independent", "common"] = option("independent")
    shard_size: int = option(256, at_least(1))
    shape: Literal["pair", "ternary", "ladder"] = option("pair")
    rungs: int = option(5, at_least(2))
    directions: Literal["best", "each", "sum"] = option("best")
    weights: dict[str, float] = field(default_factory=dict)
    shared_tokens: int = option(0, at_least(0))
    per_token: bool = option(False)

    @property
    def same_draws(self) -> bool:
        """Do branches that their steering does not move give the same text?"""
        return self.noise == "common" or self.temperature == 0


@dataclass(frozen=True)
class CalibrationConfig:
    """Strengths by dose, ‖γu‖ relative to the mean residual norm in the controlled blocks: each of ``doses`` is tried
    with both signs on ``instructions`` of the feature instructions (paper: 100), in one pass; with ``bands`` on each of
    several bands of blocks, written as ``pairs.layers``, which is then not used. ``per_criterion`` chooses for each
    criterion alone.

    ``quality`` is what the model itself says (:mod:`icon2_rt.pipeline.quality`), unless a ``judge`` is asked, with its
    ``label``, as in a ``[baseline]``. The positive response must be better in more than ``better`` of the instructions.
    ``fluency_loss`` bounds the nats per token that a response may lose under the unsteered model (none: 0.1 without a
    judge, no bound with one), ``max_divergence`` the Kullback-Leibler divergence from it, in nats per token."""

    doses: tuple[float, ...] = option((0.02, 0.05, 0.1, 0.15, 0.2), not_empty)
    instructions: int = option(100, at_least(2))
    bands: tuple[str, ...] = option(())
    per_criterion: bool = option(False)
    quality: Literal["agreement", "projection"] = option("agreement")
    judge: str | None = option(None, not_empty)
    label: str | None = option(None, not_empty)
    better: float = option(0.9, at_least(0.5), below(1))
    fluency_loss: float | None = option(None, above(0))
    max_divergence: float | None = option(None, above(0))


@dataclass(frozen=True)
class BaselineConfig:
    """Another recipe in place of the method, on the same engine, for the same kind of dataset: what it is compared with
    (see :mod:`icon2_rt.pipeline.baselines`). ``samples`` is n (none: 5; for self_refine 3). ``judge`` is what best_of_n
    asks: a sequence classification model (a path or hub id; ``label`` names the output that means good where it has
    several), or a function of the user's own, from lists of instructions and responses to one number each. For
    self_rewarding ``self_judge`` is "grade" (the mean of ``votes`` grades that the model writes) or "likelihood"."""

    recipe: Literal["best_of_n", "self_rewarding", "self_refine", "opposing_prompts"] = option(_REQUIRED)
    samples: int | None = option(None, at_least(1))
    judge: str | None = option(None, not_empty)
    label: str | None = option(None, not_empty)
    self_judge: Literal["grade", "likelihood"] = option("grade")
    votes: int = option(4, at_least(1))

    @property
    def n_samples(self) -> int:
        return self.samples or (3 if self.recipe == "self_refine" else 5)


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Make one with :meth:`load` or :meth:`from_dict`, which check it.

    ``model`` is a path, a hub id, or "tiny" for the model that ships with the package. ``preset`` fills in what is left
    out (:data:`PRESETS`). ``criteria`` are tables with two prompts each, or a list of names of the paper's four, which
    are the default (for "tiny": those it was trained with). ``calibrate = true`` is a calibration with the defaults of
    its section; false leaves a ``[calibration]`` section to ``icon2 calibrate`` alone. ``template`` are variables of
    the model's chat template, such as ``enable_thinking = false``.
    """

    model: str = option(_REQUIRED, not_empty)
    preset: Literal["icon2"] | None = option(None)
    seed: int = option(0, at_least(0), below(2**31))
    criteria: dict[str, Criterion] = field(default_factory=dict)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    directions: DirectionsConfig = field(default_factory=DirectionsConfig)
    instructions: InstructionsConfig = field(default_factory=InstructionsConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    calibrate: bool | None = option(None)
    calibration: CalibrationConfig | None = None
    baseline: BaselineConfig | None = None
    template: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a TOML file. Files and folders that it names are relative to its own folder.

        Raises:
            ValueError: no TOML, or settings that are wrong: all of them in one message, each with its key's path.
            OSError: the file cannot be read.
        """
        path = Path(path)
        return cls.from_dict(read_toml(path), source=str(path), folder=path.parent)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], *, source: str = "config", folder: Path | None = None) -> RunConfig:
        """Check a plain dict as :meth:`load` checks a file.

        Raises:
            ValueError: as for :meth:`load`; ``source`` names the origin in the message.
        """
        errors: list[str] = []
        if isinstance(table, Mapping):
            table = _with_named_criteria(_with_preset(table), errors)
        config = _read(cls, table, "", errors)
        if config is not None:
            if config.calibrate and config.calibration is None:
                config = dataclasses.replace(config, calibration=CalibrationConfig())
            config = _resolve_files(config, folder, errors)
            errors += _contradictions(config)
        if errors:
            count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
            raise ValueError(f"{source}: {count}\n" + "\n".join(f"  {error}" for error in errors))
        assert config is not None
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the TOML file; what is not set is left out."""
        return _plain(self)

    def resolved_criteria(self) -> dict[str, Criterion]:
        """The criteria of the run; none where ``directions.file`` brings directions and no prompts are given."""
        return dict(self.criteria) or ({} if self.directions.file else default_criteria(self.model))

    @property
    def calibrates(self) -> bool:
        """Does a run find its strengths by a calibration?"""
        return self.calibration is not None and self.calibrate is not False


PAPER_STRENGTHS = (0.1, -0.05)
# The paper, spelled out: its criteria and strengths are the defaults of their own keys.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "icon2": {
        "directions": {"method": "pca", "features": 1024},
        "instructions": {"draws": 1_000_000},
        "filter": {"scale": "raw", "keep": 0.1},
        "pairs": {"unit": "residual", "layers": "middle"},
    }
}
# How the paper trains on the pairs. Training is not part of a run; the manifest says it for whoever trains.
PAPER_TRAINING: Mapping[str, Any] = {
    "loss": "dpo",
    "beta": 0.1,
    "learning_rate": 5e-7,
    "schedule": "cosine",
    "warmup_ratio": 0.1,
    "batch_size": 128,
    "epochs": 1,
}


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; raises ValueError with the file's name and the line, or OSError."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; what is needed is a TOML file (examples/ has some)")
    try:
        return tomllib.loads(text_of(path.read_bytes(), str(path)))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def read_criteria(path: str | Path) -> dict[str, Criterion]:
    """Criteria from a TOML file with one table each: ``[honesty]``, ``positive = "…"``, ``negative = "…"``.

    A whole run config works too: its ``[criteria.…]`` tables are taken.

    Raises:
        ValueError: everything that is wrong with it, in one message.
    """
    table = read_toml(Path(path))
    if isinstance(table.get("criteria"), dict):
        table = table["criteria"]
    errors: list[str] = []
    criteria = _read_value(dict[str, Criterion], table, "", errors)
    if not errors and not criteria:
        errors.append('no criterion in it; write [honesty] with positive = "…" and negative = "…"')
    errors += _same_prompts(criteria or {}, "")
    if errors:
        raise ValueError(f"{path}: " + "\n  ".join(["wrong criteria", *errors]))
    return criteria


def parse_layers(text: str) -> slice | str:
    """ "9:20" → slice(9, 20); "middle" and "all" stay words until the number of blocks is known."""
    if text in ("middle", "all"):
        return text
    parts = text.split(":")
    try:
        if len(parts) == 1:
            layer = int(parts[0])
            return slice(layer, layer + 1 or None)
        if len(parts) == 2:
            start, stop = (int(part) if part.strip() else None for part in parts)
            return slice(start, stop)
    except ValueError:
        pass
    raise ValueError(f'must be "middle", "all" or a 0-based range of blocks like "9:20" (end excluded), not {text!r}')


def controlled_layers(text: str, n_layers: int, key: str = "pairs.layers") -> list[int]:
    """The blocks (0-based) that are steered in a model of ``n_layers``.

    "middle" is the paper's band: blocks ⌊N/3⌋ to 2·⌊N/3⌋, counted from 1, both included: 10–20 of 32, 12–24 of 36 and
    16–32 of 48 as printed there. (For the 28 blocks of Qwen2-7B the paper takes 10–20 too; this rule gives 9–18.)

    Raises:
        ValueError: the range selects no block of this model; ``key`` names the setting.
    """
    chosen = parse_layers(text)
    if chosen == "all":
        return list(range(n_layers))
    if chosen == "middle":
        third = max(1, n_layers // 3)
        return list(range(n_layers))[third - 1 : 2 * third]
    assert isinstance(chosen, slice)
    for bound in (chosen.start, chosen.stop):
        if bound is not None and not -n_layers <= bound <= n_layers:
            raise ValueError(f"{key}: {text!r} reaches outside the model's blocks 0..{n_layers - 1}")
    layers = list(range(n_layers))[chosen]
    if not layers:
        raise ValueError(f"{key}: {text!r} selects no block of 0..{n_layers - 1}")
    return layers


def controlled_bands(config: RunConfig, n_layers: int) -> dict[str, tuple[int, ...]]:
    """The blocks that may be steered, by the text that names them: one band, or those that a calibration compares.

    Raises:
        ValueError: as :func:`controlled_layers`.
    """
    if config.calibrates and config.calibration is not None and config.calibration.bands:
        key, bands = "calibration.bands", config.calibration.bands
    else:
        key, bands = "pairs.layers", (config.pairs.layers,)
    return {band: tuple(controlled_layers(band, n_layers, key)) for band in bands}


def _with_preset(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with what it leaves to its preset; a section whose work a ``file`` does is left as it is."""
    filled = dict(table)
    preset = table.get("preset")
    for section, values in PRESETS[preset].items() if isinstance(preset, str) and preset in PRESETS else ():
        own = table.get(section, {})
        if isinstance(own, Mapping) and "file" not in own:
            filled[section] = {**values, **own}
    return filled


def _with_named_criteria(table: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """A list of names becomes the tables that it stands for."""
    names, model = table.get("criteria"), table.get("model")
    if not isinstance(names, list | tuple):
        return table
    known = default_criteria(model if isinstance(model, str) else "")
    errors += [
        f"criteria: unknown criterion {name!r}{_did_you_mean(str(name), known)}; there are {', '.join(known)}. One of "
        f"your own is a table with its two prompts, [criteria.NAME]"
        for name in names
        if name not in known
    ]
    if not names:
        errors.append("criteria: the list is empty; leave it out for all of " + ", ".join(known))
    found = {name: dataclasses.asdict(known[name]) for name in names if name in known}
    return {**table, "criteria": found}


def _contradictions(config: RunConfig) -> list[str]:
    """What is wrong with options that are each fine by themselves."""
    errors = []
    if config.calibrates:
        given = [name for name in ("positive", "negative") if getattr(config.pairs, name) is not None]
        errors += [f"pairs.{name}: leave it out, the calibration finds the strengths" for name in given]
    elif config.pairs.unit == "dose":
        errors += [
            f'pairs.{name}: give it, as a share of the residual norm ("{example}"); the paper\'s strengths are in '
            f"residual units"
            for name, example in (("positive", 0.1), ("negative", -0.1))
            if getattr(config.pairs, name) is None
        ]
    if config.calibration is not None:
        errors += _calibration_contradictions(config, config.calibration)
    errors += _pair_contradictions(config) + _baseline_contradictions(config)
    low, high = config.instructions.min_chars, config.instructions.max_chars
    if high is not None and high < low:
        errors.append(f"instructions.max_chars: must not be less than min_chars ({low}), got {high}")
    if config.directions.file is None:
        errors += incomplete_strengths(config.pairs, list(config.resolved_criteria()))
    else:
        missing = "needs the criteria's system prompts, which directions.file does not bring: give [criteria.NAME] too"
        if config.calibration is not None and not config.criteria:
            errors.append(f"calibration: {missing}")
        if config.filter.scale == "contrast" and not config.criteria:
            errors.append(f"filter.scale: contrast {missing}")
        features = () if config.calibrates else ("features", "features_file")
        errors += _without_effect(config.directions, "directions", ("method", *features))
    if config.instructions.file is not None:
        errors += _without_effect(
            config.instructions,
            "instructions",
            ("draws", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"),
        )
    return errors + _same_prompts(config.criteria, "criteria.")


def _calibration_contradictions(config: RunConfig, calibration: CalibrationConfig) -> list[str]:
    errors = []
    if any(not 0 < dose < 2 for dose in calibration.doses):
        errors.append("calibration.doses: each is a share of the residual norm, between 0 and 2")
    for number, band in enumerate(calibration.bands):
        if complaint := layer_range(band):
            errors.append(f"calibration.bands[{number}]: {complaint}")
    if len(set(calibration.bands)) < len(calibration.bands):
        errors.append("calibration.bands: a band is named twice")
    if calibration.bands and config.calibrates and config.pairs.layers != PairsConfig().layers:
        errors.append("pairs.layers: leave it out, the calibration chooses one of its bands")
    if calibration.judge is not None and calibration.quality != CalibrationConfig().quality:
        errors.append("calibration.quality: leave it out, the judge is asked")
    if calibration.label is not None and (calibration.judge is None or is_function(calibration.judge)):
        errors.append("calibration.label: has no effect without a reward model as the judge; leave it out")
    return errors


def _pair_contradictions(config: RunConfig) -> list[str]:
    pairs, errors = config.pairs, []
    if pairs.shape != "ladder" and pairs.rungs != PairsConfig().rungs:
        errors.append(f'pairs.rungs: has no effect with pairs.shape = "{pairs.shape}"; leave it out')
    if pairs.weights and pairs.directions != "sum":
        errors.append('pairs.weights: they need pairs.directions = "sum"')
    if config.directions.file is None:
        known = list(config.resolved_criteria())
        unknown = [name for name in pairs.weights if name not in known]
        errors += [f"pairs.weights.{name}: there is no such criterion{_did_you_mean(name, known)}" for name in unknown]
    errors += [f"pairs.weights.{name}: must not be 0; leave it out" for name, w in pairs.weights.items() if w == 0]
    if pairs.shared_tokens >= pairs.max_new_tokens:
        errors.append(f"pairs.shared_tokens: must be less than max_new_tokens ({pairs.max_new_tokens})")
    return errors


def _baseline_contradictions(config: RunConfig) -> list[str]:
    baseline, errors = config.baseline, []
    if baseline is None:
        return []
    if baseline.recipe == "best_of_n" and baseline.judge is None:
        errors.append(f"baseline.judge: best_of_n needs one: a reward model's path or hub id, or {FUNCTION_FORM}")
    if baseline.recipe in ("best_of_n", "self_rewarding") and baseline.n_samples < 2:
        errors.append(f"baseline.samples: {baseline.recipe} chooses among samples, and needs at least 2")
    if baseline.recipe in ("best_of_n", "self_rewarding") and config.pairs.temperature == 0:
        errors.append(
            f"pairs.temperature: {baseline.recipe} chooses among samples, which are all the same at 0; give it more"
        )
    if baseline.recipe != "opposing_prompts" and config.pairs.noise != PairsConfig().noise:
        errors.append(f"pairs.noise: has no effect with {baseline.recipe}, whose samples must differ; leave it out")
    steered = {
        "directions": ("file", "method", "features_file"),
        "filter": ("scale", "keep", "margin"),
        "pairs": ("positive", "negative", "unit", "layers", "shape", "rungs", "directions", "weights", "shared_tokens"),
    }
    for path, names in steered.items():
        section = getattr(config, path)
        errors += _without_effect(section, path, names, "with [baseline]")
    if config.calibration is not None:
        errors.append("calibration: has no effect with [baseline]; leave it out")
    return errors


def _without_effect(section: Any, path: str, names: tuple[str, ...], why: str = "") -> list[str]:
    defaults = type(section)()
    changed = [name for name in names if getattr(section, name) != getattr(defaults, name)]
    return [f"{path}.{name}: has no effect {why or f'with {path}.file'}; leave it out" for name in changed]


def given_strengths(pairs: PairsConfig, names: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """γ⁺ and γ⁻ of every criterion in ``names``, in ``pairs.unit``: as given, or the paper's."""
    positive, negative = (
        paper if value is None else value
        for value, paper in zip((pairs.positive, pairs.negative), PAPER_STRENGTHS, strict=True)
    )
    return tuple(dict(v) if isinstance(v, Mapping) else dict.fromkeys(names, v) for v in (positive, negative))  # type: ignore[return-value]


def incomplete_strengths(pairs: PairsConfig, names: Sequence[str]) -> list[str]:
    """What is wrong with tables of strengths when ``names`` are the criteria."""
    errors = []
    for key in ("positive", "negative"):
        table = getattr(pairs, key)
        if not isinstance(table, Mapping):
            continue
        errors += [
            f"pairs.{key}: unknown criterion {name!r}{_did_you_mean(name, names)}; there are {', '.join(names)}"
            for name in table
            if name not in names
        ]
        if missing := [name for name in names if name not in table]:
            errors.append(f"pairs.{key}: has no strength for {', '.join(missing)}")
    return errors


def _same_prompts(criteria: Mapping[str, Criterion], prefix: str) -> list[str]:
    return [
        f"{prefix}{name}: positive and negative are the same text, so there is no direction between them"
        for name, criterion in criteria.items()
        if criterion.positive.split() and criterion.positive.casefold().split() == criterion.negative.casefold().split()
    ]


def _resolve_files(config: RunConfig, folder: Path | None, errors: list[str]) -> RunConfig:
    """Make input files absolute (relative to the config's folder) and check that they are there."""

    def resolve(value: str | None, path: str) -> str | None:
        if value is None:
            return None
        file = (folder or Path()) / Path(value).expanduser()
        if not file.is_file():
            errors.append(f"{path}: there is no file {file}")
        return str(file.resolve())

    def resolve_function(value: str, path: str) -> str:
        file = function_file(value)
        return value if file is None else f"{resolve(file, path)}:{value.rpartition(':')[2]}"

    def resolve_model(value: str) -> str:
        """A folder by its path; a hub id, or what is no folder here, as it is."""
        place = Path(value).expanduser()
        if value in ("", "tiny") or folder is None or is_function(value):
            return value
        if value.startswith((".", "~")) or (folder / place).is_dir():
            return str((folder / place).resolve())
        return value

    directions = dataclasses.replace(
        config.directions,
        file=resolve(config.directions.file, "directions.file"),
        features_file=resolve(config.directions.features_file, "directions.features_file"),
    )
    instructions = dataclasses.replace(config.instructions, file=resolve(config.instructions.file, "instructions.file"))
    filter_ = dataclasses.replace(config.filter, scale=resolve_function(config.filter.scale, "filter.scale"))
    baseline, calibration = config.baseline, config.calibration
    if baseline is not None and baseline.judge is not None:
        judge = resolve_model(resolve_function(baseline.judge, "baseline.judge"))
        baseline = dataclasses.replace(baseline, judge=judge)
    if calibration is not None and calibration.judge is not None:
        judge = resolve_model(resolve_function(calibration.judge, "calibration.judge"))
        calibration = dataclasses.replace(calibration, judge=judge)
    return dataclasses.replace(
        config,
        model=resolve_model(config.model),
        directions=directions,
        instructions=instructions,
        filter=filter_,
        baseline=baseline,
        calibration=calibration,
    )


def _read(cls: type, table: Any, path: str, errors: list[str]) -> Any:
    """Build the dataclass ``cls`` from ``table``; what is wrong goes to ``errors`` with its key's path, and its default
    stands in, so that everything else can still be checked."""
    if not isinstance(table, Mapping):
        errors.append(f"{path or 'config'}: must be a table of settings, not {_show(table)}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [str(key) for key in table if key not in fields]
    errors += [f"{_join(path, key)}: unknown option{_did_you_mean(key, fields)}" for key in unknown]
    values: dict[str, Any] = {}
    for name, f in fields.items():
        key = _join(path, name)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            values[name] = ""  # keeps the object whole for the cross checks when the key is missing or wrong
            if name not in table:
                errors.append(f"{key}: is missing, and there is no default")
        if name not in table:
            continue
        problems = len(errors)
        value = _read_value(hints[name], table[name], key, errors)
        if len(errors) > problems and not isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
            continue  # wrong: its default stands in
        if value is not None:
            complaint = next((c for c in (check(value) for check in f.metadata.get("checks", ())) if c), None)
            if complaint:
                errors.append(f"{key}: {complaint}" + ("" if repr(value) in complaint else f", got {_show(value)}"))
                continue
        values[name] = value
    return cls(**values)


def _read_value(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    """``value`` as the type ``hint`` says, or None and an error."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        allowed = [a for a in args if a is not type(None)]
        tables = [a for a in allowed if typing.get_origin(a) is Mapping and isinstance(value, Mapping)]
        fitting = tables or [a for a in allowed if isinstance(a, type) and type(value) is a]
        return _read_value((fitting or allowed)[0], value, path, errors)
    if origin is Literal:
        if value in args:
            return value
        hint = _did_you_mean(value, args) if isinstance(value, str) else ""
        errors.append(f"{path}: must be one of {', '.join(map(repr, args))}{hint}, not {_show(value)}")
        return None
    if dataclasses.is_dataclass(hint):
        return _read(typing.cast(type, hint), value, path, errors)
    if hint is Any:
        if not _is_json(value):
            errors.append(f"{path}: must be a text, a number, true or false, a list or a table, not {_show(value)}")
        return value
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            form = f"a table like [{path}]" if args[1] is Any else f"tables like [{path}.honesty]"
            errors.append(f"{path}: must be {form}, not {_show(value)}")
            return None
        read = {str(k): _read_value(args[1], v, _join(path, str(k)), errors) for k, v in value.items()}
        return {k: v for k, v in read.items() if v is not None}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            what = "numbers" if args[0] is float else "texts"
            errors.append(f"{path}: must be a list of {what}, not {_show(value)}")
            return None
        return tuple(_read_value(args[0], v, f"{path}[{i}]", errors) for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        names = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}
        errors.append(f"{path}: must be {names[hint]}, not {_show(value)}")
        return None
    if hint is float and not math.isfinite(value):
        errors.append(f"{path}: must be a finite number, not {value}")
        return None
    return value


def _is_json(value: Any) -> bool:
    """Does JSON have it? TOML has dates too, which a chat template would not get as the text that they look like."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: v for name, v in plain.items() if v is not None and v != {}}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
