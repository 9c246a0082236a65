"""What a runtime has been asked to do: tokens run through the model, counted from requests and results.

It is the work that a request stands for, the same on every machine and schedule: a prompt is counted once however many
branches share it, a pinned prefix once for all prompts that continue it, and nothing twice that an engine may have to
do again. Seconds are those of the wall clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from icon2_rt.outputs import Fired, LastRun, Paths, add_up

COUNTS = ("prefilled", "decoded", "scored", "attended", "logits")


@dataclass
class Work:
    """Work of one kind.

    - ``prefilled``: prompt positions that were run; ``decoded``: positions run one by one, one for each generated
      token; ``scored``: positions of given completions.
    - ``attended``: the positions that all of those attended to, themselves included, added up.
    - ``logits``: how many of them went through the language model's head.
    - ``seconds``: wall clock.
    - ``steering``, ``paths``: how much each term of a steering acted, and which code ran; None: none did.
    """

    prefilled: int = 0
    decoded: int = 0
    scored: int = 0
    attended: int = 0
    logits: int = 0
    seconds: float = 0.0
    steering: tuple[Fired, ...] = ()
    paths: Paths | None = None

    def counts(self) -> dict[str, int]:
        """The counts of tokens: what does not depend on the machine."""
        return {name: getattr(self, name) for name in COUNTS}


class Usage:
    """Work by label. The label is set by whoever drives the runtime; without one it is the empty text."""

    def __init__(self) -> None:
        self._work: dict[str, Work] = {}
        self._label, self._since = "", perf_counter()

    def begin(self, label: str) -> None:
        """What follows is work of this label."""
        now = perf_counter()
        self._now().seconds += now - self._since
        self._label, self._since = label, now

    @contextmanager
    def during(self, label: str) -> Iterator[None]:
        """What is done inside is work of this label, and not of the one outside."""
        outside = self._label
        self.begin(label)
        try:
            yield
        finally:
            self.begin(outside)

    def take(self) -> dict[str, Work]:
        """The labelled work since the last call, and an end to the present label."""
        self.begin("")
        taken, self._work = self._work, {}
        taken.pop("", None)
        return taken

    def generated(self, prompt: int, prefix: int, decoded: Sequence[int]) -> None:
        """A prompt of so many tokens, the first of them pinned, and the lengths of its branches.

        The last prompt token is decoded, by every branch for itself.
        """
        work = self._now()
        work.prefilled += prompt - 1 - prefix
        work.attended += _triangle(prompt - 1) - _triangle(prefix)
        for n in decoded:
            work.decoded += n
            work.logits += n
            work.attended += _triangle(prompt - 1 + n) - _triangle(prompt - 1)

    def read(self, prompt: int, prefix: int = 0) -> None:
        """A prompt that was read to its end, or a prefix that was pinned."""
        work = self._now()
        work.prefilled += prompt - prefix
        work.attended += _triangle(prompt) - _triangle(prefix)

    def scored(self, prompt: int, completion: int) -> None:
        """A completion behind a prompt."""
        work = self._now()
        work.prefilled += prompt
        work.scored += completion
        work.attended += _triangle(prompt + completion)
        work.logits += completion

    def ran(self, run: LastRun) -> None:
        """The record of a call that has ended."""
        work = self._now()
        work.steering = add_up((*work.steering, *run.steering))
        work.paths = run.paths if work.paths is None else work.paths + run.paths

    def _now(self) -> Work:
        return self._work.setdefault(self._label, Work())


def _triangle(n: int) -> int:
    """What positions 0 … n - 1 attend to."""
    return n * (n + 1) // 2
