"""Direction files, in and out: the suffix picks the format, and each format is one file beside this one.

==================  ==========================================================================================
``.safetensors``    everything a set of directions holds, bit for bit (:mod:`icon2_rt.formats.safetensors`)
``.gguf``           one direction as the control vector that llama.cpp and repeng read (:mod:`icon2_rt.formats.gguf`)
==================  ==========================================================================================

Nothing is ever pickled. A file that cannot be understood raises a ``ValueError`` that names it and the tensor.
"""

from __future__ import annotations

from pathlib import Path

from icon2_rt.steering import Direction, DirectionSet

SUFFIXES = (".safetensors", ".gguf")


def save(directions: Direction | DirectionSet, path: str | Path) -> None:
    """Write one direction or a set of them to ``path``, whole or not at all.

    Raises:
        ValueError: a suffix that is not in ``SUFFIXES``, an empty set, or something that the format cannot hold.
        OSError: the file cannot be written; one that was there before is left as it was.
    """
    path = Path(path)
    if isinstance(directions, Direction):
        directions = DirectionSet([directions])
    if not isinstance(directions, DirectionSet):
        raise TypeError(f"save takes a Direction or a DirectionSet, not {type(directions).__name__}")
    suffix = _suffix(path)
    if not len(directions):
        raise ValueError(f"{path}: an empty DirectionSet, nothing to save")
    if suffix == ".gguf":
        from icon2_rt.formats import gguf

        gguf.write(directions, path)
    else:
        from icon2_rt.formats import safetensors

        safetensors.write(directions, path)


def load(path: str | Path, *, n_layers: int | None = None) -> DirectionSet:
    """Read every direction of a file; one that holds a single direction gives a set of one.

    ``n_layers`` is the number of decoder blocks of the model. It is needed only for a control vector that another tool
    wrote and that stops before the model's last block: such a file does not say how many blocks there are.

    Raises:
        ValueError: a suffix that is not in ``SUFFIXES``; a file that is corrupt, truncated, of another kind, or whose
            tensors have the wrong size or dtype or hold NaN; a number of blocks that is not ``n_layers``.
        OSError: the file is not there or cannot be read.
    """
    path = Path(path)
    suffix = _suffix(path)
    if suffix == ".gguf":
        from icon2_rt.formats import gguf

        return DirectionSet([gguf.read(path, n_layers)])
    from icon2_rt.formats import safetensors

    directions = safetensors.read(path)
    for direction in directions:
        if n_layers is not None and direction.n_layers != n_layers:
            raise ValueError(f"{path}: direction {direction.name!r} has {direction.n_layers} blocks, not {n_layers}")
    return directions


def _suffix(path: Path) -> str:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a direction file ends in one of {', '.join(SUFFIXES)}, not in {path.suffix!r}")
    return path.suffix.lower()
