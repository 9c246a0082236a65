"""Directions and steerings as values: what is added to a residual stream, before any engine is involved.

A *direction* is a unit vector per decoder block. A *steering* is what is done to one row's residual stream after
block ``i``::

    h  <-  h + sum_k (alpha_k[i] + beta_k[i] * <h, u_k[i]>) * u_k[i]

Addition is (alpha, 0), ablation (0, -1), clamping the projection to t is (t, -1), amplification (0, beta). Everything
here is data and arithmetic on it; the engine only sees the result of :func:`compile_steering`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Literal, SupportsIndex

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from icon2_rt.notebook import table

Scope = Literal["response", "generated", "all"]
SCOPES: tuple[Scope, ...] = ("response", "generated", "all")

# A Gram-Schmidt remainder shorter than this means "already in the span": fp32 unit vectors are exact to about 1e-7.
_DEPENDENT = 1e-5


@dataclass(frozen=True, eq=False)
class Direction:
    """One direction per decoder block, for one criterion.

    Args:
        name: what it stands for (``"honesty"``).
        vectors: ``[n_layers, hidden_size]``, any length; stored as unit rows, fp32, on the CPU. Row ``i`` acts on the
            residual stream *after* block ``i`` (transformers' ``hidden_states[i + 1]``; for the last block the state
            before the final norm).
        scale: ``[n_layers]``, what a strength of 1 means at each block. Default: the length that each row had. 0 = no
            direction at that block.
        model: fingerprint of the model it was made on, if known. model_name: that model's name, for people.
        method: how it was made (``"pca"``, ``"mean_difference"``, ``"imported"`` …).
        health: per-block figures that came with it (``"sign_agreement"`` → a float per block).
        metadata: any other facts worth keeping, as strings.

    Raises:
        ValueError: wrong rank, an empty name, NaN or infinity, a scale without a vector behind it.
    """

    name: str
    vectors: Tensor
    scale: Tensor = None  # type: ignore[assignment]  # filled in __post_init__
    model: str | None = field(default=None, kw_only=True)
    model_name: str | None = field(default=None, kw_only=True)
    method: str | None = field(default=None, kw_only=True)
    health: Mapping[str, Sequence[float]] = field(default_factory=dict, kw_only=True)
    metadata: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a direction needs a non-empty name, not {self.name!r}")
        vectors = torch.as_tensor(self.vectors, device="cpu").detach().to(torch.float32)
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise ValueError(
                f"direction {self.name!r}: vectors must be [n_layers, hidden_size], one row per decoder block; "
                f"got shape {list(vectors.shape)}"
            )
        if not torch.isfinite(vectors).all():
            rows = (~torch.isfinite(vectors)).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(f"direction {self.name!r}: vectors hold NaN or infinity at block(s) {rows}")
        lengths = vectors.double().norm(dim=1)
        if self.scale is None:
            scale = lengths.float()
        else:
            scale = torch.as_tensor(self.scale, device="cpu").detach().to(torch.float32, copy=True)
            if scale.shape != (len(vectors),):
                raise ValueError(
                    f"direction {self.name!r}: scale must have one number per block, [{len(vectors)}]; "
                    f"got shape {list(scale.shape)}"
                )
            if not torch.isfinite(scale).all():
                raise ValueError(f"direction {self.name!r}: scale holds NaN or infinity")
            hollow = ((scale != 0) & (lengths == 0)).nonzero().flatten().tolist()
            if hollow:
                raise ValueError(
                    f"direction {self.name!r}: scale is nonzero but the vector is zero at block(s) {hollow}"
                )
        unit = (lengths - 1).abs() < 1e-6  # already unit rows stay as they are, so that save -> load is equality
        lengths = torch.where((lengths == 0) | unit, 1.0, lengths)
        object.__setattr__(self, "vectors", (vectors.double() / lengths[:, None]).float().contiguous())
        object.__setattr__(self, "scale", scale)

    @property
    def n_layers(self) -> int:
        return self.vectors.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.vectors.shape[1]

    @property
    def layers(self) -> list[int]:
        """The blocks (0-based) that this direction has a vector for."""
        return self.scale.nonzero().flatten().tolist()

    def __getitem__(self, layers: int | slice | Sequence[int]) -> Direction:
        """The same direction on some blocks only: ``d[9:20]``, ``d[-1]``, ``d[[3, 5]]``. 0-based, end exclusive."""
        n = self.n_layers
        if isinstance(layers, slice):
            chosen = list(range(n))[layers]
            if not chosen:
                raise ValueError(f"direction {self.name!r}: {_show(layers)} selects no block of 0..{n - 1}")
        else:
            if isinstance(layers, Tensor | np.ndarray):
                layers = layers.tolist()
            wanted = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
            chosen = []
            for layer in wanted:  # True is 1 to Python: a mask would silently select blocks 0 and 1
                if isinstance(layer, bool) or not isinstance(layer, SupportsIndex) or not -n <= layer.__index__() < n:
                    raise IndexError(f"direction {self.name!r} has blocks 0..{n - 1} (or -{n}..-1), not {layer!r}")
                chosen.append(layer.__index__())
            if not chosen:
                raise ValueError(f"direction {self.name!r}: an empty list selects no block of 0..{n - 1}")
        keep = torch.zeros(n, dtype=torch.float32, device="cpu")
        keep[chosen] = 1
        return replace(self, scale=self.scale * keep)

    def at(self, layer: int) -> Direction:
        """The same direction on one block only (0-based, negative from the end): ``d[layer]``."""
        if isinstance(layer, bool) or not isinstance(layer, SupportsIndex):
            raise TypeError(f"at() takes one block, not {layer!r}: for several write d[9:20] or d[[3, 5]]")
        return self[layer.__index__()]

    def everywhere(self) -> Direction:
        """The vector of this direction's one block, used at every block, with the scale that it has there.

        For ablating one direction in the whole stream: ``d.at(17).everywhere().ablated().with_scope("all")``. A
        strength adds up: ``0.1 * d.at(17).everywhere()`` pushes by 0.1 (times the scale) after each of the blocks.
        Health figures are left out, as they belong to the vectors of other blocks; ``metadata`` keeps the block.

        Raises:
            ValueError: the direction has vectors at several blocks, or at none.
        """
        if len(self.layers) != 1:
            raise ValueError(
                f"direction {self.name!r} has vectors on blocks {_runs(self.layers)}: everywhere() uses the vector of "
                f"one block at all of them. Choose it first: d.at(17).everywhere()"
            )
        [layer] = self.layers
        return replace(
            self,
            vectors=self.vectors[layer].expand_as(self.vectors),
            scale=self.scale[layer].expand_as(self.scale),
            health={},
            metadata={**self.metadata, "everywhere": f"the vector of block {layer}"},
        )

    __iter__ = None  # sliced by block like a list, but no list of blocks
    __array_ufunc__ = None  # array * direction is a strength per block (__rmul__), not an array of steerings

    def _steer(self, alpha: Tensor, beta: Tensor) -> Steering:
        return Steering((Term(self, alpha, beta),))

    def __mul__(self, strength: float | Sequence[float] | Tensor) -> Steering:
        each = _strength(strength, self)
        self._check_behind("strength", strength, each)
        alpha = each * self.scale
        if bool(each.any()) and not bool(alpha.any()):
            raise ValueError(
                f"strength {strength!r} times the scale of direction {self.name!r} is too small for fp32: nothing "
                f"would be added"
            )
        return self._steer(alpha, torch.zeros_like(alpha))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Steering:
        return self * (1 / divisor)

    def __neg__(self) -> Steering:
        return self * -1.0

    def __add__(self, other: Direction | Steering) -> Steering:
        return _as_part_of(other, self) + other

    def __radd__(self, other: int) -> Steering:
        return other + self * 1.0  # sum([...]) starts from 0

    def __sub__(self, other: Direction | Steering) -> Steering:
        return _as_part_of(other, self) - other

    def ablated(self) -> Steering:
        """Remove the component along this direction: the projection becomes 0 on its blocks."""
        return self.clamped(0.0)

    def clamped(self, target: float | Sequence[float] | Tensor) -> Steering:
        """Set ⟨h, u⟩ to ``target`` (residual units, u the unit vector) on this direction's blocks."""
        present, each = self._present("clamped"), _strength(target, self)
        self._check_behind("target", target, each)
        return self._steer(each * present, -present)

    def amplified(self, factor: float | Sequence[float] | Tensor) -> Steering:
        """Add ``factor · ⟨h, u⟩ · u``: 0.5 makes the component half as large again, -1 is :meth:`ablated`."""
        present, each = self._present("amplified"), _strength(factor, self)
        self._check_behind("factor", factor, each)
        return self._steer(torch.zeros_like(present), each * present)

    def _present(self, verb: str) -> Tensor:
        present = (self.scale != 0).float()
        if not bool(present.any()):
            raise ValueError(f"direction {self.name!r} has no vector on the chosen blocks and cannot be {verb}")
        return present

    def _check_behind(self, what: str, given: object, each: Tensor) -> None:
        """Refuse numbers of which every one that is not 0 lies at a block where this direction has no vector."""
        if bool(each.any()) and not bool((each * (self.scale != 0)).any()):
            raise ValueError(
                f"{what} {given!r} on direction {self.name!r}, which has no vector on the chosen blocks: it has some "
                f"on {_runs(self.layers)}"
            )

    def save(self, path: str | Path) -> None:
        """Write to ``.safetensors`` or ``.gguf`` (see :mod:`icon2_rt.formats`)."""
        from icon2_rt import formats

        formats.save(self, path)

    @staticmethod
    def load(path: str | Path, *, n_layers: int | None = None) -> Direction:
        """Read the one direction of a ``.safetensors`` or ``.gguf`` file; see :func:`icon2_rt.formats.load`."""
        from icon2_rt import formats

        found = formats.load(path, n_layers=n_layers)
        if len(found) != 1:
            raise ValueError(f"{path} holds {len(found)} directions {found.names}: use DirectionSet.load and pick one")
        return next(iter(found))

    def __repr__(self) -> str:
        size = f"n_layers={self.n_layers}, hidden_size={self.hidden_size}"
        return f"Direction({self.name!r}, {size}, layers={_runs(self.layers)})"

    def _repr_html_(self) -> str:
        """For notebooks: the health figures of every block, and what is known of where it comes from."""
        facts = [repr(self), *(str(fact) for fact in (self.method, self.model_name) if fact)]
        facts += [f"{key}: {value}" for key, value in self.metadata.items()]
        figures = {name: list(values) for name, values in self.health.items() if len(values) == self.n_layers}
        rows = ([i, float(self.scale[i]), *(each[i] for each in figures.values())] for i in self.layers)
        return table(" · ".join(facts), ["block", "scale", *figures], rows)


class DirectionSet:
    """Directions by name, in order: one file, one model.

    Raises:
        ValueError: two directions share a name, or their sizes differ.
    """

    def __init__(self, directions: Iterable[Direction]):
        self._by_name: dict[str, Direction] = {}
        for direction in directions:
            if not isinstance(direction, Direction):
                raise TypeError(f"a DirectionSet holds Direction objects, not {type(direction).__name__}")
            if direction.name in self._by_name:
                raise ValueError(f"two directions are named {direction.name!r}")
            self._by_name[direction.name] = direction
        shapes = {d.name: list(d.vectors.shape) for d in self}
        if len({tuple(s) for s in shapes.values()}) > 1:
            raise ValueError(f"directions of different models in one set: [n_layers, hidden_size] are {shapes}")

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def __getitem__(self, name: str) -> Direction:
        if name not in self._by_name:
            raise KeyError(f"no direction {name!r}; there are {self.names}")
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Direction]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def save(self, path: str | Path) -> None:
        """Write all of them to one ``.safetensors`` file."""
        from icon2_rt import formats

        formats.save(self, path)

    @staticmethod
    def load(path: str | Path, *, n_layers: int | None = None) -> DirectionSet:
        """Read every direction of a ``.safetensors`` or ``.gguf`` file; see :func:`icon2_rt.formats.load`."""
        from icon2_rt import formats

        return formats.load(path, n_layers=n_layers)

    def __repr__(self) -> str:
        return f"DirectionSet({self.names})"


@dataclass(frozen=True, eq=False)
class Term:
    """One direction's share in a steering: ``(alpha[i] + beta[i]·⟨h, u_i⟩)·u_i`` after block ``i``.

    ``alpha`` (residual units) and ``beta`` (dimensionless) are fp32 ``[n_layers]``.

    Raises:
        ValueError: another number of blocks than the direction has, NaN or infinity.
    """

    direction: Direction
    alpha: Tensor
    beta: Tensor

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            values = torch.as_tensor(getattr(self, name), dtype=torch.float32, device="cpu")
            if values.shape != self.direction.scale.shape:
                raise ValueError(
                    f"direction {self.direction.name!r}: {name} has one number per block [{self.direction.n_layers}], "
                    f"not shape {list(values.shape)}"
                )
            if not torch.isfinite(values).all():
                raise ValueError(f"direction {self.direction.name!r}: {name} holds NaN or infinity: {values.tolist()}")
            object.__setattr__(self, name, values)


@dataclass(frozen=True, eq=False)
class Steering:
    """What is done to one row's residual stream: a sum of terms, where it starts, and whether the norm is kept.

    ``scope`` says which positions are steered: ``"response"`` (the last prompt token and every generated one),
    ``"generated"`` (generated tokens only) or ``"all"`` (the prompt too). ``keep_norm`` rescales the steered state to
    the norm it had. Build it from directions: ``0.1 * honesty[9:20] - 0.05 * b``.
    """

    terms: tuple[Term, ...] = ()
    scope: Scope = "response"
    keep_norm: bool = False

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {list(SCOPES)}, not {self.scope!r}")
        object.__setattr__(self, "terms", tuple(self.terms))
        for term in self.terms:
            if not isinstance(term, Term):
                raise TypeError(f"a Steering is a sum of Terms, not of {type(term).__name__}: write 0.1 * direction")
        shapes = {tuple(t.direction.vectors.shape) for t in self.terms}
        if len(shapes) > 1:
            raise ValueError(
                f"directions of different models in one steering: [n_layers, hidden_size] are {sorted(shapes)}"
            )

    __array_ufunc__ = None  # number * steering is __rmul__ for numpy's numbers too

    def with_scope(self, scope: Scope) -> Steering:
        """The same steering on other positions: "response", "generated" or "all"."""
        return replace(self, scope=scope)

    def with_keep_norm(self, keep_norm: bool = True) -> Steering:
        """The same steering, the result rescaled to ‖h‖ (left alone where no term is active). Not linear any more."""
        return replace(self, keep_norm=keep_norm)

    def __add__(self, other: Direction | Steering) -> Steering:
        if isinstance(other, Direction):
            other = _as_part_of(self, other)
        if not isinstance(other, Steering):
            return NotImplemented
        for name in ("scope", "keep_norm"):
            if self.terms and other.terms and getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"cannot add steerings whose {name} differs: {getattr(self, name)!r} and {getattr(other, name)!r}. "
                    f"It belongs to the whole steering: set it once, on the sum."
                )
        host = self if self.terms else other
        return replace(host, terms=_merge((*self.terms, *other.terms)))

    def __radd__(self, other: Direction | Steering | int) -> Steering:
        return self if other == 0 else self + other  # type: ignore[operator]  # sum([...]) starts from 0

    def __mul__(self, factor: float) -> Steering:
        if isinstance(factor, Tensor | np.generic) and factor.ndim == 0:
            factor = factor.item()
        if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor):
            raise TypeError(f"a steering is scaled by one finite number, not {factor!r}")
        factor = float(factor)
        terms = tuple(Term(t.direction, factor * t.alpha, factor * t.beta) for t in self.terms)
        for before, after in zip(self.terms, terms, strict=True):
            if factor and bool(_active(before).any()) and not bool(_active(after).any()):
                raise ValueError(
                    f"{factor!r} times the strengths of direction {before.direction.name!r} is too small for fp32: "
                    f"nothing would be done"
                )
        return replace(self, terms=terms)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Steering:
        return self * (1 / divisor)

    def __neg__(self) -> Steering:
        return self * -1.0

    def __sub__(self, other: Direction | Steering) -> Steering:
        return self + -(_as_part_of(self, other) if isinstance(other, Direction) else other)

    @property
    def layers(self) -> list[int]:
        """The blocks (0-based) where some term acts."""
        return sorted({i for t in self.terms for i in ((t.alpha != 0) | (t.beta != 0)).nonzero().flatten().tolist()})

    def __repr__(self) -> str:
        extra = ", keep_norm" if self.keep_norm else ""
        return f"Steering({_written([_term_text(t) for t in self.terms])}, scope={self.scope!r}{extra})"


@dataclass(frozen=True, eq=False)
class CompiledSteering:
    """A steering as the engine runs it: K unit vectors per block and their coefficients, overlaps resolved.

    ``vectors`` holds K fp32 tensors ``[n_layers, hidden]`` with ``keys[k]`` naming the content of each (equal key =
    equal bytes = one slot of the bank); ``alpha``, ``beta`` are fp32 ``[K, n_layers]``. ``names`` and ``places`` say
    which direction each of the K came from, and which term of the steering. A steering that does nothing anywhere
    compiles to None, so that "no steering" has one form.
    """

    vectors: tuple[Tensor, ...]
    keys: tuple[str, ...]
    names: tuple[str, ...]
    places: tuple[int, ...]
    alpha: Tensor
    beta: Tensor
    scope: Scope
    keep_norm: bool

    @property
    def n_terms(self) -> int:
        return len(self.vectors)

    @property
    def n_layers(self) -> int:
        return self.alpha.shape[1]

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """The blocks where each of the K acts: at least one each."""
        acts = (self.alpha != 0) | (self.beta != 0)
        return tuple(tuple(row.nonzero().flatten().tolist()) for row in acts)

    @cached_property
    def terms(self) -> ActiveTerms:
        """The terms that act at each block, first places first."""
        alpha, beta = self.alpha.numpy().T, self.beta.numpy().T  # [n_layers, K]
        acts = (alpha != 0) | (beta != 0)
        which = np.argsort(~acts, axis=1, kind="stable")
        taken = [np.take_along_axis(x, which, axis=1) for x in (alpha, beta)]
        return ActiveTerms(acts.sum(axis=1), which, *taken)

    @cached_property
    def effects(self) -> tuple[object, ...]:
        """What happens after each block, None for nothing: equal entries do the same; hashable."""
        blocks = zip(self.alpha.T.tolist(), self.beta.T.tolist(), strict=True)
        acting = (tuple((k, a, b) for k, a, b in zip(self.keys, *block, strict=True) if a or b) for block in blocks)
        return tuple((self.keep_norm, terms) if terms else None for terms in acting)

    @cached_property
    def identity(self) -> tuple[object, ...]:
        """Equal for two steerings that do the same; hashable."""
        alpha, beta = self.alpha.numpy().tobytes(), self.beta.numpy().tobytes()
        return (self.keys, alpha, beta, self.scope, self.keep_norm)


@dataclass(frozen=True)
class ActiveTerms:
    """A compiled steering block by block: ``count [n_layers]`` terms act; ``which``, ``alpha``, ``beta``
    ``[n_layers, K]`` have those first, in their order, and (0, 0) in the other places."""

    count: np.ndarray
    which: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray


def compile_steering(steering: Steering | None, n_layers: int, hidden_size: int) -> CompiledSteering | None:
    """Check a steering against a model's size and bring it to the form the engine runs.

    Terms with beta = -1 that overlap on a block are orthonormalised there (clamp targets transformed with them), so
    that ablating two directions of cosine 0.9 leaves both projections at zero. A term does not act at a block where its
    vector is zero.

    Returns None when no term has a strength.

    Raises:
        ValueError: another number of blocks or hidden size; two clamps of one direction to different targets; a term
            whose strengths all lie at blocks where its vector is zero.
    """
    if steering is None:
        return None
    if not isinstance(steering, Steering):
        hint = "write 0.1 * direction" if isinstance(steering, Direction) else "build one from a Direction"
        raise TypeError(f"a steering is a Steering or None, not {type(steering).__name__}: {hint}")
    for term in steering.terms:
        d = term.direction
        if (d.n_layers, d.hidden_size) != (n_layers, hidden_size):
            raise ValueError(
                f"direction {d.name!r} has {d.n_layers} blocks of size {d.hidden_size}, "
                f"the model has {n_layers} of size {hidden_size}: it was made on another model"
            )
    places = [k for k, t in enumerate(steering.terms) if bool(_active(t).any())]
    if not places:
        return None
    terms = [steering.terms[k] for k in places]
    vectors = [t.direction.vectors for t in terms]
    alpha = torch.stack([t.alpha for t in terms]).float()
    beta = torch.stack([t.beta for t in terms]).float()
    for k, term in enumerate(terms):
        hollow = _active(term) & ~vectors[k].any(dim=1)
        if torch.equal(hollow, _active(term)):
            raise ValueError(
                f"direction {term.direction.name!r} has a zero vector at every block where its term has a strength "
                f"({_runs(hollow.nonzero().flatten().tolist())}): nothing would be done"
            )
        alpha[k, hollow] = beta[k, hollow] = 0
    pinned = beta == -1
    for layer in (pinned.sum(dim=0) > 1).nonzero().flatten().tolist():
        overlapping = pinned[:, layer].nonzero().flatten().tolist()
        names = [terms[k].direction.name for k in overlapping]
        basis, targets = _orthonormal([vectors[k][layer] for k in overlapping], alpha[overlapping, layer], names, layer)
        for k, u, target in zip(overlapping, basis, targets, strict=True):
            if vectors[k] is terms[k].direction.vectors:
                vectors[k] = vectors[k].clone()
            if u is None:
                alpha[k, layer] = beta[k, layer] = 0
            else:
                vectors[k][layer], alpha[k, layer] = u, target
    acts = ((alpha != 0) | (beta != 0)).any(dim=1)
    kept = acts.nonzero().flatten().tolist()
    vectors = [vectors[k] for k in kept]
    return CompiledSteering(
        vectors=tuple(vectors),
        keys=tuple(_content_key(v) for v in vectors),
        names=tuple(terms[k].direction.name for k in kept),
        places=tuple(places[k] for k in kept),
        alpha=alpha[kept],
        beta=beta[kept],
        scope=steering.scope,
        keep_norm=steering.keep_norm,
    )


def _orthonormal(
    rows: Sequence[Tensor], targets: Tensor, names: Sequence[str], layer: int
) -> tuple[list[Tensor | None], list[float]]:
    """Gram-Schmidt of ``rows`` with targets carried along: ⟨h', u_j⟩ = t_j for all j is kept by ⟨h', q_j⟩ = c_j.

    With u_j = Σ_i R_ij q_i, forward substitution gives c_j = (t_j - Σ_{i<j} R_ij c_i) / R_jj. A dependent row has no
    q_j (None); its target must agree with what the others already fix.
    """
    basis: list[Tensor] = []
    fixed: list[float] = []
    out: list[Tensor | None] = []
    out_targets: list[float] = []
    for row, target, name in zip(rows, targets.tolist(), names, strict=True):
        rest, implied = row.double(), 0.0
        for _ in range(2):  # twice is enough: the second pass removes what rounding left of the first
            for q, c in zip(basis, fixed, strict=True):
                r = torch.dot(rest, q)
                rest = rest - r * q
                implied += float(r) * c
        length = float(rest.norm())
        if length < _DEPENDENT:
            if abs(target - implied) > 1e-4 * max(1.0, abs(target)):
                raise ValueError(
                    f"block {layer}: direction {name!r} is clamped to {target:g}, but the other clamps there "
                    f"already fix its projection at {implied:g}"
                )
            out.append(None)
            out_targets.append(0.0)
            continue
        basis.append(rest / length)
        fixed.append((target - implied) / length)
        out.append(basis[-1].float())
        out_targets.append(fixed[-1])
    return out, out_targets


def _as_part_of(whole: object, direction: Direction) -> Steering:
    """A bare direction in a sum takes the scope and keep_norm of the steering that it is added to."""
    part = direction * 1.0
    return replace(part, scope=whole.scope, keep_norm=whole.keep_norm) if isinstance(whole, Steering) else part


def _merge(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Sum the additive terms of one direction into one: ``a[3] + a[5]`` needs one slot and one dot product.

    Only where beta is zero: two ablations of one direction are one ablation, not beta = -2.
    """
    merged: list[Term] = []
    for term in terms:
        for i, other in enumerate(merged):
            same = other.direction.vectors is term.direction.vectors or (
                other.direction.vectors.shape == term.direction.vectors.shape
                and torch.equal(other.direction.vectors, term.direction.vectors)
            )
            if same and not bool(other.beta.any()) and not bool(term.beta.any()):
                merged[i] = Term(other.direction, other.alpha + term.alpha, other.beta)
                break
        else:
            merged.append(term)
    return tuple(merged)


def _written(terms: Sequence[str]) -> str:
    """A sum as one would write it."""
    if not terms:
        return "nothing"
    rest = (f" - {text[1:]}" if text.startswith("-") else f" + {text}" for text in terms[1:])
    return terms[0] + "".join(rest)


def _term_text(term: Term) -> str:
    """A term as one would write it: ``0.1 * honesty[9:20]``, ``honesty[17].ablated()``.

    Numbers that differ from block to block are shown as ``(smallest … largest)``. A term that no single operation
    makes has its α and β.
    """
    acting = _active(term).nonzero().flatten()
    if not len(acting):
        return f"0 * {term.direction.name}"
    name = f"{term.direction.name}[{_runs(acting.tolist())}]"
    alpha, beta, scale = (values[acting] for values in (term.alpha, term.beta, term.direction.scale))
    if not bool(beta.any()):
        # A merged term may act at blocks where this direction has no scale of its own.
        return f"{_number(alpha / scale if bool(scale.all()) else alpha)} * {name}"
    if bool((beta == -1).all()):
        return f"{name}.clamped({_number(alpha)})" if bool(alpha.any()) else f"{name}.ablated()"
    if not bool(alpha.any()):
        return f"{name}.amplified({_number(beta)})"
    return f"{name} with α={_number(alpha)}, β={_number(beta)}"


def _number(values: Tensor) -> str:
    low, high = (f"{float(v):.6g}" for v in (values.min(), values.max()))
    return low if low == high else f"({low} … {high})"


def _active(term: Term) -> Tensor:
    return (term.alpha != 0) | (term.beta != 0)


def _strength(value: float | Sequence[float] | Tensor, direction: Direction) -> Tensor:
    if isinstance(value, bool | str | Direction | Steering):
        raise TypeError(f"a strength is a number, or one number per block, not {value!r}")
    strength = torch.as_tensor(value, dtype=torch.float32, device="cpu")
    if strength.ndim == 1 and len(strength) == len(direction.layers) != direction.n_layers:
        each = torch.zeros(direction.n_layers, dtype=torch.float32, device="cpu")
        each[direction.layers] = strength
        strength = each
    if strength.ndim > 1 or (strength.ndim == 1 and len(strength) != direction.n_layers):
        raise ValueError(
            f"direction {direction.name!r}: a strength is one number, one per block of the model "
            f"[{direction.n_layers}], or one per block of the slice that has a vector [{len(direction.layers)}], "
            f"not of shape {list(strength.shape)}"
        )
    if not torch.isfinite(strength).all():
        raise ValueError(f"direction {direction.name!r}: strength is NaN or infinite: {value!r}")
    if not bool(strength.any()) and bool(torch.as_tensor(value, dtype=torch.float64, device="cpu").any()):
        raise ValueError(f"direction {direction.name!r}: strength {value!r} is too small for fp32: it would be 0")
    return strength


_KEYS: MutableMapping[Tensor, tuple[int, str]] = WeakIdKeyDictionary()


def _content_key(vectors: Tensor) -> str:
    """A hash of the bytes, remembered per tensor object (slices of a direction share theirs) until it is written to."""
    version = 0 if vectors.is_inference() else vectors._version  # an inference tensor keeps no count
    known = _KEYS.get(vectors)
    if known is None or known[0] != version:
        known = (version, hashlib.sha256(vectors.contiguous().numpy().tobytes()).hexdigest())
        _KEYS[vectors] = known
    return known[1]


def _show(s: slice) -> str:
    return f"[{'' if s.start is None else s.start}:{'' if s.stop is None else s.stop}]"


def _runs(layers: Sequence[int]) -> str:
    """``[9, 10, 11, 20]`` as ``9:12, 20``, the way a person would slice."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([layer, layer + 1])
    return ", ".join(str(a) if b == a + 1 else f"{a}:{b}" for a, b in runs) or "none"
