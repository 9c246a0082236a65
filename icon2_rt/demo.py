"""The demo: a whole run on the model that ships with the package, in well under a minute on a laptop's CPU.

The model's world has an oracle that can grade any text of it. The method never sees it; the demo asks it afterwards, so
that a reader can tell whether the pairs are what they claim to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from icon2_rt.pipeline.config import RunConfig
from icon2_rt.tiny import oracle
from icon2_rt.tiny.world import CRITERION_OF_KIND

CONFIG: dict[str, Any] = {
    "model": "tiny",
    "seed": 0,
    "runtime": {"threads": 1},  # a model this small gains nothing from a second thread
    "directions": {"features": 96},
    "instructions": {"draws": 192, "max_new_tokens": 48, "shard_size": 96},
    "filter": {"scale": "contrast", "keep": 0.5},
    # The blocks, the unit and the bound are what suits this model (bench/RESULTS.md): a share of each block's own norm,
    # over one block more than the paper's third, stopped before text breaks.
    "pairs": {"layers": "1:5", "unit": "dose", "noise": "common", "max_new_tokens": 96, "shard_size": 32},
    "calibration": {"doses": [0.1, 0.15, 0.2], "instructions": 48, "max_divergence": 0.06},
}


def config() -> RunConfig:
    return RunConfig.from_dict(CONFIG, source="demo")


@dataclass(frozen=True)
class Side:
    """The oracle on one side of the pairs: share of well-formed texts, and the mean score (0 to 1) of those."""

    well_formed: float
    score: float | None


@dataclass(frozen=True)
class Judgement:
    """The oracle on the pairs. ``better``, ``ties`` and ``worse`` count the pairs where both texts are well formed.

    ``known`` counts the instructions that the land knows; ``fitting`` those of them whose criterion c* is the one that
    their kind is about, of ``specific`` whose c* is not the general one.
    """

    pairs: int
    known: int
    fitting: int
    specific: int
    both: int
    better: int
    ties: int
    worse: int
    chosen: Side
    rejected: Side


def judge(records: Iterable[Mapping[str, Any]]) -> Judgement:
    """Ask the oracle about a dataset's rows."""
    verdicts, specific = [], []
    for record in records:
        instruction = record["prompt"][0]["content"]
        verdicts.append([oracle.judge(instruction, record[side][0]["content"]) for side in ("chosen", "rejected")])
        kind = verdicts[-1][0].kind
        if kind is not None and record["criterion"] in CRITERION_OF_KIND.values():
            specific.append(record["criterion"] == CRITERION_OF_KIND[kind])
    both = [(c, r) for c, r in verdicts if c.kind is not None and c.well_formed and r.well_formed]
    better = sum(c.score > r.score for c, r in both)
    ties = sum(c.score == r.score for c, r in both)
    return Judgement(
        pairs=len(verdicts),
        known=sum(c.kind is not None for c, _ in verdicts),
        fitting=sum(specific),
        specific=len(specific),
        both=len(both),
        better=better,
        ties=ties,
        worse=len(both) - better - ties,
        chosen=_side([c for c, _ in verdicts]),
        rejected=_side([r for _, r in verdicts]),
    )


def _side(verdicts: list[oracle.Verdict]) -> Side:
    good = [v for v in verdicts if v.well_formed and v.kind is not None]
    return Side(
        well_formed=fmean(v.well_formed for v in verdicts) if verdicts else 0.0,
        score=fmean(v.score for v in good) if good else None,
    )


def fresh_folder(parent: Path = Path("runs")) -> Path:
    """``runs/demo-1``, or the next number that is free: each demo is a run of its own."""
    number = 1
    while (parent / f"demo-{number}").exists():
        number += 1
    return parent / f"demo-{number}"
