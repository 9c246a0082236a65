"""What a trial found, and what follows from it: which form of every op a device has proven.

Nothing here touches a device or a file; the trial's process and the process that waits for it decide by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from icon2_rt.ops import Backend, Ops, assemble

# Without one of these there is no fast engine: their reference forms cannot be captured in a graph.
ESSENTIAL = ("begin_step", "add_steer_rmsnorm", "rope_append", "grouped_decode_attention")
# Each of these can run in its reference form inside a captured step.
REPLACEABLE = ("embed", "silu_mul", "linear", "sample")
PREFILL = "prefill_attention"
# Another form replaces Triton's (the reference where Triton has none) if it takes at most this share of its time.
FASTER = 0.95

Status = Literal["proven", "refused", "not tried"]


@dataclass(frozen=True)
class FormResult:
    """One form of one op in a trial.

    Attributes:
        form: "triton", "native" or "reference"; for prefill attention the name of a path.
        wrong: None where it is right, else in words what is not.
        error: the largest ‖out − reference in fp32‖ / ‖reference in fp32‖ of a row; None where none was measured.
        microseconds: of one call, by the number of rows.
    """

    op: str
    form: str
    wrong: str | None = None
    error: float | None = None
    microseconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineResult:
    """A whole engine in a trial, with CUDA graphs or without. ``microseconds``: of one step, and of the same step by
    the reference ops ("reference")."""

    graphs: bool
    wrong: str | None = None
    microseconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Qualification:
    """What a device has proven for a model's sizes and dtype, which is what ``backend="auto"`` uses on it.

    Attributes:
        status: "proven": the forms in ``forms`` are used; "refused": a kernel was wrong, slow or did not come back, and
            the reference ops are used; "not tried": something stood in the way, and the reference ops are used.
        reason: one sentence.
        device: the device's name. forms: op → form that is used. prefill: the path of prefill attention, None for the
            library's own choice. graphs: whether steps are replayed as CUDA graphs.
        forms_tried, engines_tried: all that the trial measured.
        seconds: what the trial took. when: seconds since 1970. stored: the file that holds it, None where none does.
        cached: it was read from there and not tried now.
    """

    status: Status
    reason: str
    device: str = ""
    forms: Mapping[str, Backend] = field(default_factory=dict)
    prefill: str | None = None
    graphs: bool = False
    forms_tried: tuple[FormResult, ...] = ()
    engines_tried: tuple[EngineResult, ...] = ()
    seconds: float = 0.0
    when: float = 0.0
    stored: str | None = None
    cached: bool = False

    @property
    def backend(self) -> Backend:
        return self.ops().backend

    def ops(self) -> Ops:
        """The ops that are used."""
        return assemble(self.forms, self.prefill) if self.status == "proven" else Ops()

    @property
    def chosen(self) -> dict[str, Any]:
        """What decides bytes: the form of every op, the path of prefill attention, graphs."""
        return {"forms": dict(sorted(self.forms.items())), "prefill": self.prefill, "graphs": self.graphs}

    def __str__(self) -> str:
        if self.status != "proven":
            return f"{self.status}: {self.reason}"
        odd = [f"{op} {form}" for op, form in sorted(self.forms.items()) if form != _usual(op)]
        odd += [] if self.graphs else ["without graphs"]
        return "proven on this device" + (f" ({', '.join(odd)})" if odd else "")

    def brief(self) -> dict[str, Any]:
        """The verdict for a record of something else: what was found, why, when and by which device."""
        when = datetime.fromtimestamp(self.when, UTC).isoformat(timespec="seconds")
        names = {"status": self.status, "reason": self.reason, "device": self.device, "when": when}
        return {**names, **(self.chosen if self.status == "proven" else {})}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a file; where it is stored and whether it was read are of the reader, not of the verdict."""
        return {k: v for k, v in asdict(self).items() if k not in ("stored", "cached")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Qualification:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError, KeyError, ValueError: the data is of something else.
        """
        fields = dict(data)
        fields["forms_tried"] = tuple(FormResult(**f) for f in fields["forms_tried"])
        fields["engines_tried"] = tuple(EngineResult(**e) for e in fields["engines_tried"])
        found = cls(**fields)
        if found.status not in ("proven", "refused", "not tried"):
            raise ValueError(f"status {found.status!r}")
        found.ops()  # refuses a form that does not exist
        return found


def _usual(op: str) -> Backend:
    return "triton" if op in (*ESSENTIAL, "silu_mul", "sample") else "reference"


def choose_forms(tried: Iterable[FormResult]) -> tuple[dict[str, Backend], str | None]:
    """The form of each op that is right, and fastest where more than one is; and None, or what stands against it all.

    An op's usual form (Triton's, or torch's where Triton has none) is kept unless another takes at most 95 % of its
    time on average over the numbers of rows, and at no number of rows more than it.
    """
    by_op: dict[str, dict[str, FormResult]] = {}
    for result in tried:
        by_op.setdefault(result.op, {})[result.form] = result
    forms: dict[str, Backend] = {}
    for op in (*ESSENTIAL, *REPLACEABLE):
        results = by_op.get(op, {})
        right = {form: r for form, r in results.items() if r.wrong is None and (op in REPLACEABLE or form == "triton")}
        usual = _usual(op)
        if op in ESSENTIAL and usual not in right:
            why = results[usual].wrong if usual in results else "it was not reached"
            return {}, f"{op} ({usual}): {why}"
        best = usual if usual in right else "reference"
        for form, result in sorted(right.items()):
            if form != best and best in right and share(result.microseconds, right[best].microseconds) <= FASTER:
                best = form  # type: ignore[assignment]
        forms[op] = best
    return forms, None


def choose_prefill(tried: Iterable[FormResult]) -> str | None:
    """The fastest right path of prefill attention by the same rule, in the order in which they were tried."""
    best: FormResult | None = None
    for result in tried:
        if result.op != PREFILL or result.wrong is not None:
            continue
        if best is None or share(result.microseconds, best.microseconds) <= FASTER:
            best = result
    return None if best is None else best.form


def share(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """How much of the time of ``other`` ``one`` takes: the geometric mean over the rows that both were timed at; inf
    where there is none, or where at some number of rows it takes more."""
    ratios = [one[rows] / other[rows] for rows in one if other.get(rows, 0.0) > 0.0]
    if not ratios or max(ratios) > 1.0:
        return math.inf
    return math.exp(sum(math.log(max(ratio, 1e-9)) for ratio in ratios) / len(ratios))


def conclude(tried: Sequence[FormResult], engines: Sequence[EngineResult], timed: bool) -> Qualification:
    """The verdict of a trial that came to its end. ``timed``: whether its times count (on a CPU they do not)."""
    verdict = Qualification("refused", "", forms_tried=tuple(tried), engines_tried=tuple(engines))
    forms, why = choose_forms(tried)
    if why is not None:
        return replace(verdict, reason=why)
    right = [engine for engine in engines if engine.wrong is None]
    if not right:
        why = engines[-1].wrong if engines else "it was not reached"
        return replace(verdict, reason=f"the whole engine: {why}")
    engine = next((engine for engine in right if engine.graphs), right[0])
    times = engine.microseconds
    if timed and times.get("step", 0.0) > FASTER * times.get("reference", math.inf):
        slow = f"a step took {times['step']:.0f} µs and {times['reference']:.0f} µs by the reference ops"
        return replace(verdict, reason=f"not faster here: {slow}")
    wrong = [f"{r.op} ({r.form}): {r.wrong}" for r in tried if r.wrong is not None]
    wrong += [f"graphs: {e.wrong}" for e in engines if e.graphs and e.wrong is not None]
    reason = "every kernel that was tried was right here"
    if wrong:
        reason = "without what was wrong here: " + "; ".join(wrong)
    return replace(
        verdict, status="proven", reason=reason, forms=forms, prefill=choose_prefill(tried), graphs=engine.graphs
    )


def named(verdict: Qualification, device: str, seconds: float, when: float) -> Qualification:
    """``verdict`` with where and when it was found."""
    return replace(verdict, device=device, seconds=round(seconds, 1), when=when)
