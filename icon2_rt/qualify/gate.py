"""From a device and a model to the verdict that ``backend="auto"`` follows there: a stored one, or that of a trial."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from icon2_rt.models import DecoderSpec
from icon2_rt.ops import Ops, launching, select
from icon2_rt.qualify import facts as device_facts
from icon2_rt.qualify.cache import Entry, Subject, proven_here
from icon2_rt.qualify.child import End, Event, Limits, listen
from icon2_rt.qualify.facts import DeviceFacts
from icon2_rt.qualify.verdict import ESSENTIAL, EngineResult, FormResult, Qualification, conclude, named

COMMAND = (sys.executable or "python3", "-P", "-m", "icon2_rt.trial")
# A trial whose process died is begun again without what it died in, so often.
MOST_STARTS = 5
# Interrupted so often in the same place on a machine that was not restarted since, it is not tried there again.
MOST_INTERRUPTIONS = 2
# What a trial begins before any kernel of ours has run: a process that dies there says nothing of them.
BEFORE_KERNELS = ("start", "facts", "recording")
_AGAIN = "`icon2 doctor --qualify --again` tries again"


@dataclass(frozen=True)
class Choice:
    """What a runtime uses. ``qualification`` is None where nothing had to be proven: a CPU, or a backend by name."""

    ops: Ops
    graphs: bool
    qualification: Qualification | None


def choose(backend: str, device: torch.device, subject: Subject) -> Choice:
    """The ops for ``backend`` on ``device``: for ``"auto"`` on CUDA what the device has proven, tried now if need be.
    Called before anything is moved there.

    Raises:
        ValueError: as :func:`icon2_rt.ops.select`; ICON2_QUALIFY is neither 0 nor 1.
    """
    if backend != "auto" or device.type != "cuda":
        return Choice(select(backend, device), True, None)
    verdict = qualify(subject, device_facts.read(device))
    if verdict.status != "proven":
        warnings.warn(
            f"backend='auto' uses the plain PyTorch operations on {verdict.device}: {verdict.reason}", stacklevel=3
        )
    return Choice(verdict.ops(), verdict.graphs, verdict)


def stored(device: torch.device, dtype: torch.dtype) -> Qualification | None:
    """What ``device`` has proven for models of ``dtype`` by a verdict that is stored already; None where nothing is, or
    with ICON2_QUALIFY=0. Never tries anything."""
    if device.type != "cuda" or os.environ.get("ICON2_QUALIFY") == "0":
        return None
    here = device_facts.read(device)
    if here.obstacle() is not None or launching.why_not() is not None:
        return None
    return proven_here(here, str(dtype).removeprefix("torch."))


def qualify(
    subject: Subject,
    facts: DeviceFacts,
    *,
    asked: bool = False,
    again: bool = False,
    command: Sequence[str] = COMMAND,
    limits: Limits | None = None,
    where: Path | None = None,
    why_no_launch: Callable[[], str | None] = launching.why_not,
    say: Callable[[str], None] | None = None,
) -> Qualification:
    """The verdict for ``subject`` on the device of ``facts``: the stored one that holds, or that of a trial.

    Args:
        asked: somebody asked for the trial in so many words, so that it also runs beside other users of the device
            (MPS) and with ICON2_QUALIFY=0. again: try even where a verdict is stored.
        command: what runs the trial. limits: its time. where: the folder of verdicts. why_no_launch: as
            :func:`icon2_rt.ops.launching.why_not`. say: told in one line that a trial begins (default: stderr).

    Raises:
        ValueError: ICON2_QUALIFY is neither 0 nor 1. KeyboardInterrupt: the trial's process was killed first.
    """
    limits = limits or Limits()
    setting = os.environ.get("ICON2_QUALIFY", "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"ICON2_QUALIFY must be 0 (never try) or 1 (try at every start), not {setting!r}")

    def not_tried(why: str) -> Qualification:
        return named(Qualification("not tried", why), facts.name, 0.0, time.time())

    if setting == "0" and not asked:
        return not_tried("ICON2_QUALIFY=0")
    obstacle = facts.obstacle() or _why_not_this(subject.spec) or why_no_launch()
    if obstacle is not None:
        return not_tried(obstacle)
    entry = Entry.of(facts, subject, where)
    again, began = again or setting == "1", time.time()
    if not again and (verdict := entry.load()) is not None:
        return verdict
    if (circumstance := facts.not_now(asked)) is not None:
        return not_tried(circumstance)
    with entry.locked(limits.total + limits.wait) as alone:
        if not alone:
            return not_tried("another process is still trying the kernels; the next start uses what it finds")
        verdict = entry.load()  # of a process that we waited for
        if verdict is not None and (not again or verdict.when >= began):
            return verdict
        verdict = _earlier_end(entry, facts, again) or _Trial(entry, subject, facts, command, limits).run(say or _say)
        verdict = named(verdict, facts.name, time.time() - began, time.time())
        if verdict.status == "not tried":  # a circumstance, and nothing of the device: it is tried at the next start
            return verdict
        verdict, why = entry.store(verdict)
        return verdict if why is None else replace(verdict, reason=f"{verdict.reason}; {why}")


def _why_not_this(spec: DecoderSpec) -> str | None:
    from icon2_rt.engine.items import ITEM_QUERIES

    heads = spec.n_heads // spec.n_kv_heads
    if heads > ITEM_QUERIES:
        return f"this model has {heads} query heads for each KV head, and the kernels' tile holds {ITEM_QUERIES}"
    return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class _Trial:
    """A trial in as many processes as it takes: one that dies or hangs in a form that can be spared is followed by
    another one that leaves it out and goes on from what is known."""

    entry: Entry
    subject: Subject
    facts: DeviceFacts
    command: Sequence[str]
    limits: Limits
    forms: list[FormResult] = field(default_factory=list)
    engines: list[EngineResult] = field(default_factory=list)
    cannot: str | None = None
    timed: bool = True

    def run(self, say: Callable[[str], None]) -> Qualification:
        say(
            f"icon2_rt: trying the kernels on {self.facts.name}, once: usually less than a minute, at most "
            f"{self.limits.total:g} s (ICON2_QUALIFY=0 does without)"
        )
        until = time.monotonic() + self.limits.total
        try:
            for _ in range(MOST_STARTS):
                end = listen(self.command, self._request(), self.limits, until, self._hear)
                if self.cannot is not None:
                    return Qualification("not tried", self.cannot)
                if end.how == "done":
                    return conclude(self.forms, self.engines, self.timed)
                if end.how == "died" and end.at.get("what") in BEFORE_KERNELS:
                    return Qualification(
                        "not tried", f"the trial's process ended at its {end.at['what']}: {end.detail}"
                    )
                if (why := self._spare(end)) is not None or time.monotonic() >= until:
                    return self._refused(why or f"{_place(end.at)}: {end.detail}")
            return self._refused("the trial's process died again and again")
        except OSError as error:
            return Qualification("not tried", f"the trial's process could not be started ({error})")
        finally:
            with suppress(OSError):
                self.entry.marker.unlink(missing_ok=True)

    def _request(self) -> dict[str, Any]:
        return {
            "subject": self.subject.to_dict(),
            "device": f"cuda:{self.facts.index}",
            "marker": str(self.entry.marker),
            "machine": self.facts.uuid,
            "forms": [vars(f) for f in self.forms],
            "engines": [vars(e) for e in self.engines],
        }

    def _hear(self, event: Event) -> None:
        fields = {k: v for k, v in event.items() if k != "event"}
        with suppress(TypeError):  # a field that we do not know: the line is not of our trial
            if event["event"] == "form":
                self.forms.append(FormResult(**fields))
            elif event["event"] == "engine":
                self.engines.append(EngineResult(**fields))
            elif event["event"] == "cannot":
                self.cannot = str(event.get("why"))
            elif event["event"] == "facts":
                self.timed = bool(event.get("timed", True))

    def _spare(self, end: End) -> str | None:
        """Note what the process ended in as wrong; None if the trial can go on without it, else why it cannot."""
        what, form = end.at.get("what"), end.at.get("form")
        if what == "engine" and end.at.get("graphs"):
            self.engines.append(EngineResult(True, end.detail))
            return None
        if not isinstance(what, str) or not isinstance(form, str):
            return f"{_place(end.at)}: {end.detail}"
        self.forms.append(FormResult(what, form, end.detail))
        return f"{_place(end.at)}: {end.detail}" if what in ESSENTIAL else None

    def _refused(self, why: str) -> Qualification:
        return Qualification("refused", why, forms_tried=tuple(self.forms), engines_tried=tuple(self.engines))


def _place(at: Event) -> str:
    """In words: ``sample (triton)``, ``engine (graphs)``, ``start``."""
    form = at.get("form") or ("graphs" if at.get("graphs") else None)
    return f"{at.get('what')} ({form})" if form else str(at.get("what"))


def _earlier_end(entry: Entry, facts: DeviceFacts, again: bool) -> Qualification | None:
    """The verdict that follows from the marker of a trial that never came to an end; None if another may begin.

    A marker from before the machine was last started means that it may have taken the machine along: not tried again.
    One of this start was left by a process that was killed; a second time in the same place is enough. So it is with
    one of another machine, which shares this folder: another start of it says nothing.
    """
    try:
        marker = json.loads(entry.marker.read_bytes())
        boot, at, times = str(marker["boot"]), str(marker["at"]), int(marker["times"])
        here = marker.get("machine", "") == facts.uuid
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if again:
        with suppress(OSError):
            entry.marker.unlink()
        return None
    if here and boot != boot_id():
        return Qualification("refused", f"the machine went down while an earlier trial was at {at}; {_AGAIN}")
    if times >= MOST_INTERRUPTIONS:
        return Qualification("refused", f"{times} earlier trials never got past {at}; {_AGAIN}")
    return None


def boot_id() -> str:
    """Another string after every start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
