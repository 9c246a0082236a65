"""Strengths by dose: a ladder of strengths, each tried with both signs, decoded per instruction in one pass.

A strength in residual units means nothing on another model; a dose (strength relative to the residual norm in the
controlled blocks) nearly does. The rule is the paper's: γ⁺ is the rung with the highest mean quality; γ⁻ the one with
the highest mean quality such that the positive response is better in more than 90 % of the instructions; if none
reaches that, the rung with the lowest mean. Quality comes from the model itself (:mod:`icon2_rt.pipeline.quality`) or
from a judge (:mod:`icon2_rt.pipeline.judges`), which is what the paper asks.

Two things are ours. Instructions where the two responses are equally good are left out of that share, as long as they
are no more than 30 %: with common random numbers a mild push often leaves the text as it was, which says nothing about
the pairs that differ. And only *fluent* rungs are candidates: those whose responses lose at most so many nats per
token under the unsteered model, are not cut off by the limit more often, and stay within the divergence that is asked
for.

How much of a choice is luck is told by resampling the instructions: the same rule, a thousand times. And since
strengths look best on the instructions that they were chosen on, the share of better pairs is also given where each
half of the instructions is judged with the strengths that the other half chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icon2_rt.pipeline.config import CalibrationConfig, PairsConfig
from icon2_rt.pipeline.judges import Judge, verdicts
from icon2_rt.pipeline.pairs import Kept, Strengths, residual_profile, response_sampling
from icon2_rt.pipeline.quality import projection
from icon2_rt.pipeline.sampling import sound, stage_seed
from icon2_rt.pipeline.templates import ChatFrame

if TYPE_CHECKING:
    from icon2_rt import DirectionSet, Runtime, Steering

FLUENCY_LOSS = 0.1
CUT_OFF_GAIN = 0.05
RESAMPLES = 1000
INTERVAL = 0.95
MANY_TIES = 0.3
# A criterion with fewer instructions than this gets the strengths that suit all of them together.
FEWEST = 8


@dataclass(frozen=True)
class Rung:
    """One signed dose (0: unsteered): a figure per calibration instruction.

    ``quality`` in the judge's units; ``logprob`` and ``divergence`` in nats per token, the latter the log-probability
    under the steered model less that under the unsteered one (its mean is the Kullback-Leibler divergence of what was
    sampled); ``cut_off`` is 1 where the limit ended the response.
    """

    dose: float
    gamma: float
    quality: tuple[float, ...]
    logprob: tuple[float, ...]
    divergence: tuple[float, ...]
    cut_off: tuple[float, ...]


@dataclass(frozen=True)
class Ladder:
    """All rungs on one band of blocks; ``profile`` is how a strength is spread over them."""

    band: str
    layers: tuple[int, ...]
    profile: tuple[float, ...]
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Rule:
    """What a rung must keep to be a candidate (None: no bound), and how often the positive response must win."""

    fluency_loss: float | None = FLUENCY_LOSS
    max_divergence: float | None = None
    better: float = 0.9

    @classmethod
    def of(cls, config: CalibrationConfig) -> Rule:
        """A judge that reads the text needs no bound on fluency; the self-contained measures do."""
        own = FLUENCY_LOSS if config.judge is None else None
        loss = own if config.fluency_loss is None else config.fluency_loss
        return cls(loss, config.max_divergence, config.better)


@dataclass(frozen=True)
class Choice:
    """The rungs that the rule picks from one ladder, and how sure that is.

    ``ties`` is a share of the instructions, ``better`` of those that are no tie; ``intervals`` has (low, high) over
    resampled instructions for positive and negative dose, better, and the mean quality of every rung.
    """

    ladder: Ladder
    positive: Rung
    negative: Rung
    better: float
    better_held_out: float
    ties: float
    fluent: tuple[bool, ...]
    intervals: dict[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        rungs = [
            {
                "dose": rung.dose,
                "gamma": rung.gamma,
                "quality": fmean(rung.quality),
                "quality_interval": self.intervals["quality"][i],
                "logprob": fmean(rung.logprob),
                "divergence": fmean(rung.divergence),
                "cut_off": fmean(rung.cut_off),
                "beaten": _share(*_compare(self.positive, rung)) if rung.dose < 0 else None,
                "fluent": self.fluent[i],
            }
            for i, rung in enumerate(self.ladder.rungs)
        ]
        return {
            "band": self.ladder.band,
            "layers": list(self.ladder.layers),
            "rungs": rungs,
            "positive_dose": self.positive.dose,
            "negative_dose": self.negative.dose,
            "positive_interval": self.intervals["positive"],
            "negative_interval": self.intervals["negative"],
            "positive_beats_negative": self.better,
            "positive_beats_negative_interval": self.intervals["better"],
            "positive_beats_negative_held_out": self.better_held_out,
            "ties": self.ties,
            "notes": list(self.notes),
        }


def climb(
    rt: Runtime,
    frame: ChatFrame,
    items: Sequence[Kept],
    directions: DirectionSet,
    bands: Mapping[str, Sequence[int]],
    norms: Sequence[float],
    judge: Judge | None,
    config: CalibrationConfig,
    pairs: PairsConfig,
    eos_token_ids: Sequence[int],
    seed: int,
) -> list[Ladder]:
    """Decode and measure every rung of every band: all doses with both signs beside no steering, in one pass over each
    prompt and with the random numbers that the pairs will have.

    Args:
        items: the calibration instructions with their criteria; none of them should be used for pairs.
        bands: by name, the blocks (0-based) to steer.
        norms: mean ‖h‖ after every block; γ = dose · the mean of them over the band.
        judge: None for the projection on the band's own blocks.
    """
    signed = sorted({sign * dose for dose in config.doses for sign in (-1, 1)})
    branches: list[list[Steering] | None] = [None]
    ladders = []
    for band, layers in bands.items():
        norm = fmean(norms[i] for i in layers)
        profile = residual_profile([norms[i] for i in layers], pairs.unit)
        blank = Strengths({}, {}, tuple(layers), profile)
        ladders.append(Ladder(band, tuple(layers), profile, ()))
        for dose in signed:
            pushes = {d.name: blank.push(d, dose * norm) for d in directions}
            branches.append([pushes[item.criterion] for item in items])
    outputs = rt.generate_branches(
        [frame.messages(item.instruction.text) for item in items],
        branches,
        seed=stage_seed(seed, "calibration"),
        noise=pairs.noise,
        sample_ids=[item.instruction.id for item in items],
        generation_config=response_sampling(pairs, eos_token_ids, frame.end_string),
    )
    sound([output.branches[0] for output in outputs])
    # A dose under which some response broke off is no candidate.
    broken = {k for output in outputs for k, c in enumerate(output.branches) if c.finish_reason == "error"}
    responses = [[] if k in broken else [output.branches[k] for output in outputs] for k in range(len(branches))]
    chats = [frame.messages(item.instruction.text) for item in items]
    scored = iter(
        rt.score(chats * (len(branches) - len(broken)), [completion for rung in responses for completion in rung])
    )
    plain = [[fmean(next(scored).logprobs) for _ in rung] for rung in responses]
    texts = [item.instruction.text for item in items]

    def measured(k: int, dose: float, norm: float, by: Judge) -> Rung:
        logprob = plain[k]
        return Rung(
            dose=dose,
            gamma=dose * norm,
            quality=tuple(verdicts(by, texts, [frame.said(completion) for completion in responses[k]])),
            logprob=tuple(logprob),
            divergence=tuple(fmean(c.logprobs) - p for c, p in zip(responses[k], logprob, strict=True)),
            cut_off=tuple(float(c.finish_reason == "length") for c in responses[k]),
        )

    found = []
    for number, ladder in enumerate(ladders):
        norm = fmean(norms[i] for i in ladder.layers)
        by = judge or projection(rt, frame, directions, ladder.layers, [item.criterion for item in items])
        rungs = [measured(0, 0.0, norm, by)]
        places = enumerate(signed, start=1 + number * len(signed))
        rungs += [measured(k, dose, norm, by) for k, dose in places if k not in broken]
        if not min(rung.dose for rung in rungs) < 0 < max(rung.dose for rung in rungs):
            raise FloatingPointError(
                f"calibration.doses: on blocks {ladder.layers[0]} to {ladder.layers[-1]} no positive or no negative "
                f"dose leaves all logits finite; name smaller ones"
            )
        found.append(Ladder(ladder.band, ladder.layers, ladder.profile, tuple(sorted(rungs, key=lambda r: r.dose))))
    return found


def choose(ladder: Ladder, rule: Rule, seed: int = 0, rows: Sequence[int] | None = None) -> Choice:
    """Pick γ⁺ and γ⁻ from a measured ladder by the rule in the module's first lines.

    Args:
        rows: the instructions that count; by default all.
        seed: of the resampling.

    Raises:
        ValueError: the ladder lacks the unsteered rung or one of the signs.
    """
    doses = [rung.dose for rung in ladder.rungs]
    if 0 not in doses or not min(doses, default=0) < 0 < max(doses, default=0):
        raise ValueError("a ladder needs the unsteered rung (dose 0) and at least one dose of each sign")
    n = len(ladder.rungs[0].quality)
    counted = torch.zeros(n, dtype=torch.double)
    counted[list(range(n)) if rows is None else list(rows)] = 1
    table = _Table(ladder.rungs, rule)
    positive, negative, better = (x.item() for x in table.choose(counted[None]))
    resampled = _resample(counted, seed)
    ups, downs, wins = table.choose(resampled)
    dose = torch.tensor(doses, dtype=torch.double)
    means = resampled @ table.quality.T / resampled.sum(dim=1, keepdim=True)
    fluent = table.fluent(counted[None])[0]
    a, b = ladder.rungs[int(positive)], ladder.rungs[int(negative)]
    chosen = counted.nonzero().flatten().tolist()
    notes = []
    for side, name in ((table.ups, "positive"), (table.downs, "negative")):
        if not any(fluent[i] for i in side):
            notes.append(f"no {name} dose leaves the text fluent; the smallest is used")
    ties = fmean(a.quality[i] == b.quality[i] for i in chosen)
    if any(fluent[i] for i in table.downs) and not (better > rule.better and ties <= MANY_TIES):
        notes.append(
            f"no fluent negative dose lets the positive response win in more than {rule.better:.0%} of the calibration "
            f"instructions where the two differ, with no more than {MANY_TIES:.0%} of ties; the one with the lowest "
            f"quality is used"
        )
    return Choice(
        ladder=ladder,
        positive=a,
        negative=b,
        better=float(better),
        better_held_out=table.held_out(chosen),
        ties=ties,
        fluent=tuple(fluent.tolist()),
        intervals={
            "positive": _interval(dose[ups]),
            "negative": _interval(dose[downs]),
            "better": _interval(wins),
            "quality": [_interval(means[:, i]) for i in range(len(doses))],
        },
        notes=tuple(notes),
    )


def best(choices: Sequence[Choice], rule: Rule) -> Choice:
    """The band to use: of those where the positive response wins often enough, the one whose γ⁺ has the highest mean
    quality; if there is none, the one where it wins most often."""
    clear = [choice for choice in choices if choice.better > rule.better and choice.ties <= MANY_TIES]
    if clear:
        return max(clear, key=lambda choice: fmean(choice.positive.quality))
    return max(choices, key=lambda choice: choice.better)


def per_criterion(
    choice: Choice, items: Sequence[Kept], names: Sequence[str], rule: Rule, seed: int = 0
) -> dict[str, Choice]:
    """The rule again for the instructions of each criterion alone; where there are too few, the choice for all."""
    rows = {name: [row for row, item in enumerate(items) if item.criterion == name] for name in names}
    return {n: choose(choice.ladder, rule, seed, rows[n]) if len(rows[n]) >= FEWEST else choice for n in names}


def _compare(positive: Rung, negative: Rung) -> tuple[int, int]:
    """In how many instructions the positive response is better, and in how many they differ."""
    pairs = list(zip(positive.quality, negative.quality, strict=True))
    return sum(p > q for p, q in pairs), sum(p != q for p, q in pairs)


def _share(wins: float, differ: float) -> float:
    """Half where nothing differs: neither is better."""
    return wins / differ if differ else 0.5


class _Table:
    """A ladder's figures as tensors ``[rungs, n]``, and the rule over any number of weightings of the instructions."""

    def __init__(self, rungs: Sequence[Rung], rule: Rule):
        self.quality, self._logprob, self._divergence, self._cut_off = (
            torch.tensor([getattr(rung, name) for rung in rungs], dtype=torch.double)
            for name in ("quality", "logprob", "divergence", "cut_off")
        )
        self.rule = rule
        order = sorted(range(len(rungs)), key=lambda i: abs(rungs[i].dose))  # at equal quality the smaller dose
        self._base = order[0]
        self.ups = [i for i in order if rungs[i].dose > 0]
        self.downs = [i for i in order if rungs[i].dose < 0]
        up, down = self.quality[self.ups][:, None], self.quality[self.downs][None]
        self._wins, self._differ = (up > down).double(), (up != down).double()  # [ups, downs, n]

    def fluent(self, weights: Tensor) -> Tensor:
        """``[b, rungs]`` bool for weightings ``[b, n]`` of the instructions."""
        total = weights.sum(dim=1, keepdim=True)
        logprob, divergence, cut_off = (
            weights @ figures.T / total for figures in (self._logprob, self._divergence, self._cut_off)
        )
        found = cut_off <= cut_off[:, self._base, None] + CUT_OFF_GAIN
        if self.rule.fluency_loss is not None:
            found &= logprob >= logprob[:, self._base, None] - self.rule.fluency_loss
        if self.rule.max_divergence is not None:
            found &= divergence <= self.rule.max_divergence
        return found

    def choose(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For weightings ``[b, n]``: the rungs of γ⁺ and γ⁻ ``[b]``, and how often the first beats the second ``[b]``.

        argmax takes the first of equals, which is the smallest dose, also where nothing is fluent.
        """
        total = weights.sum(dim=1)
        means = (weights @ self.quality.T / total[:, None]).round(decimals=9)  # equal ones must stay equal
        fluent = self.fluent(weights)
        up = torch.where(fluent, means, -torch.inf)[:, self.ups].argmax(dim=1)
        rows = torch.arange(len(weights))
        wins, differ = (
            torch.einsum("udn,bn->bud", figures, weights)[rows, up] for figures in (self._wins, self._differ)
        )  # [b, downs]
        candidates = fluent[:, self.downs]
        enough = differ >= (1 - MANY_TIES) * total[:, None]
        clear = candidates & enough & (wins > self.rule.better * differ)
        low = means[:, self.downs]
        mild = torch.where(clear, low, -torch.inf).argmax(dim=1)
        lowest = torch.where(candidates, -low, -torch.inf).argmax(dim=1)
        down = torch.where(clear.any(dim=1), mild, lowest)
        better = torch.where(differ > 0, wins / differ, 0.5)[rows, down]
        return torch.tensor(self.ups)[up], torch.tensor(self.downs)[down], better

    def held_out(self, rows: Sequence[int]) -> float:
        """How often the positive response wins where each half is judged with the strengths that the other chose."""
        wins = differ = 0.0
        for mine, other in ((rows[::2], rows[1::2]), (rows[1::2], rows[::2])):
            if not mine or not other:
                continue
            weights = torch.zeros(1, self.quality.shape[1], dtype=torch.double)
            weights[0, list(mine)] = 1
            up, down, _ = self.choose(weights)
            place = self.ups.index(int(up)), self.downs.index(int(down))
            wins += float(self._wins[place][list(other)].sum())
            differ += float(self._differ[place][list(other)].sum())
        return _share(wins, differ)


def _resample(counted: Tensor, seed: int) -> Tensor:
    """How often each instruction comes up when as many are drawn with replacement: ``[RESAMPLES, n]``."""
    generator = torch.Generator().manual_seed(stage_seed(seed, "bootstrap"))
    drawn = torch.multinomial(counted.expand(RESAMPLES, -1), int(counted.sum()), replacement=True, generator=generator)
    return torch.zeros(RESAMPLES, len(counted), dtype=torch.double).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.double)
    )


def _interval(values: Tensor) -> list[float]:
    tail = (1 - INTERVAL) / 2
    return torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.double), interpolation="nearest").tolist()
