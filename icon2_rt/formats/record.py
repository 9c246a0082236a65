"""What a file says about a direction beside its numbers: one JSON record, the same in every format that holds text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from icon2_rt.steering import Direction

# Written into every file and compared on reading: an index without its convention is worth nothing.
LAYERS = (
    "row i acts on the residual stream after decoder block i (0-based): transformers' hidden_states[i + 1], for the "
    "last block before the final norm"
)
VERSION = 1

_OPTIONAL = ("model", "model_name", "method")


def describe(direction: Direction) -> dict[str, Any]:
    """The record of one direction, ready for JSON: everything but its two tensors.

    Raises:
        TypeError: metadata that is not text, which would come back as something else.
    """
    for key, value in direction.metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"direction {direction.name!r}: metadata is text, not {key!r}: {value!r}")
    return {
        "name": direction.name,
        "n_layers": direction.n_layers,
        "hidden_size": direction.hidden_size,
        **{key: getattr(direction, key) for key in _OPTIONAL},
        "health": {name: [float(x) for x in figures] for name, figures in direction.health.items()},
        "metadata": dict(direction.metadata),
    }


def restore(record: dict[str, Any], vectors: Tensor, scale: Tensor) -> Direction:
    """The direction of a record, over its ``vectors`` [n_layers, hidden_size] and ``scale`` [n_layers], fp32."""
    return Direction(
        record["name"],
        vectors,
        scale,
        **{key: record[key] for key in _OPTIONAL},
        health=record["health"],
        metadata=record["metadata"],
    )


def dump(directions: list[dict[str, Any]]) -> str:
    """The text that goes into a file."""
    return json.dumps({"version": VERSION, "layers": LAYERS, "directions": directions})


def parse(text: str, path: Path) -> list[dict[str, Any]]:
    """The records in a file's text, checked.

    Raises:
        ValueError: not JSON, another version or layer convention, or a record with a wrong or missing field.
    """
    try:
        content = json.loads(text)
        version, layers, records = content["version"], content["layers"], content["directions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the description of its directions cannot be read ({error!r})") from error
    if version != VERSION:
        raise ValueError(f"{path}: description version {version!r}; this release reads version {VERSION}")
    if layers != LAYERS:
        raise ValueError(f"{path}: its layer convention is {layers!r}; this release reads {LAYERS!r}")
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: its description names no direction")
    for record in records:
        _check(record, path)
    names = [record["name"] for record in records]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: its description names a direction twice: {names}")
    return records


def _check(record: Any, path: Path) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{path}: a direction is described by {record!r}, not by named fields")
    name = record.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: a direction has the name {name!r}; a non-empty text is needed")
    for field in ("n_layers", "hidden_size"):
        value = record.get(field)
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: direction {name!r} has {field} {value!r}; a positive integer is needed")
    for field in _OPTIONAL:
        if not isinstance(record.setdefault(field, None), str | None):
            raise ValueError(f"{path}: direction {name!r} has {field} {record[field]!r}; text or null is needed")
    health, metadata = record.setdefault("health", {}), record.setdefault("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: direction {name!r} has metadata that is not text: {metadata!r}")
    if not isinstance(health, dict) or not all(
        isinstance(figures, list) and all(isinstance(x, float) for x in figures) for figures in health.values()
    ):
        raise ValueError(f"{path}: direction {name!r} has health figures that are not lists of numbers: {health!r}")
