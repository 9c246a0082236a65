"""Step 2b: which criterion an instruction agrees with, and how much (the paper's consistency score, Eq. 2 and 3).

The score of instruction d under criterion c is the mean over all blocks of ⟨h(d), u_c⟩, h(d) being the state at the
last token of the chat that holds d alone. ``raw`` takes it as it is, which is the paper's choice; late blocks, where
states are long, and each direction's constant offset then decide most of it. ``zscore`` first brings every (criterion,
block) to mean 0 and deviation 1 over all instructions of the run. ``contrast``, ours, asks another question: how
strongly does *this* instruction react to the criterion's two system prompts? It takes ⟨h⁺(d) - h⁻(d), u_c⟩ in place of
⟨h(d), u_c⟩, and divides by the criterion's mean over all instructions of the run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icon2_rt.pipeline.config import FilterConfig
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.instructions import Instruction
from icon2_rt.pipeline.templates import ChatFrame

if TYPE_CHECKING:
    from icon2_rt import Direction, DirectionSet, Runtime

# One criterion taking more than this share of all instructions is reported as degenerate: the choice says little then.
DEGENERATE_SHARE = 0.9


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
    return rt.project([frame.messages(instruction.text) for instruction in instructions], directions)


def contrasts(
    rt: Runtime,
    frame: ChatFrame,
    instructions: Sequence[Instruction],
    directions: DirectionSet,
    criteria: Mapping[str, Criterion],
) -> Tensor:
    """⟨h⁺(d) - h⁻(d), u_c⟩ under each criterion's own two system prompts: fp32 ``[n, m, n_layers]`` on the CPU."""

    def under(system: str, direction: Direction) -> Tensor:
        return rt.project([frame.messages(item.text, system=system) for item in instructions], [direction])[:, 0]

    found = [under(criteria[d.name].positive, d) - under(criteria[d.name].negative, d) for d in directions]
    return torch.stack(found, dim=1)


def judge(projected: Tensor, names: Sequence[str], scale: str = "raw") -> Consistency:
    """Scores, c* and margins from projections (for "contrast", from contrasts) ``[n, m, n_layers]``.

    Raises:
        ValueError: another shape, no instruction, NaN, or an unknown scale.
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
    elif scale not in ("raw", "contrast"):
        raise ValueError(f"scale must be 'raw', 'zscore' or 'contrast', not {scale!r}")
    scores = values.mean(dim=2)
    if scale == "contrast":
        # A criterion whose prompts do not move the instructions along its direction on average has nothing to say.
        typical = scores.mean(dim=0)
        scores = scores / torch.where(typical > 0, typical, math.inf)
    top = scores.topk(min(2, len(names)), dim=1).values
    margin = top[:, 0] - top[:, 1] if len(names) > 1 else torch.full((len(scores),), math.inf, dtype=torch.double)
    score, best = scores.max(dim=1)
    return Consistency(list(names), scores.float(), best, score.float(), margin.float())


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
    missing = [other for other, count in histogram.items() if count == 0]
    if missing:
        found.append(f"no instruction gets {', '.join(map(repr, missing))} as its criterion")
    return found
