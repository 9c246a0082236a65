"""Directions as safetensors: the native format, equal after a round trip.

For each direction two fp32 tensors, ``NAME.vectors`` [n_layers, hidden_size] (unit rows) and ``NAME.scale`` [n_layers];
everything else is one JSON text under the metadata key ``icon2_rt`` (:mod:`icon2_rt.formats.record`). One key only: the
library writes several in no fixed order, and the same directions should give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from icon2_rt.atomic import replacing
from icon2_rt.formats import record
from icon2_rt.steering import DirectionSet

KEY = "icon2_rt"


def write(directions: DirectionSet, path: Path) -> None:
    """Write a set of directions; see :func:`icon2_rt.formats.save`."""
    tensors = {}
    for direction in directions:
        tensors[f"{direction.name}.vectors"] = direction.vectors
        tensors[f"{direction.name}.scale"] = direction.scale.contiguous()
    text = record.dump([record.describe(direction) for direction in directions])
    content = safetensors.torch.save(tensors, metadata={KEY: text})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read(path: Path) -> DirectionSet:
    """Read a set of directions; see :func:`icon2_rt.formats.load`."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a direction file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied, so that nothing depends on a file that may be replaced or cut short later.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if KEY not in metadata:
        raise ValueError(
            f"{path} holds no directions: a file written by Direction.save or DirectionSet.save has the metadata key "
            f"{KEY!r}, this one has {sorted(metadata)} and the tensors {sorted(tensors)[:4]}"
        )
    records = record.parse(metadata[KEY], path)
    expected = {f"{r['name']}.{part}" for r in records for part in ("vectors", "scale")}
    if expected != tensors.keys():
        missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise ValueError(
            f"{path}: its description and its tensors disagree: missing {missing}, not described {unknown}"
        )
    found = []
    for r in records:
        rows, columns = r["n_layers"], r["hidden_size"]
        vectors = _checked(tensors, f"{r['name']}.vectors", [rows, columns], path)
        scale = _checked(tensors, f"{r['name']}.scale", [rows], path)
        try:
            found.append(record.restore(r, vectors, scale))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    try:
        return DirectionSet(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(tensors: dict[str, Tensor], name: str, shape: list[int], path: Path) -> Tensor:
    tensor = tensors[name]
    if tensor.dtype != torch.float32:
        raise ValueError(f"{path}: tensor {name!r} is {tensor.dtype}; torch.float32 is needed")
    if list(tensor.shape) != shape:
        raise ValueError(f"{path}: tensor {name!r} has shape {list(tensor.shape)}; its description says {shape}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: tensor {name!r} holds NaN or infinity")
    return tensor
