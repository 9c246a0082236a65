"""GGUF control vectors: one direction, as llama.cpp and repeng read it.

Which block ``direction.N`` acts on was read in both implementations, because the two "minus one" in llama.cpp look
like a shift and cancel:

- llama.cpp's loader puts ``direction.N`` at offset ``(N - 1) * n_embd`` of a flat buffer, and the adapter fills the
  slot of block ``il`` from offset ``(il - 1) * n_embd``, for ``il`` from 1. So ``direction.N`` belongs to block N,
  0-based. The model graphs add it after the feed-forward residual, just before the tensor named ``l_out-N``: to the
  residual stream after block N.
- repeng's layer ids are 0-based indices into the model's list of blocks, its wrapper adds to the block's output, and
  its exporter writes ``direction.{id}``.

So **row i of a Direction is** ``direction.i``, the same number. There is no slot for block 0: llama.cpp starts at 1
and refuses a file with ``direction.0`` whole, and repeng does not extract there by default. (llama.cpp's own
cvector-generator measures after block N - 1 what it writes as ``direction.N``; such a file is read as llama.cpp
applies it, after block N.)

The tensors are F32, one-dimensional, and hold ``scale * vector``: strength 1 here is ``--control-vector FILE`` there.
``controlvector.model_hint`` (text) is required by repeng; ``controlvector.layer_count`` is the number of tensors, and
neither reads it. Both ignore keys they do not know, so what else a Direction holds is in ``icon2_rt.direction`` (JSON),
its scale in ``icon2_rt.scale``. llama.cpp refuses tensors of any other name, so there are none.

A round trip gives back everything but: vectors of blocks whose scale is 0 (they are not written), and the last bit of a
vector whose scale is not a power of two (it went through the product).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from icon2_rt.atomic import replacing
from icon2_rt.formats import record
from icon2_rt.steering import Direction, DirectionSet

ARCHITECTURE = "controlvector"
_MODEL_HINT = f"{ARCHITECTURE}.model_hint"
_LAYER_COUNT = f"{ARCHITECTURE}.layer_count"
_DESCRIPTION = "icon2_rt.direction"
_SCALE = "icon2_rt.scale"
_TENSOR = re.compile(r"direction\.([0-9]+)")


def write(directions: DirectionSet, path: Path) -> None:
    """Write one direction; see :func:`icon2_rt.formats.save`.

    Raises:
        ValueError: more than one direction, one that acts after block 0, or one that acts nowhere.
    """
    if len(directions) != 1:
        raise ValueError(
            f"{path}: a GGUF control vector holds one direction, not {directions.names}; "
            f"save each to a file of its own, or all of them as .safetensors"
        )
    (direction,) = directions
    if 0 in direction.layers:
        raise ValueError(
            f"{path}: direction {direction.name!r} acts after block 0, for which a GGUF control vector has no place "
            f"(llama.cpp's first is direction.1, after block 1). Save the rest, direction[1:], or use .safetensors"
        )
    if not direction.layers:
        raise ValueError(f"{path}: direction {direction.name!r} has scale 0 at every block, nothing to write")
    product = (direction.vectors.double() * direction.scale.double()[:, None]).float().numpy()
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_name(direction.name)
        writer.add_string(_MODEL_HINT, direction.metadata.get("model_hint") or direction.model_name or "unknown")
        writer.add_uint32(_LAYER_COUNT, len(direction.layers))
        writer.add_string(_DESCRIPTION, record.dump([record.describe(direction)]))
        writer.add_array(_SCALE, direction.scale.tolist())
        for layer in direction.layers:
            writer.add_tensor(f"direction.{layer}", product[layer])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read(path: Path, n_layers: int | None = None) -> Direction:
    """Read the direction of a control vector, ours or another tool's; see :func:`icon2_rt.formats.load`.

    From another tool's file: the scale is the length that each tensor has; the name is ``general.name`` or the file's;
    the number of blocks, unless given, is the smallest that the file allows, max(highest N + 1, layer_count).
    """
    reader = _open(path)
    architecture = _field(reader, "general.architecture", path)
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{path} is a GGUF file of architecture {architecture!r}; a control vector says {ARCHITECTURE!r}"
        )
    rows = _rows(reader, path)
    text = _field(reader, _DESCRIPTION, path)
    if text is not None:
        return _ours(reader, rows, record.parse(text, path), n_layers, path)
    count = _field(reader, _LAYER_COUNT, path)
    needed = max(max(rows) + 1, count if isinstance(count, int) else 0)
    if n_layers is None:
        n_layers = needed
    elif n_layers <= max(rows):
        raise ValueError(
            f"{path} holds direction.{max(rows)}, for block {max(rows)}; a model of {n_layers} blocks has none"
        )
    vectors = torch.zeros(n_layers, len(next(iter(rows.values()))))
    for layer, row in rows.items():
        vectors[layer] = torch.from_numpy(row)
    name, hint = _field(reader, "general.name", path), _field(reader, _MODEL_HINT, path)
    return Direction(
        name if isinstance(name, str) and name else path.stem,
        vectors,
        method="imported",
        metadata={"model_hint": hint} if isinstance(hint, str) else {},
    )


def _ours(
    reader: gguf.GGUFReader,
    rows: dict[int, NDArray[Any]],
    records: list[dict[str, Any]],
    n_layers: int | None,
    path: Path,
) -> Direction:
    """Undo ``scale * vector`` with the recorded scale, which also knows the sign."""
    if len(records) != 1:
        raise ValueError(f"{path}: its description names {len(records)} directions; a control vector holds one")
    (described,) = records
    shape = described["n_layers"], described["hidden_size"]
    if n_layers not in (None, shape[0]):
        raise ValueError(f"{path}: direction {described['name']!r} has {shape[0]} blocks, not {n_layers}")
    scale = np.asarray(_field(reader, _SCALE, path), dtype=np.float32)
    if scale.shape != shape[:1]:
        raise ValueError(f"{path}: {_SCALE} has shape {list(scale.shape)}; its description says [{shape[0]}]")
    if set(rows) != set(np.flatnonzero(scale).tolist()):
        raise ValueError(f"{path}: tensors for blocks {sorted(rows)}, but {_SCALE} is nonzero at other blocks")
    vectors = np.zeros(shape, dtype=np.float32)
    for layer, row in rows.items():
        if row.shape != shape[1:]:
            raise ValueError(
                f"{path}: tensor 'direction.{layer}' has {len(row)} elements; its description says {shape[1]}"
            )
        length = float(np.linalg.norm(row.astype(np.float64)))
        if not np.isclose(length, abs(scale[layer]), rtol=1e-5, atol=0):
            raise ValueError(
                f"{path}: tensor 'direction.{layer}' has length {length:g}, but {_SCALE} says {scale[layer]:g}: one of "
                f"the two was changed by another tool. Remove the icon2_rt keys to read it as a plain control vector"
            )
        vectors[layer] = row.astype(np.float64) / scale[layer]
    return record.restore(described, torch.from_numpy(vectors), torch.from_numpy(scale))


class _BoundedReader(gguf.GGUFReader):
    """The reader, but stopping at the end of the file: a corrupt length would otherwise be read as empty for ever."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> NDArray[Any]:
        if not 0 <= offset <= offset + int(count) * np.dtype(dtype).itemsize <= len(self.data):
            raise ValueError(f"{int(count)} values of {np.dtype(dtype)} wanted at byte {offset} of {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return _BoundedReader(path)
    except OSError:
        raise
    except Exception as error:  # the reader checks little, so that a corrupt file can fail in any way
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error


def _field(reader: gguf.GGUFReader, key: str, path: Path) -> Any:
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except Exception as error:
        raise ValueError(f"{path}: its key {key!r} cannot be read: {error}") from error


def _rows(reader: gguf.GGUFReader, path: Path) -> dict[int, NDArray[Any]]:
    """Block → fp32 vector, for every tensor in the file, checked as llama.cpp does."""
    rows: dict[int, NDArray[Any]] = {}
    for tensor in reader.tensors:
        match = _TENSOR.fullmatch(tensor.name)
        if match is None:
            raise ValueError(
                f"{path}: tensor {tensor.name!r} is not direction.N: not a control vector that llama.cpp takes"
            )
        layer = int(match[1])
        if layer == 0:
            raise ValueError(
                f"{path}: tensor 'direction.0' has no place in a control vector: direction.N acts after block N, from "
                f"N = 1 on, and llama.cpp refuses a file with a zero. The tool that wrote it may count otherwise (the "
                f"embeddings as 0, or block 1 as 0); find out which, and renumber or remove the tensor"
            )
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            raise ValueError(f"{path}: tensor {tensor.name!r} is {tensor.tensor_type.name}; F32 is needed")
        if tensor.data.ndim != 1 or not tensor.data.size:
            raise ValueError(
                f"{path}: tensor {tensor.name!r} has shape {list(tensor.data.shape)}; one dimension is needed"
            )
        row = np.array(tensor.data, dtype=np.float32)
        if not np.isfinite(row).all():
            raise ValueError(f"{path}: tensor {tensor.name!r} holds NaN or infinity")
        if layer in rows:
            raise ValueError(f"{path}: block {layer} has two tensors, {tensor.name!r} the second")
        first = next(iter(rows.values()), row)
        if len(row) != len(first):
            raise ValueError(f"{path}: tensor {tensor.name!r} has {len(row)} elements, the one before has {len(first)}")
        rows[layer] = row
    if not rows:
        raise ValueError(f"{path}: a control vector without a single direction.N")
    return rows
