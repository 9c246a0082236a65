"""What one pass of a prefill attends to: runs of prompts, packed without padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of one prompt's tokens in a packed prefill.

    Its queries are rows ``[begin, end)`` of the pack and stand at absolute positions ``[start, start + end - begin)``;
    ``pages`` (``[n]`` int64) hold the KV of positions ``[0, start + end - begin)``, this run's own included.
    """

    begin: int
    end: int
    start: int
    pages: Tensor

    @property
    def queries(self) -> int:
        return self.end - self.begin

    @property
    def length(self) -> int:
        """Positions that the last query sees: those before this run, and the run."""
        return self.start + self.queries


@dataclass(frozen=True)
class Segments:
    """n segments one after the other, and what every block reads of them: worked out once, at the first block.

    The KV of all segments, gathered from the pages, is packed like the queries: segment i's is rows
    ``[keys_before[i], keys_before[i + 1])`` of it.
    """

    runs: tuple[Segment, ...]
    page_size: int

    @cached_property
    def slots(self) -> Tensor:
        """``[keys]`` int64, page · page_size + offset of every position that is seen."""
        offset = torch.arange(self.page_size, device=self.runs[0].pages.device)
        return torch.cat([(s.pages[:, None] * self.page_size + offset).flatten()[: s.length] for s in self.runs])

    @cached_property
    def queries_before(self) -> Tensor:
        """``[n + 1]`` int32, where each segment's queries begin; the last is how many there are."""
        return self._before([s.queries for s in self.runs])

    @cached_property
    def keys_before(self) -> Tensor:
        """``[n + 1]`` int32, where each segment's keys begin; the last is how many there are."""
        return self._before([s.length for s in self.runs])

    @property
    def most_queries(self) -> int:
        return max(s.queries for s in self.runs)

    @property
    def most_keys(self) -> int:
        return max(s.length for s in self.runs)

    def _before(self, counts: list[int]) -> Tensor:
        device = self.runs[0].pages.device
        return torch.tensor([*accumulate(counts, initial=0)], dtype=torch.int32).to(device)
