"""What a run was made with: written before the first byte of work, compared before any run is continued.

The *identity* is everything that decides the bytes: the config, the files it names, the model, its chat template, the
versions and the machine. Two runs with different identities never share a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icon2_rt.pipeline.config import PAPER_TRAINING, RunConfig
from icon2_rt.pipeline.environment import DECIDING, machine
from icon2_rt.pipeline.files import sha256
from icon2_rt.pipeline.functions import function_file
from icon2_rt.pipeline.instructions import instruction_sampling
from icon2_rt.pipeline.pairs import response_sampling
from icon2_rt.pipeline.sampling import stage_seed
from icon2_rt.pipeline.templates import ChatFrame
from icon2_rt.versions import versions

if TYPE_CHECKING:
    from icon2_rt import Runtime
    from icon2_rt.qualify import Qualification

FORMAT = 1


def asked_for(config: RunConfig) -> dict[str, Any]:
    """The part of the identity that is known before the model is loaded: the settings, and the files they name."""
    named = {
        "directions.file": config.directions.file,
        "directions.features_file": config.directions.features_file,
        "instructions.file": config.instructions.file,
        "filter.scale": function_file(config.filter.scale),
        "baseline.judge": function_file((config.baseline and config.baseline.judge) or ""),
        "calibration.judge": function_file((config.calibration and config.calibration.judge) or ""),
    }
    checksums = {key: sha256(Path(path).read_bytes()) for key, path in named.items() if path is not None}
    return {"config": config.to_dict(), "files": checksums}


def found(rt: Runtime, frame: ChatFrame) -> dict[str, Any]:
    """The part that the model and the machine decide."""
    return {
        "model": {
            "fingerprint": rt.fingerprint,
            "n_layers": rt.spec.n_layers,
            "hidden_size": rt.spec.hidden_size,
            "vocab_size": rt.spec.vocab_size,
        },
        "chat_template": frame.to_dict(),
        "versions": versions(DECIDING),
        "machine": machine(rt),
    }


def refuse_another(before: Mapping[str, Any] | None, now: Mapping[str, Any], folder: Path) -> None:
    """Compare the identity in a folder's manifest with the present one, as far as that is known.

    Raises:
        ValueError: they differ; every difference is listed with its key's path.
    """
    if before is None:
        return
    then: Mapping[str, Any] = before["identity"]
    differences = []
    for part in now:
        old, new = _flat(then.get(part, {})), _flat(now[part])
        for key in [*old, *(k for k in new if k not in old)]:
            if old.get(key) != new.get(key):
                name = key if part == "config" else f"{part}.{key}"
                differences.append(f"  {name}: {_brief(old.get(key))} there, {_brief(new.get(key))} now")
    if differences:
        raise ValueError(
            f"out: the run in {folder} was made with other settings; continuing would mix two runs. Name a new folder, "
            f"or restore what differs:\n" + "\n".join(differences)
        )


def compose(
    config: RunConfig,
    identity: Mapping[str, Any],
    frame: ChatFrame,
    bands: Mapping[str, Sequence[int]],
    eos: Sequence[int],
    qualification: Qualification | None = None,
) -> dict[str, Any]:
    """The manifest of a run that begins; its counts are added when it is finished. ``qualification``: what the device
    has proven, told beside the identity, since its times and dates decide no bytes."""
    notes = []
    if frame.default_system is not None:
        notes.append(
            f"the chat template puts in a system prompt of its own when none is given ({frame.default_system!r}): it "
            f"is there in instructions, scores and pairs, and the contrastive prompts replace it for the directions"
        )
    if frame.system == "user":
        notes.append("the chat template has no system turn: the contrastive prompts stand in front of the user's text")
    if frame.template.clock is not None:
        gave = ", ".join(repr(text) for text in frame.template.clock.values())
        notes.append(
            f"the chat template prints the date; it is frozen at {gave} for this run and whatever continues it, and a "
            f"trainer that renders the chats on another day prints another date"
        )
    if config.template:
        notes.append(
            f"the chat template's variables were set to {dict(config.template)}; a trainer must render the chats with "
            f"the same, as TRL's do by the column chat_template_kwargs"
        )
    criteria = config.resolved_criteria()
    return {
        "format": FORMAT,
        "identity": dict(identity),
        "criteria": {name: dataclasses.asdict(criterion) for name, criterion in criteria.items()},
        "controlled_layers": {band: list(layers) for band, layers in bands.items()},
        "seeds": {
            "run": config.seed,
            **{stage: stage_seed(config.seed, stage) for stage in ("instructions", "calibration", "pairs")},
        },
        "sampling": {
            "instructions": instruction_sampling(config.instructions, frame).to_diff_dict(),
            "pairs": response_sampling(config.pairs, eos, frame.end_string).to_diff_dict(),
        },
        "training": dict(PAPER_TRAINING),
        "notes": notes,
        **({} if qualification is None else {"qualification": qualification.brief()}),
        "finished": False,
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    pairs: dict[str, Any] = {}
    for key, inner in value.items():
        pairs |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return pairs


def _brief(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
