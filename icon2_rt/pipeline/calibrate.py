"""Strengths by dose: a ladder of strengths, each tried with both signs, decoded per instruction in one pass.

A strength in residual units means nothing on another model; a dose (strength relative to the residual norm in the
controlled blocks) nearly does. Each rung of the ladder is judged without any judge, by the unsteered model itself:

- *fluency*: log-probability per token of the steered response under the unsteered model. A rung is fluent if it loses
  at most ``FLUENCY_LOSS`` nats per token against unsteered responses and is not cut off by the limit more often.
- *agreement*: how much likelier the response is under the criterion's positive system prompt than under the negative
  one, in nats per token.

The rule is the paper's rule for choosing strengths, with agreement in the place of its reward model: γ⁺ is the fluent
rung with the highest mean agreement; γ⁻ the fluent rung with the highest mean agreement such that the positive response
beats the negative one in more than 90 % of the instructions (if none reaches that, the one with the lowest mean).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from icon2_rt.pipeline.config import PairsConfig
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.pairs import Kept, Strengths, response_sampling
from icon2_rt.pipeline.sampling import stage_seed
from icon2_rt.pipeline.templates import ChatFrame

if TYPE_CHECKING:
    from icon2_rt import DirectionSet, Runtime, Steering

FLUENCY_LOSS = 0.1
CUT_OFF_GAIN = 0.05
BETTER_SHARE = 0.9


@dataclass(frozen=True)
class Rung:
    """One signed dose (0: unsteered) over all calibration instructions.

    ``agreement`` has one figure per instruction, the others are means; ``logprob`` and ``agreement`` in nats per token.
    """

    dose: float
    gamma: float
    logprob: float
    cut_off: float
    agreement: tuple[float, ...]

    @property
    def mean_agreement(self) -> float:
        return fmean(self.agreement)


@dataclass(frozen=True)
class Calibration:
    """The ladder, and the rungs that were chosen from it."""

    rungs: tuple[Rung, ...]
    positive: Rung
    negative: Rung
    better: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        rungs = [{**asdict(rung), "agreement": rung.mean_agreement, "fluent": self.fluent(rung)} for rung in self.rungs]
        return {
            "rungs": rungs,
            "positive_dose": self.positive.dose,
            "negative_dose": self.negative.dose,
            "positive_beats_negative": self.better,
            "notes": list(self.notes),
        }

    def fluent(self, rung: Rung) -> bool:
        return _fluent(rung, next(r for r in self.rungs if r.dose == 0))


def climb(
    rt: Runtime,
    frame: ChatFrame,
    items: Sequence[Kept],
    directions: DirectionSet,
    criteria: Mapping[str, Criterion],
    layers: Sequence[int],
    profile: Sequence[float],
    norm: float,
    doses: Sequence[float],
    config: PairsConfig,
    eos_token_ids: Sequence[int],
    seed: int,
) -> list[Rung]:
    """Decode and measure every rung: all doses with both signs and the unsteered branch, with common random numbers.

    Args:
        items: the calibration instructions with their criteria; none of them should be used for pairs.
        profile: how a strength is spread over the controlled blocks (:class:`~icon2_rt.pipeline.pairs.Strengths`).
        norm: mean ‖h‖ in the controlled blocks; γ = dose · norm.
    """
    signed = sorted({sign * dose for dose in doses for sign in (-1, 1)} | {0.0})

    def branch(dose: float) -> list[Steering] | None:
        gamma = dict.fromkeys(directions.names, dose * norm)
        pushes = Strengths(gamma, gamma, tuple(layers), tuple(profile))
        steerings = {d.name: pushes.push(d, dose * norm) for d in directions}
        return None if dose == 0 else [steerings[item.criterion] for item in items]

    outputs = rt.generate_branches(
        [frame.messages(item.instruction.text) for item in items],
        [branch(dose) for dose in signed],
        seed=stage_seed(seed, "calibration"),
        noise="common",
        sample_ids=[item.instruction.id for item in items],
        generation_config=response_sampling(config, eos_token_ids),
    )
    responses = [[output.branches[k] for output in outputs] for k in range(len(signed))]

    def per_token(system: Mapping[str, str | None]) -> list[list[float]]:
        """Log-probability per token of every response, [rung][item], under the given system prompt per criterion."""
        chats = [frame.messages(item.instruction.text, system[item.criterion]) for item in items]
        scored = rt.score(chats * len(signed), [completion for rung in responses for completion in rung])
        means = [fmean(s.logprobs) for s in scored]
        return [means[k * len(items) : (k + 1) * len(items)] for k in range(len(signed))]

    plain = per_token(dict.fromkeys(criteria))
    positive = per_token({name: criterion.positive for name, criterion in criteria.items()})
    negative = per_token({name: criterion.negative for name, criterion in criteria.items()})
    return [
        Rung(
            dose=dose,
            gamma=dose * norm,
            logprob=fmean(plain[k]),
            cut_off=fmean(completion.finish_reason == "length" for completion in responses[k]),
            agreement=tuple(p - n for p, n in zip(positive[k], negative[k], strict=True)),
        )
        for k, dose in enumerate(signed)
    ]


def choose(rungs: Sequence[Rung]) -> Calibration:
    """Pick γ⁺ and γ⁻ from a measured ladder by the rule in the module's first lines.

    Raises:
        ValueError: the ladder lacks the unsteered rung or one of the signs.
    """
    base = next((rung for rung in rungs if rung.dose == 0), None)
    ups, downs = [r for r in rungs if r.dose > 0], [r for r in rungs if r.dose < 0]
    if base is None or not ups or not downs:
        raise ValueError("a ladder needs the unsteered rung (dose 0) and at least one dose of each sign")
    notes = []

    def usable(side: list[Rung], name: str) -> list[Rung]:
        found = [rung for rung in side if _fluent(rung, base)]
        if not found:
            notes.append(f"no {name} dose leaves the text fluent; the smallest is used")
        return found or [min(side, key=lambda rung: abs(rung.dose))]

    positive = max(usable(ups, "positive"), key=lambda rung: (rung.mean_agreement, -rung.dose))
    candidates = usable(downs, "negative")
    clear = [rung for rung in candidates if _better(positive, rung) > BETTER_SHARE]
    if clear:
        negative = max(clear, key=lambda rung: (rung.mean_agreement, rung.dose))
    else:
        negative = min(candidates, key=lambda rung: (rung.mean_agreement, -rung.dose))
        notes.append(
            f"no fluent negative dose lets the positive response win in more than {BETTER_SHARE:.0%} of the "
            f"calibration instructions; the one that agrees least is used"
        )
    return Calibration(tuple(rungs), positive, negative, _better(positive, negative), tuple(notes))


def _fluent(rung: Rung, base: Rung) -> bool:
    return rung.logprob >= base.logprob - FLUENCY_LOSS and rung.cut_off <= base.cut_off + CUT_OFF_GAIN


def _better(positive: Rung, negative: Rung) -> float:
    """How often the positive response agrees more; a tie (with common random numbers often the same text) is half."""
    return fmean((p > n) + 0.5 * (p == n) for p, n in zip(positive.agreement, negative.agreement, strict=True))
