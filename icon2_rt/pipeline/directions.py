"""Step 1: one direction per criterion, from the model's own states under two opposite system prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.instructions import Instruction
from icon2_rt.pipeline.templates import ChatFrame
from icon2_rt.steering import DirectionSet

if TYPE_CHECKING:
    from icon2_rt import Runtime


def extract(
    rt: Runtime,
    frame: ChatFrame,
    criteria: Mapping[str, Criterion],
    features: Sequence[Instruction],
    method: Literal["pca", "mean_difference"] = "pca",
    done: Callable[[int], None] = lambda n: None,
) -> DirectionSet:
    """Directions of all criteria over the same feature instructions.

    For each instruction the last token's state under the positive prompt minus that under the negative one, after every
    block; the direction is the first singular vector of those differences (uncentred: centring would remove the
    mean, which is the signal), turned so that the mean difference projects positively.

    Raises:
        ValueError: fewer than two feature instructions.
    """
    if len(features) < 2:
        raise ValueError(f"directions need at least 2 feature instructions, there are {len(features)}")
    found = []
    for name, criterion in criteria.items():
        positive = [frame.messages(feature.text, system=criterion.positive) for feature in features]
        negative = [frame.messages(feature.text, system=criterion.negative) for feature in features]
        found.append(rt.extract_direction(positive, negative, name, method=method))
        done(len(found))
    return DirectionSet(found)
