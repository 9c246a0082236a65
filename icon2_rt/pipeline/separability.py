"""How fast chosen and rejected can be told apart by something cheap: the check for pairs that teach a model nothing.

Pairs that differ in a word or in their length alone are learned at once and in place of what they are for: in the
paper, DPO on answers to opposite system prompts told 97 % of the pairs apart by its 100th step, and the model stayed
where it was. So a linear probe is trained on ever more pairs, and tried on pairs that it has not seen. It sees which
tokens a response holds, its first token, and its length; nothing that would need to be understood.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

# So many pairs of a run, and the most frequent features of them: seconds on a CPU, and a curve that has flattened.
PAIRS, FEATURES = 2000, 4000
FOLDS = 5
RIDGE = 1.0
# The probe counts as having separated the pairs from this accuracy on: what the paper's trivial pairs reached.
SEPARATED = 0.97

Feature = tuple[str, int]


def probe(pairs: Sequence[tuple[str, str]], encode: Callable[[str], Sequence[int]]) -> dict[str, Any] | None:
    """The learning curve of the probe over (chosen, rejected) texts; None with fewer than 20 pairs that differ.

    Args:
        encode: a text's tokens.

    Returns:
        ``curve``: ``[pairs trained on, accuracy on others]``, the mean over 5 folds; ``accuracy``: its last;
        ``separated_after``: the first number of pairs with an accuracy of 97 %, or None.
    """
    used = [pair for pair in pairs if pair[0] != pair[1]]
    if len(used) < 4 * FOLDS:
        return None
    x = _differences([tuple(_features(encode(text)) for text in pair) for pair in used])  # type: ignore[misc]
    train_size = len(used) - math.ceil(len(used) / FOLDS)
    sizes = [2**k for k in range(3, 20) if 2**k < train_size] + [train_size]
    curve = []
    for size in sizes:
        found = []
        for fold in range(FOLDS):
            held = torch.arange(len(used)) % FOLDS == fold
            found.append(_accuracy(x[~held][:size], x[held]))
        curve.append([size, fmean(found)])
    separated = next((size for size, accuracy in curve if accuracy >= SEPARATED), None)
    return {"pairs": len(used), "curve": curve, "accuracy": curve[-1][1], "separated_after": separated}


def _features(tokens: Sequence[int]) -> dict[Feature, float]:
    found: dict[Feature, float] = {("holds", token): 1.0 for token in tokens}
    if tokens:
        found["begins", tokens[0]] = 1.0
    found["length", 0] = math.log1p(len(tokens))
    return found


def _differences(pairs: Sequence[tuple[Mapping[Feature, float], Mapping[Feature, float]]]) -> Tensor:
    """Features of the chosen text less those of the rejected one: fp64 ``[pairs, features]``."""
    seen: Counter[Feature] = Counter(feature for pair in pairs for side in pair for feature in side)
    column = {feature: i for i, (feature, _) in enumerate(seen.most_common(FEATURES))}
    x = torch.zeros(len(pairs), len(column), dtype=torch.float64)
    for row, (chosen, rejected) in enumerate(pairs):
        for sign, side in ((1, chosen), (-1, rejected)):
            for feature, value in side.items():
                if feature in column:
                    x[row, column[feature]] += sign * value
    return x


def _accuracy(train: Tensor, test: Tensor) -> float:
    """Ridge regression of +1 on the differences, without an intercept, so that neither side is favoured; ties half."""
    gram = train @ train.T + RIDGE * torch.eye(len(train), dtype=train.dtype)
    weights = train.T @ torch.linalg.solve(gram, torch.ones(len(train), dtype=train.dtype))
    scores = test @ weights
    return float((scores > 0).double().mean() + 0.5 * (scores == 0).double().mean())
