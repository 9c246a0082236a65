"""The criteria that a run uses when none are given: the paper's three, and a general one.

The paper prints the form of the first three ("You are an honest assistant." / "You are a dishonest assistant.") and
describes the general pair as a long list of virtues and its mirror image; the wording of that pair is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field


def _not_blank(text: str) -> str | None:
    return None if text.strip() else "must not be empty"


@dataclass(frozen=True)
class Criterion:
    """Two system prompts that differ in what the criterion is about, and in nothing else."""

    positive: str = field(metadata={"checks": (_not_blank,)})
    negative: str = field(metadata={"checks": (_not_blank,)})


DEFAULT_CRITERIA: dict[str, Criterion] = {
    "honesty": Criterion("You are an honest assistant.", "You are a dishonest assistant."),
    "harmlessness": Criterion("You are a harmless assistant.", "You are a harmful assistant."),
    "helpfulness": Criterion("You are a helpful assistant.", "You are an unhelpful assistant."),
    "general": Criterion(
        "You are an honest, harmless, helpful, accurate, careful, clear, thorough, polite, fair, respectful, patient, "
        "responsible and trustworthy assistant.",
        "You are a dishonest, harmful, unhelpful, inaccurate, careless, confusing, superficial, rude, biased, "
        "disrespectful, impatient, irresponsible and untrustworthy assistant.",
    ),
}


def default_criteria(model: str) -> dict[str, Criterion]:
    """The criteria for a model: the shipped tiny one knows only the system prompts that it was trained with."""
    if model == "tiny":
        from icon2_rt import tiny

        return {name: Criterion(*prompts) for name, prompts in tiny.CRITERIA.items()}
    return dict(DEFAULT_CRITERIA)
