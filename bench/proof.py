"""Does the method do what it says, where the truth is known? On the model that ships with the package, judged by its
world's oracle, which the method never sees.

1. Directions: do two halves of the instructions give the same one, and do the pairs agree in its sign?
2. c*: is the criterion that the filter gives to an instruction the one that the instruction is about, by scale; and
   where does an instruction lie between its criterion's two system prompts?
3. The sweep: how quality and form go with the dose.
4. Strengths chosen on one set of instructions, without the oracle, and reported on another.

Everything is measured on instructions that the model wrote itself and that the oracle can read; a broken text never
counts as a win. Other seeds of the model lie in ``bench/models/``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench import ROOT
from bench.environment import environment, write
from icon2_rt import Direction, DirectionSet, Runtime, tiny
from icon2_rt.pipeline import calibrate, consistency
from icon2_rt.pipeline.config import CalibrationConfig, InstructionsConfig, PairsConfig, controlled_layers
from icon2_rt.pipeline.criteria import Criterion
from icon2_rt.pipeline.directions import extract
from icon2_rt.pipeline.health import residual_norms
from icon2_rt.pipeline.instructions import Instruction, synthesise, without_duplicates
from icon2_rt.pipeline.loading import end_tokens
from icon2_rt.pipeline.pairs import Kept, Strengths, response_sampling
from icon2_rt.pipeline.quality import agreement
from icon2_rt.pipeline.templates import ChatFrame, chat_frame
from icon2_rt.tiny import oracle
from icon2_rt.tiny.world import CRITERION_OF_KIND, KINDS

MODELS = ROOT / "bench" / "models"
BANDS = ("middle", "1:5")  # the paper's third of the blocks, and the band that steers this model best
DOSES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
# A bound on the divergence from the unsteered model (nats per token) under which texts of this model stay well formed;
# it was set on other instructions than those that are reported on.
MAX_DIVERGENCE = 0.06
WAYS: Mapping[str, dict[str, Any]] = {
    "common noise, temperature 0.8": {"noise": "common", "temperature": 0.8},
    "independent noise, temperature 0.8": {"noise": "independent", "temperature": 0.8},
    "common noise, temperature 0.3": {"noise": "common", "temperature": 0.3},
    "independent noise, temperature 0.3": {"noise": "independent", "temperature": 0.3},
}


@dataclass(frozen=True)
class Sizes:
    """How many instructions each part looks at."""

    features: int = 256
    about: int = 600
    sweep: int = 150
    chosen: int = 100
    reported: int = 200


@dataclass(frozen=True)
class Subject:
    """The model with its directions and its own instructions: those that made the directions, and the others that the
    oracle can read, with their kinds."""

    rt: Runtime
    frame: ChatFrame
    criteria: dict[str, Criterion]
    directions: DirectionSet
    norms: list[float]
    features: list[Instruction]
    instructions: list[Instruction]
    kinds: list[str]

    @property
    def eos(self) -> tuple[int, ...]:
        return end_tokens(self.rt)

    def bands(self) -> dict[str, tuple[int, ...]]:
        return {band: tuple(controlled_layers(band, self.rt.spec.n_layers)) for band in BANDS}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench proof", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="seed0", help=f"seed0 is the shipped one; others: folders in {MODELS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few instructions each, to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="default: bench/results/proof-MODEL-DEVICE.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = Sizes(64, 60, 12, 16, 24) if options.quick else Sizes()
    began = time.perf_counter()
    subject = prepare(options.model, sizes, options.seed)
    record: dict[str, Any] = {
        "benchmark": "proof",
        "model": {"name": options.model, "fingerprint": subject.rt.fingerprint, **recipe(options.model)},
        "settings": {
            **vars(sizes), "seed": options.seed, "bands": list(BANDS), "doses": list(DOSES), "unit": "dose",
            "max_divergence": MAX_DIVERGENCE,
        },
        "environment": environment(),
    }  # fmt: skip
    seconds = {"instructions and directions": time.perf_counter() - began}
    for name in options.parts:
        began = time.perf_counter()
        record[name] = PARTS[name](subject, sizes, options.seed)
        seconds[name] = time.perf_counter() - began
        print(f"{options.model}: {name} in {seconds[name]:.0f} s", file=sys.stderr)
    record["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    write(f"proof-{options.model}", record, options.out)


def model_folder(name: str) -> Path:
    """seed0 is the shipped model; any other name is a folder in bench/models, or a path."""
    return tiny.path() if name == "seed0" else MODELS / name


def recipe(model: str) -> dict[str, Any]:
    """What the model was trained on."""
    made = json.loads((model_folder(model) / "gate.json").read_text())["recipe"]
    return {"corpus": made.get("corpus", "shipped"), "steps": made["steps"]}


def prepare(model: str, sizes: Sizes, seed: int) -> Subject:
    rt = Runtime.from_pretrained(model_folder(model))
    frame = chat_frame(rt.tokenizer, end_tokens(rt))
    criteria = {name: Criterion(*prompts) for name, prompts in tiny.CRITERIA.items()}
    need = sizes.features + max(sizes.about, sizes.sweep, sizes.chosen + sizes.reported)
    config = InstructionsConfig(max_new_tokens=48)
    drawn, _ = synthesise(rt, frame, range(math.ceil(1.3 * need)), config, seed, rt.spec.max_length // 2)
    written, _ = without_duplicates(drawn)
    found = [(item, oracle.read_instruction(item.text)) for item in written[sizes.features :]]
    known = [(item, read[0]) for item, read in found if read is not None]
    features = written[: sizes.features]
    made = extract(rt, frame, criteria, features)
    norms = residual_norms(rt.hidden_states([frame.messages(item.text) for item in features[:64]]))
    return Subject(rt, frame, criteria, made, norms, features, [item for item, _ in known], [kind for _, kind in known])


# --------------------------------------------------------------------------------------------------------------------
# 1. Directions


def directions(subject: Subject, sizes: Sizes, seed: int) -> dict[str, Any]:
    """The health figures per criterion over each band: the worst block, but for the contrast, where it is the best.

    "own kind" are directions from only those instructions that the criterion is about: does what is missing come from
    the others, which its prompts hardly move?
    """
    bands = {**subject.bands(), "all": tuple(range(subject.rt.spec.n_layers))}
    found = {band: {d.name: _health(d, layers) for d in subject.directions} for band, layers in bands.items()}
    kind_of = [(item, oracle.read_instruction(item.text)) for item in subject.features]
    for kind, name in CRITERION_OF_KIND.items():
        mine = [item for item, read in kind_of if read is not None and read[0] == kind]
        [alone] = extract(subject.rt, subject.frame, {name: subject.criteria[name]}, mine)
        for band, layers in subject.bands().items():
            found.setdefault(f"{band}, own kind", {})[name] = {**_health(alone, layers), "instructions": len(mine)}
    return found


def _health(direction: Direction, layers: Sequence[int]) -> dict[str, Any]:
    keys = ("split_half_cosine", "sign_agreement", "cos_mean_difference")
    worst = {key: min(direction.health[key][i] for i in layers) for key in keys}
    return {**worst, "contrast": max(direction.health["contrast"])}


# --------------------------------------------------------------------------------------------------------------------
# 2. The criterion of an instruction


def criterion(subject: Subject, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Confusion tables of c* against the instruction's kind, by scale; and where the bare instruction lies.

    The general criterion fits every kind and is left out, so chance is one in three.
    """
    rt, frame = subject.rt, subject.frame
    specific = DirectionSet([subject.directions[name] for name in CRITERION_OF_KIND.values()])
    items, kinds = subject.instructions[: sizes.about], subject.kinds[: sizes.about]
    about = [specific.names.index(CRITERION_OF_KIND[kind]) for kind in kinds]
    bare = consistency.projections(rt, frame, items, specific)
    spans = consistency.contrasts(rt, frame, items, specific, subject.criteria)
    tables = {}
    for scale, projected in (("raw", bare), ("zscore", bare), ("contrast", spans)):
        best = consistency.judge(projected, specific.names, scale).best.tolist()
        tables[scale] = {
            "right": fmean(b == a for b, a in zip(best, about, strict=True)),
            "confusion": {
                kind: {
                    name: sum(b == column and k == kind for b, k in zip(best, kinds, strict=True))
                    for column, name in enumerate(specific.names)
                }
                for kind in KINDS
            },
        }
    centred = consistency.judge(bare, specific.names, "zscore").scores
    lowest = centred.argmin(dim=1).tolist()
    negative = torch.stack([_under(subject, items, d, subject.criteria[d.name].negative) for d in specific], dim=1)
    # 0: as under the negative prompt, 1: as under the positive one; of the mean over blocks, by the mean of a kind.
    place, size = (bare - negative).mean(dim=2), spans.mean(dim=2)
    level, low = bare.mean(dim=2), negative.mean(dim=2)
    rows_of = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in KINDS}
    by_kind: dict[str, Any] = {}
    for kind, rows in rows_of.items():
        by_kind[kind] = {
            name: {
                "span": float(size[rows, column].mean()),
                "place": float(place[rows, column].mean() / size[rows, column].mean()),
                "zscore": float(centred[rows, column].mean()),
                # The same of the way between the prompts where they act: at the instructions the criterion is about.
                "place_among_its_own": float(
                    (level[rows, column].mean() - low[own, column].mean()) / size[own, column].mean()
                ),
            }
            for column, (name, own) in enumerate(zip(specific.names, rows_of.values(), strict=True))
        }
    return {
        "instructions": len(items),
        "kinds": {kind: kinds.count(kind) for kind in KINDS},
        "tables": tables,
        "right_if_lowest_zscore": fmean(b == a for b, a in zip(lowest, about, strict=True)),
        "between_the_prompts": by_kind,
    }


def _under(subject: Subject, items: Sequence[Instruction], direction: Direction, system: str) -> torch.Tensor:
    """⟨h, u⟩ of the instructions under one system prompt, ``[n, n_layers]``."""
    return subject.rt.project([subject.frame.messages(item.text, system) for item in items], [direction])[:, 0]


# --------------------------------------------------------------------------------------------------------------------
# 3 and 4. Strengths


@dataclass(frozen=True)
class Marks:
    """The oracle on two lists of responses to the same instructions."""

    n: int
    both: int
    better: int
    worse: int

    def to_dict(self) -> dict[str, Any]:
        differ = self.better + self.worse
        return {
            "pairs": self.n,
            "both_well_formed": self.both / self.n,
            "ties": 1 - differ / self.both if self.both else None,
            "differ": differ,
            "better": self.better / differ if differ else None,
            "better_interval": wilson(self.better, differ),
        }


def compare(items: Sequence[Kept], chosen: Sequence[str], rejected: Sequence[str]) -> Marks:
    """Wins are counted among the pairs where both texts are well formed and the scores differ."""
    verdicts = [
        (oracle.judge(item.instruction.text, c), oracle.judge(item.instruction.text, r))
        for item, c, r in zip(items, chosen, rejected, strict=True)
    ]
    both = [(c.score, r.score) for c, r in verdicts if c.well_formed and r.well_formed]
    return Marks(len(verdicts), len(both), sum(c > r for c, r in both), sum(c < r for c, r in both))


def wilson(wins: int, n: int, z: float = 1.96) -> list[float] | None:
    """The 95 % interval of a share."""
    if n == 0:
        return None
    share, square = wins / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return [middle - half, middle + half]


def with_criteria(subject: Subject, items: Sequence[Instruction]) -> list[Kept]:
    """c* by contrast, among all criteria, as the demo's filter gives it."""
    contrasts = consistency.contrasts(subject.rt, subject.frame, items, subject.directions, subject.criteria)
    verdict = consistency.judge(contrasts, subject.directions.names, "contrast")
    return [
        Kept(item, verdict.names[c], float(verdict.score[i]), None, {})
        for i, (item, c) in enumerate(zip(items, verdict.best.tolist(), strict=True))
    ]


def decode(
    subject: Subject,
    items: Sequence[Kept],
    layers: Sequence[int],
    doses: Sequence[float],
    config: PairsConfig,
    seed: int,
) -> list[list[str]]:
    """Responses by dose (0: unsteered), one list each; every block gets the same share of its own norm."""
    norm = fmean(subject.norms[i] for i in layers)
    profile = tuple(subject.norms[i] / norm for i in layers)
    blank = Strengths({}, {}, tuple(layers), profile)
    pushes = [{d.name: blank.push(d, dose * norm) for d in subject.directions} for dose in doses]
    outputs = subject.rt.generate_branches(
        [subject.frame.messages(item.instruction.text) for item in items],
        [[push[item.criterion] for item in items] if dose else None for dose, push in zip(doses, pushes, strict=True)],
        seed=seed,
        noise=config.noise,
        sample_ids=[item.instruction.id for item in items],
        generation_config=response_sampling(config, subject.eos),
    )
    return [[output.branches[k].text or "" for output in outputs] for k in range(len(doses))]


def sweep(subject: Subject, sizes: Sizes, seed: int) -> dict[str, Any]:
    """The oracle on every dose of each band: mean score (a broken text is 0), share well formed, and how often it loses
    against +15 % (for negative doses)."""
    items = with_criteria(subject, subject.instructions[: sizes.sweep])
    config = PairsConfig(max_new_tokens=96, **WAYS["common noise, temperature 0.8"])
    doses = sorted({0.0, *DOSES, *(-dose for dose in DOSES)})
    found: dict[str, Any] = {}
    for band, layers in subject.bands().items():
        by_dose = dict(zip(doses, decode(subject, items, layers, doses, config, seed), strict=True))
        rungs = []
        for dose, texts in by_dose.items():
            verdicts = [oracle.judge(item.instruction.text, text) for item, text in zip(items, texts, strict=True)]
            rungs.append(
                {
                    "dose": dose,
                    "score": fmean(v.score if v.well_formed else 0.0 for v in verdicts),
                    "score_of_well_formed": _mean([v.score for v in verdicts if v.well_formed]),
                    "well_formed": fmean(v.well_formed for v in verdicts),
                    "against": compare(items, by_dose[0.15], texts).to_dict() if dose < 0 else None,
                }
            )
        found[band] = {"layers": list(layers), "rungs": rungs, "kinds": _by_kind(items, by_dose)}
    return found


def _by_kind(items: Sequence[Kept], by_dose: Mapping[float, Sequence[str]]) -> dict[str, list[float | None]]:
    """Mean score per dose of the instructions of each kind alone."""
    found: dict[str, list[float | None]] = {kind: [] for kind in KINDS}
    for texts in by_dose.values():
        verdicts = [oracle.judge(item.instruction.text, text) for item, text in zip(items, texts, strict=True)]
        for kind in KINDS:
            found[kind].append(_mean([v.score if v.well_formed else 0.0 for v in verdicts if v.kind == kind]))
    return found


def held_out(subject: Subject, sizes: Sizes, seed: int) -> dict[str, Any]:
    """By way of sampling: the band and doses that the calibration chooses on the first instructions by agreement, which
    asks nobody, and what the oracle says of pairs from the others."""
    first = with_criteria(subject, subject.instructions[: sizes.chosen])
    others = with_criteria(subject, subject.instructions[sizes.chosen : sizes.chosen + sizes.reported])
    calibration = CalibrationConfig(doses=DOSES[1:-1], bands=BANDS, max_divergence=MAX_DIVERGENCE)
    rule = calibrate.Rule.of(calibration)
    judge = agreement(subject.rt, subject.frame, subject.criteria, [item.criterion for item in first])
    found: dict[str, Any] = {}
    for way, options in WAYS.items():
        config = PairsConfig(unit="dose", max_new_tokens=96, **options)
        ladders = calibrate.climb(
            subject.rt, subject.frame, first, subject.directions, subject.bands(), subject.norms, judge, calibration,
            config, subject.eos, seed,
        )  # fmt: skip
        choice = calibrate.best([calibrate.choose(ladder, rule, seed) for ladder in ladders], rule)
        doses = (choice.positive.dose, 0.0, choice.negative.dose)
        chosen, plain, rejected = decode(subject, others, choice.ladder.layers, doses, config, seed + 1)
        scores = {
            side: fmean(
                oracle.judge(item.instruction.text, text).score for item, text in zip(others, texts, strict=True)
            )
            for side, texts in (("chosen", chosen), ("unsteered", plain), ("rejected", rejected))
        }
        found[way] = {
            "band": choice.ladder.band,
            "positive_dose": choice.positive.dose,
            "negative_dose": choice.negative.dose,
            "positive_interval": choice.intervals["positive"],
            "negative_interval": choice.intervals["negative"],
            "agreement": {"better": choice.better, "held_out": choice.better_held_out, "ties": choice.ties},
            "notes": list(choice.notes),
            "oracle": compare(others, chosen, rejected).to_dict(),
            "identical": fmean(c == r for c, r in zip(chosen, rejected, strict=True)),
            "scores": scores,
        }
    return found


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


PARTS: Mapping[str, Callable[[Subject, Sizes, int], dict[str, Any]]] = {
    "directions": directions,
    "criterion": criterion,
    "sweep": sweep,
    "held_out": held_out,
}


if __name__ == "__main__":
    main()
