"""What a run cost, and what it saves beside a baseline: tokens, forward FLOPs, seconds and memory.

Tokens are counted from what was asked of the engine (:mod:`icon2_rt.usage`) and lie with every artifact, so that they
are the same after any interruption; seconds and memory are in ``log.jsonl``. What is *said* about a saving depends on
who pays for the instructions, of which the method writes many and keeps few:

- ``all``: every method pays for the same D_raw, as if each had to filter as hard;
- ``own``: each pays for what it needs: the method for all that it drew, a baseline for one usable instruction a pair;
- ``paper``: nobody pays for writing instructions, and the method only for scoring those that it kept.

Reading the finished responses again for the dataset's figures, and the checks of the report, belong to no method: they
are listed, and in no accounting.
"""

from __future__ import annotations

import contextlib
import json
import resource
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from icon2_rt.models import DecoderSpec
    from icon2_rt.pipeline.folder import Artifact
    from icon2_rt.pipeline.runner import RunResult

Accounting = Literal["all", "own", "paper"]
ACCOUNTINGS: tuple[Accounting, ...] = ("all", "own", "paper")
Unit = Literal["tokens", "flops", "seconds"]
UNITS: tuple[Unit, ...] = ("tokens", "flops", "seconds")
# Steps that are part of no method, and those that are done once however many pairs are made.
ASIDE = ("figures", "checks")
ONCE = ("features", "directions", "strengths")
# All steps in the order of the work.
STEPS = (*ONCE, "synthesis", "scoring", "pairs", "refinement", "judging", *ASIDE)


def flops(counts: Mapping[str, int], spec: DecoderSpec) -> int:
    """Forward FLOPs of counted work (:class:`icon2_rt.usage.Work`); a multiplication and an addition are two.

    Linear layers, attention to the positions that were there, and the head where it was needed. Left out are norms,
    rotary embeddings, softmax, sampling, and steering (2 · hidden size a token, term and block).
    """
    heads, kv_heads = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    block = spec.hidden_size * (2 * heads + 2 * kv_heads + 3 * spec.intermediate_size)
    positions = counts["prefilled"] + counts["decoded"] + counts["scored"]
    return 2 * (
        positions * spec.n_layers * block
        + counts["attended"] * spec.n_layers * 2 * heads
        + counts["logits"] * spec.hidden_size * spec.vocab_size
    )


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use since the last call: allocated on a GPU, resident elsewhere (None: cannot be told).

    On systems that cannot begin anew it is the most since the process began.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident peak begins anew
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def account(artifacts: Sequence[Artifact], spec: DecoderSpec, pairs: int) -> dict[str, Any]:
    """What ``report.json`` says about costs: counts and FLOPs by step, from the artifacts' own facts."""
    steps: dict[str, Counter[str]] = {}
    judge: Counter[str] = Counter()
    for artifact in artifacts:
        for step, counts in artifact.facts.get("cost", {}).items():
            steps.setdefault(step, Counter()).update(counts)
        if "judge" in artifact.facts:
            judge["tokens"] += artifact.facts["judge"]["tokens"]
            judge["flops"] += 2 * artifact.facts["judge"]["parameters"] * artifact.facts["judge"]["tokens"]
    return {
        "pairs": pairs,
        "steps": {step: {**steps[step], "flops": flops(steps[step], spec)} for step in _in_order(steps)},
        **({"judge": dict(judge)} if judge else {}),
    }


def clock(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes by step, over all the calls that a run took, from its log.

    A folder may come without its log, and a full disk or a kill may have torn a line of it: what is missing there is
    missing here.
    """
    found: dict[str, dict[str, float]] = {}
    log = folder / "log.jsonl"
    for line in log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "work":
            step = found.setdefault(event["step"], {"seconds": 0.0, "peak_bytes": 0})
            step["seconds"] += event["seconds"]
            step["peak_bytes"] = max(step["peak_bytes"], event["peak_bytes"] or 0)
    return found


def by_step(costs: Mapping[str, Any], clock: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row for every step of the work that has a cost: its counts (0 where a step ran nothing through the model), its
    ``share`` of the FLOPs, ``seconds`` and ``peak_bytes`` (None where nobody measured)."""
    total = sum(counts["flops"] for counts in costs["steps"].values())
    rows = []
    for step in _in_order({**costs["steps"], **clock}):
        counts, timed = costs["steps"].get(step, {}), clock.get(step, {})
        rows.append(
            {
                "step": step,
                **{key: counts.get(key, 0) for key in ("prefilled", "decoded", "scored", "flops")},
                "share": counts.get("flops", 0) / max(1, total),
                "seconds": timed.get("seconds"),
                "peak_bytes": timed.get("peak_bytes") or None,
            }
        )
    return rows


def _in_order(steps: Iterable[str]) -> list[str]:
    return sorted(steps, key=lambda step: STEPS.index(step) if step in STEPS else len(STEPS))


def saving(
    ratio: float,
    *,
    draws: float = 10,
    responses: float = 2,
    scoring: float = 0.0,
    baseline_draws: float = 10,
    samples: float = 5,
    judging: float = 0.0,
    overhead: float = 0.0,
) -> float:
    """What the method saves beside a baseline, as a share of the baseline's cost; from lengths alone.

    Everything is in units of one unsteered response: a draw costs ``ratio``, the length of an instruction over that
    of a response. The method pays draws · ratio + responses · (1 + overhead) + scoring a pair, the baseline
    baseline_draws · ratio + samples + judging.

    ``draws = 10`` is a filter that keeps a tenth; the accounting ``all`` has ``baseline_draws = draws``, ``own`` about
    1, and ``paper`` a ``ratio`` of 0.
    """
    method = draws * ratio + responses * (1 + overhead) + scoring
    return 1 - method / (baseline_draws * ratio + samples + judging)


@dataclass(frozen=True)
class Bill:
    """What one pair of a run cost, in the three accountings, in one unit.

    ``writing`` is one draw of an instruction, ``draws`` how many a pair took in this run and ``usable`` how many it
    takes to have one that hygiene lets pass; ``scoring`` is what scoring one instruction costs, ``scored`` how many a
    pair took; ``answering`` what a pair's responses cost, ``judging`` finding out which is better; ``once`` is a pair's
    share of directions and strengths.
    """

    writing: float
    draws: float
    usable: float
    scoring: float
    scored: float
    answering: float
    judging: float
    once: float
    steered: bool

    def total(self, accounting: Accounting, draws: float) -> float:
        """What a pair costs; ``draws`` a pair is what the method took."""
        rest = self.answering + self.judging + self.once
        if self.steered:
            scored = 1.0 if accounting == "paper" else self.scored
            return rest + scored * self.scoring + (0.0 if accounting == "paper" else self.draws * self.writing)
        needed = {"all": draws, "own": self.usable, "paper": 0.0}[accounting]
        return rest + needed * self.writing


def bill(
    result: RunResult,
    unit: Unit,
    writing: float | None = None,
    usable: float | None = None,
    spread: int | None = None,
) -> Bill:
    """A finished run's :class:`Bill`.

    Args:
        spread: over how many pairs that is spread which is done once; None: those of the run.
        writing, usable: of another run, for one whose instructions were given: it wrote none, but somebody did.

    Raises:
        ValueError: a run without pairs, or without the figures (made before they were kept).
    """
    costs = result.report.get("costs")
    if not costs or not costs["pairs"]:
        raise ValueError(f"{result.path} has no costs to compare: no pair came of it")
    pairs, counts = costs["pairs"], result.report["counts"]["instructions"]
    clocked = clock(result.path)
    if unit == "seconds" and not clocked:
        raise ValueError(f"{result.path / 'log.jsonl'} is gone or empty: it has the seconds; compare flops or tokens")

    def of(step: str) -> float:
        if unit == "seconds":
            return clocked.get(step, {}).get("seconds", 0.0)
        counted = costs["steps"].get(step)
        if counted is None:
            return 0.0
        if unit == "flops":
            return float(counted["flops"])
        return float(counted["prefilled"] + counted["decoded"] + counted["scored"])

    steps = [
        step for step in {**costs["steps"], **clocked} if step not in (*ASIDE, *ONCE, "synthesis", "scoring", "judging")
    ]
    judge = 0.0 if unit == "seconds" else float(costs.get("judge", {}).get(unit, 0))
    wrote = of("synthesis") / counts["drawn"]
    return Bill(
        writing=wrote if of("synthesis") and writing is None else writing or 0.0,
        draws=counts["drawn"] / pairs,
        usable=counts["drawn"] / counts["clean"] * counts["kept"] / pairs if usable is None else usable,
        scoring=of("scoring") / counts["clean"],
        scored=counts["clean"] / pairs,
        answering=sum(of(step) for step in steps) / pairs,
        judging=(of("judging") + judge) / pairs,
        once=sum(of(step) for step in ONCE) / (spread or pairs),
        steered="baseline" not in result.report,
    )


def compare(
    method: RunResult, baselines: Sequence[RunResult], unit: Unit = "flops", spread: int | None = None
) -> list[dict[str, Any]]:
    """The paper's cost table for runs of one model: a row for the method, and one for each baseline.

    Args:
        spread: as in :func:`bill`: a small run stands for one of so many pairs.

    Returns: per row ``name``; ``answering``, ``judging`` (scoring for the method) and ``once`` a pair; by accounting
    the ``total`` a pair and the method's ``saving`` against it.

    Raises:
        ValueError: the first run is a baseline, or another is none; runs of different models.
    """
    if "baseline" in method.report:
        raise ValueError(f"{method.path} is a baseline: name the method's own run first")
    mine = bill(method, unit, spread=spread)
    usable = method.report["counts"]["instructions"]["drawn"] / method.report["counts"]["instructions"]["clean"]
    rows: list[dict[str, Any]] = []
    for n, result in enumerate((method, *baselines)):
        if n and "baseline" not in result.report:
            raise ValueError(f"{result.path} is no baseline's run: the others are compared with the first")
        models = [r.manifest["identity"]["model"]["fingerprint"] for r in (method, result)]
        if models[0] != models[1]:
            raise ValueError(f"{result.path} was made on another model than {method.path}: there is nothing to compare")
        given = result.manifest["identity"]["config"]["instructions"].get("file") is not None
        yields = result.report["counts"]["instructions"]["kept"] / result.report["counts"]["pairs"]
        writing, needed = (mine.writing, usable * yields) if given and n else (None, None)
        theirs = bill(result, unit, writing, needed, spread)
        totals = {a: theirs.total(a, mine.draws) for a in ACCOUNTINGS}
        rows.append(
            {
                "name": result.report["baseline"]["recipe"] if n else "icon2",
                "answering": theirs.answering,
                "judging": theirs.scored * theirs.scoring if theirs.steered else theirs.judging,
                "once": theirs.once,
                "total": totals,
                "saving": {a: 1 - mine.total(a, mine.draws) / totals[a] for a in ACCOUNTINGS},
            }
        )
    return rows


def ratio(result: RunResult) -> float:
    """The mean length of a drawn instruction over that of a response, in decoded tokens."""
    steps, counts = result.report["costs"]["steps"], result.report["counts"]["instructions"]
    pairs = result.report["pairs"]
    response = (pairs["chosen"]["mean_tokens"] + pairs["rejected"]["mean_tokens"]) / 2
    return steps["synthesis"]["decoded"] / counts["drawn"] / response if "synthesis" in steps else 0.0
