"""Requests, and the rows that they become: what the engine knows of each branch while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from icon2_rt.engine.sampling import Sampling
from icon2_rt.engine.stops import StopText
from icon2_rt.outputs import FinishReason
from icon2_rt.steering import CompiledSteering


@dataclass(frozen=True, eq=False)
class PinnedPrefix:
    """A prefilled run of tokens whose pages are held: ``pages`` cover positions [0, len(tokens)). Equal only to itself:
    after it is let go the same pages may belong to another one."""

    tokens: tuple[int, ...]
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """One continuation: its steering, and its 64-bit row seed (None = greedy)."""

    steering: CompiledSteering | None
    seed: int | None


@dataclass(frozen=True)
class Request:
    """A group before it runs: a prompt and its branches. ``budget`` is the most tokens a branch may generate."""

    index: int
    tokens: tuple[int, ...]
    branches: tuple[Branch, ...]
    sampling: Sampling
    budget: int
    prefix: PinnedPrefix | None = None

    @property
    def positions(self) -> int:
        """KV positions that a branch may fill: the last generated token is never fed back."""
        return len(self.tokens) + self.budget - 1

    @property
    def prompt_steerings(self) -> list[CompiledSteering | None]:
        """How each branch's *prompt* is steered: by its steering with scope "all", else not."""
        return [b.steering if b.steering is not None and b.steering.scope == "all" else None for b in self.branches]

    @property
    def reused(self) -> int:
        """Positions whose KV comes from the pinned prefix: none where the prompt itself is steered."""
        if self.prefix is None or any(self.prompt_steerings):
            return 0
        return min(len(self.prefix.tokens), len(self.tokens) - 1)


@dataclass(frozen=True)
class Reading:
    """A prompt whose states are shown at ``positions`` (from 0, in any order), under a steering. What comes after the
    last of them is not computed."""

    tokens: Sequence[int]
    positions: Sequence[int]
    steering: CompiledSteering | None = None

    @property
    def end(self) -> int:
        """The tokens that are computed."""
        return max(self.positions) + 1

    def reused(self, prefix: PinnedPrefix | None) -> int:
        """Positions whose KV comes from a pinned prefix: those before all that are shown, and none where the prompt
        itself is steered."""
        if prefix is None or (self.steering is not None and self.steering.scope == "all"):
            return 0
        return min(len(prefix.tokens), *self.positions)


@dataclass
class Row:
    """One branch in the running batch.

    ``low`` and ``high`` are its pages by position, for blocks up to ``fork`` and above it (one list where nothing
    forked). ``position`` is where ``token`` goes next; it starts at the last prompt token. ``launched`` counts the
    steps that the device was given for this row; ``tokens`` are the results that have come back: fewer, on a device
    that runs ahead of the host. ``stops`` looks for stop strings in them, where there are any.
    """

    request: Request
    branch: int
    low: list[int]
    high: list[int]
    fork: int
    position: int
    token: int
    launched: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None
    stops: StopText | None = None

    @property
    def seed(self) -> int | None:
        return self.request.branches[self.branch].seed

    @property
    def steering(self) -> CompiledSteering | None:
        """What acts on the token of the next step: "generated" leaves the last prompt token alone."""
        steering = self.request.branches[self.branch].steering
        if steering is not None and steering.scope == "generated" and not self.launched:
            return None
        return steering

    @property
    def next_position(self) -> int:
        """Where the token of the next step goes, if the row has not ended in a step that is still under way."""
        return len(self.request.tokens) - 1 + self.launched

    @property
    def min_tokens(self) -> int:
        """So many tokens come before an eos may: min_new_tokens, or min_length, prompt included."""
        sampling = self.request.sampling
        return max(sampling.min_new_tokens, sampling.min_length - len(self.request.tokens))

    @property
    def pages(self) -> set[int]:
        """Every page that this row holds a reference to."""
        return {*self.low, *self.high}

    def pages_of(self, layer: int) -> Sequence[int]:
        return self.low if layer <= self.fork else self.high
