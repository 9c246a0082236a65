"""Step 2b: which criterion an instruction agrees with, and how much (the paper's consistency score, Eq. 2 and 3).

The score of instruction d under criterion c is the mean over all blocks of ⟨h(d), u_c⟩, h(d) being the state at the
last token of the chat that holds d alone. ``raw`` takes it as it is, which is the paper's choice; late blocks, where
states are long, and each direction's constant offset then decide most of it. ``zscore`` first brings every (criterion,
block) to mean 0 and deviation 1 over all instructions of the run. ``contrast``, ours, asks another question: how
strongly does *this* instruction react to the criterion's two system prompts? It takes ⟨h⁺(d) - h⁻(d), u_c⟩ in place of
⟨h(d), u_c⟩, and divides by the criterion's mean over all instructions of the run.

Or any function gives the scores: ``scale = "module:function"`` in the config, an :data:`Attribution` in Python.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icon2_rt.pipeline.config import SCALES, FilterConfig
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.instructions import Instruction
from icon2_rt.pipeline.templates import ChatFrame

if TYPE_CHECKING:
    from icon2_rt import Direction, DirectionSet, Runtime

# One criterion taking more than this share of all instructions is reported as degenerate: the choice says little then.
DEGENERATE_SHARE = 0.9


# (instructions, their projections [n, m, n_layers], the m criteria's names) -> scores [n, m], the highest wins.
Attribution = Callable[[Sequence[str], Tensor, Sequence[str]], Any]


@dataclass(frozen=True)
class Consistency:
    """The verdict on n instructions under m criteria.

    Args:
        names: the criteria, in order.
        scores: ``[n, m]`` fp32.
        best: ``[n]`` int64, the column of c*.
        score: ``[n]``, the score under c*.
        margin: ``[n]``, the distance to the second-best criterion (infinity if there is only one).
    """

    names: list[str]
    scores: Tensor
    best: Tensor
    score: Tensor
    margin: Tensor

    @property
    def histogram(self) -> dict[str, int]:
        """How many instructions each criterion got."""
        counts = torch.bincount(self.best, minlength=len(self.names)).tolist()
        return dict(zip(self.names, counts, strict=True))


def projections(rt: Runtime, frame: ChatFrame, instructions: Sequence[Instruction], directions: DirectionSet) -> Tensor:
    """⟨h^l(d), u_c^l⟩ for every instruction, criterion and block: fp32 ``[n, m, n_layers]`` on the CPU."""
    return _project(rt, frame, instructions, None, list(directions))


def contrasts(
    rt: Runtime,
    frame: ChatFrame,
    instructions: Sequence[Instruction],
    directions: DirectionSet,
    criteria: Mapping[str, Criterion],
) -> Tensor:
    """⟨h⁺(d) - h⁻(d), u_c⟩ under each criterion's own two system prompts: fp32 ``[n, m, n_layers]`` on the CPU."""

    def under(system: str, direction: Direction) -> Tensor:
        return _project(rt, frame, instructions, system, [direction])[:, 0]

    found = [under(criteria[d.name].positive, d) - under(criteria[d.name].negative, d) for d in directions]
    return torch.stack(found, dim=1)


def _project(
    rt: Runtime,
    frame: ChatFrame,
    instructions: Sequence[Instruction],
    system: str | None,
    directions: Sequence[Direction],
) -> Tensor:
    """``[n, m, n_layers]``; the tokens that all chats begin with (template and system prompt) are prefilled once."""
    chats = [rt.encode(frame.messages(item.text, system=system)) for item in instructions]
    columns = zip(*(chat[:-1] for chat in chats), strict=False)
    shared = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
    if not shared:
        return rt.project(chats, directions)
    with rt.prefix(shared) as prefix:
        return rt.project([chat[len(shared) :] for chat in chats], directions, prefix=prefix)


def judge(
    projected: Tensor, names: Sequence[str], scale: str | Attribution = "raw", texts: Sequence[str] = ()
) -> Consistency:
    """Scores, c* and margins from projections (for "contrast", from contrasts) ``[n, m, n_layers]``.

    ``scale`` may be a function, which is given ``texts``, the instructions, too.

    Raises:
        ValueError: another shape, no instruction, NaN, an unknown scale, or scores of a function that are none.
    """
    if projected.ndim != 3 or projected.shape[1] != len(names) or 0 in projected.shape:
        raise ValueError(
            f"projections must be [instructions, {len(names)} criteria, blocks], none of them 0; "
            f"got {list(projected.shape)}"
        )
    if not torch.isfinite(projected).all():
        row = int((~torch.isfinite(projected)).flatten(1).any(dim=1).nonzero()[0])
        raise ValueError(f"the projection of instruction {row} holds NaN or infinity")
    values = projected.double()
    if scale == "zscore":
        deviation = values.std(dim=0, unbiased=False)
        # A block without a direction, or a single instruction, has no spread: it then says nothing, for anyone.
        values = (values - values.mean(dim=0)) / torch.where(deviation > 0, deviation, math.inf)
    elif not callable(scale) and scale not in SCALES:
        raise ValueError(f"scale must be 'raw', 'zscore', 'contrast' or a function, not {scale!r}")
    scores = _attributed(scale, texts, projected, names) if callable(scale) else values.mean(dim=2)
    if scale == "contrast":
        # A criterion whose prompts do not move the instructions along its direction on average has nothing to say.
        typical = scores.mean(dim=0)
        scores = scores / torch.where(typical > 0, typical, math.inf)
    top = scores.topk(min(2, len(names)), dim=1).values
    margin = top[:, 0] - top[:, 1] if len(names) > 1 else torch.full((len(scores),), math.inf, dtype=torch.double)
    score, best = scores.max(dim=1)
    return Consistency(list(names), scores.float(), best, score.float(), margin.float())


def _attributed(scale: Attribution, texts: Sequence[str], projected: Tensor, names: Sequence[str]) -> Tensor:
    """The scores of the user's function, ``[n, m]`` fp64."""
    try:
        given = scale(list(texts), projected, list(names))
    except Exception as error:  # it is the user's code, and may raise anything
        raise ValueError(f"filter.scale: the function raised {type(error).__name__}: {error}") from error
    try:
        scores = torch.as_tensor(given, dtype=torch.double, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"filter.scale: the function must return a number per instruction and criterion: {error}"
        ) from None
    if scores.shape != projected.shape[:2]:
        raise ValueError(
            f"filter.scale: the function must return scores [{len(projected)} instructions, {len(names)} criteria], "
            f"not of shape {list(scores.shape)}"
        )
    if not torch.isfinite(scores).all():
        row, column = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(
            f"filter.scale: the function's score of instruction {row} under {names[column]!r} is "
            f"{scores[row, column].item()}: {texts[row] if texts else ''!r:.60}"
        )
    return scores


def with_given(verdict: Consistency, given: Sequence[str | None]) -> Consistency:
    """The verdict with c* replaced where an instruction came with a criterion of its own."""
    forced = [i for i, name in enumerate(given) if name is not None]
    if not forced:
        return verdict
    best, score, margin = verdict.best.clone(), verdict.score.clone(), verdict.margin.clone()
    for i in forced:
        column = verdict.names.index(str(given[i]))
        others = [float(s) for j, s in enumerate(verdict.scores[i]) if j != column]
        best[i], score[i] = column, verdict.scores[i, column]
        margin[i] = float(score[i]) - max(others) if others else math.inf
    return Consistency(verdict.names, verdict.scores, best, score, margin)


def select(verdict: Consistency, config: FilterConfig) -> list[int]:
    """The rows to keep, ascending: the best share by score among those with enough margin.

    At least one is kept if any has the margin; ties at the cut go to the lower row, so the choice is always the same.
    """
    rows = [i for i, margin in enumerate(verdict.margin.tolist()) if config.margin is None or margin >= config.margin]
    if not rows:
        return []
    count = max(1, round(config.keep * len(verdict.score)))
    scores = verdict.score.tolist()
    return sorted(sorted(rows, key=lambda i: (-scores[i], i))[:count])


def warnings(verdict: Consistency) -> list[str]:
    """What a person should know before trusting c*."""
    total, histogram = len(verdict.best), verdict.histogram
    if len(histogram) < 2:
        return []
    name, most = Counter(histogram).most_common(1)[0]
    found = []
    if most > DEGENERATE_SHARE * total:
        found.append(
            f"c* is degenerate: {most} of {total} instructions get {name!r}. The score mostly measures that "
            f'direction\'s own offset; compare filter.scale = "zscore", or use one criterion'
        )
    silent = [other for column, other in enumerate(verdict.names) if not verdict.scores[:, column].any()]
    if silent:
        found.append(
            f"{', '.join(map(repr, silent))}: all scores are 0. Its prompts do not move the instructions along its own "
            f"direction, or they all lie alike: it can never be c*"
        )
    missing = [other for other, count in histogram.items() if count == 0 and other not in silent]
    if missing:
        found.append(f"no instruction gets {', '.join(map(repr, missing))} as its criterion")
    return found
