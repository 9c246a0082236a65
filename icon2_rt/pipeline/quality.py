"""How good a response is where nobody outside is asked: what the model itself connects with the criterion.

- *agreement*: how much likelier the response is under the criterion's positive system prompt than under its negative
  one, in nats per token;
- *projection*: ⟨h, u_c⟩ where the unsteered model reads the response, the mean over a few places in it and over the
  controlled blocks.

Both are ours. Neither minds broken text, so a bound on fluency goes with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.judges import Judge
from icon2_rt.pipeline.templates import ChatFrame

if TYPE_CHECKING:
    from icon2_rt import DirectionSet, Runtime

# Where in a response its projection is taken: evenly spaced, the last token among them.
PLACES = 4


def agreement(rt: Runtime, frame: ChatFrame, criteria: Mapping[str, Criterion], names: Sequence[str]) -> Judge:
    """Log p per token under the criterion's positive system prompt less that under its negative one; 0 for no text.

    ``names``: the criterion of every instruction that will be asked about, in order.
    """

    def judge(instructions: Sequence[str], responses: Sequence[str]) -> list[float]:
        def under(which: str) -> list[float]:
            systems = [getattr(criteria[name], which) for name in names]
            chats = [frame.messages(text, system) for text, system in zip(instructions, systems, strict=True)]
            return [fmean(s.logprobs) if s.logprobs else 0.0 for s in rt.score(chats, responses)]

        return [p - n for p, n in zip(under("positive"), under("negative"), strict=True)]

    return judge


def projection(
    rt: Runtime, frame: ChatFrame, directions: DirectionSet, layers: Sequence[int], names: Sequence[str]
) -> Judge:
    """⟨h, u_c⟩ of the unsteered model, the mean over :data:`PLACES` places in the response and over ``layers``.

    ``names``: the criterion of every instruction that will be asked about, in order.
    """

    def judge(instructions: Sequence[str], responses: Sequence[str]) -> list[float]:
        read = []
        for instruction, response in zip(instructions, responses, strict=True):
            before = rt.encode(frame.messages(instruction))
            after = rt.encode_completion(response, before)
            read += [[*before, *after[: math.ceil(len(after) * (k + 1) / PLACES)]] for k in range(PLACES)]
        found = rt.project(read, directions)[:, :, list(layers)].mean(dim=2).unflatten(0, (-1, PLACES)).mean(dim=1)
        return [float(row[directions.names.index(name)]) for row, name in zip(found, names, strict=True)]

    return judge
