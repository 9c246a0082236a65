"""Which KV ranges attention reads for whom, worked out from page tables alone: rows with the same pages share them.

What a row may come to need is known when it takes its seat: all its pages are reserved by then. So its items are made
once, as arrays; what is laid out for the next steps is a selection of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icon2_rt.engine.rows import Request, Row
from icon2_rt.models import DecoderSpec

# Queries of one item: a tensor-core tile has 16, for the rows of the item times the query heads of a KV head.
ITEM_QUERIES = 16


@dataclass(frozen=True)
class ItemTable:
    """The tensors of :class:`~icon2_rt.ops.AttentionItems` that rows and pages decide, as arrays of the host; of the
    places in ``rows`` and ``pages`` the first ``width`` and ``depth`` are used."""

    rows: np.ndarray
    pages: np.ndarray
    splits: np.ndarray
    layers: np.ndarray
    starts: np.ndarray
    width: int
    depth: int


def item_rows(spec: DecoderSpec) -> int:
    """The most rows of an item; a larger group is several adjacent ones.

    The rule of sharing: rows that have the same pages in a split always read them together. `python -m bench crossover`
    holds that against the same rows reading alone, which is what 1 here would give. On CPUs, by the native ops and by
    the reference, sharing was slower nowhere (bench/RESULTS.md); what a GPU says has not been measured.
    """
    return max(1, ITEM_QUERIES // (spec.n_heads // spec.n_kv_heads))


def partials_of(request: Request, split: int) -> int:
    """Places for partial results that one row of ``request`` needs at its end: one for each ``split`` positions."""
    return -(-request.positions // split)


# Blocks [first, last) of a row, and the page that covers its first positions there: rows that agree in all three have
# pages in common, others have none.
Family = tuple[int, int, int]


@dataclass(frozen=True)
class _Version:
    """The pages of a row for some of the blocks."""

    family: Family
    table: np.ndarray  # [pages] int32


@dataclass(frozen=True)
class _Items:
    """Every item that the seated rows may come to need, in no particular order."""

    rows: np.ndarray  # [n, R] int32, seats
    members: np.ndarray  # [n] int32, how many of them
    pages: np.ndarray  # [n, P] int32, all of the split; the first again where the rows have no more
    splits: np.ndarray  # [n] int32
    layers: np.ndarray  # [n, 2] int32
    owner: np.ndarray  # [n] int32, a seat that reads the item: where it stands, the others stand
    family: np.ndarray  # [n] int64, a number of the family

    def take(self, which: np.ndarray) -> _Items:
        """Those at the indices ``which``."""
        return _Items(*(array.take(which, axis=0) for array in vars(self).values()))


class ItemPlanner:
    """The items of the rows that sit in a batch.

    Attributes:
        first, limit: ``[rows]`` int64, for the rows of the last :meth:`follow`: the position of their first step, and
            how many positions they may fill.
    """

    def __init__(self, page_size: int, split_pages: int, spec: DecoderSpec):
        self.page_size, self.split_pages, self.n_layers = page_size, split_pages, spec.n_layers
        self._most = item_rows(spec)
        self._seated: dict[int, Row] = {}
        self._versions: dict[int, list[_Version]] = {}
        self._members: dict[Family, set[int]] = {}
        self._number: dict[Family, int] = {}  # of the families that have members
        self._next_number = 0
        self._items = self._make([])
        self._per_row: dict[int, tuple[int, int, int]] = {}  # seat → first position, limit, places
        self.first = self.limit = self._seats = np.zeros(0, dtype=np.int64)
        self._starts = np.zeros(0, dtype=np.int32)

    def follow(self, rows: Sequence[tuple[int, Row]]) -> None:
        """These rows sit in these seats now (ascending). Makes the items of what has changed."""
        gone = dict(self._seated)
        new: list[tuple[int, Row]] = []
        for seat, row in rows:
            if gone.get(seat) is row:
                del gone[seat]
            else:
                new.append((seat, row))
        if not new and not gone:
            return
        changed: dict[Family, None] = {}
        for seat in gone:
            for version in self._versions.pop(seat):
                self._members[version.family].discard(seat)
                changed[version.family] = None
            del self._seated[seat], self._per_row[seat]
        split = self.page_size * self.split_pages
        for seat, row in new:
            self._seated[seat] = row
            self._versions[seat] = self._versions_of(row)
            request = row.request
            self._per_row[seat] = (len(request.tokens) - 1, request.positions, partials_of(request, split))
            for version in self._versions[seat]:
                self._members.setdefault(version.family, set()).add(seat)
                changed[version.family] = None
        stale = [self._number.pop(family) for family in changed if family in self._number]
        kept = self._items
        if stale:
            kept = kept.take(np.flatnonzero(~np.isin(kept.family, stale)))
        fresh = self._make(sorted((seat, family) for family in changed for seat in self._members[family]))
        self._items = _Items(
            *(np.concatenate(both) for both in zip(vars(kept).values(), vars(fresh).values(), strict=True))
        )
        for family in changed:
            if not self._members[family]:
                del self._members[family]
        self._seats = np.array([seat for seat, _ in rows], dtype=np.int64)
        figures = np.array([self._per_row[seat] for seat, _ in rows], dtype=np.int64).reshape(-1, 3)
        self.first, self.limit = figures[:, 0], figures[:, 1]
        self._starts = np.zeros(int(self._seats.max(initial=-1)) + 1, dtype=np.int32)
        self._starts[self._seats] = figures[:, 2].cumsum() - figures[:, 2]

    def _versions_of(self, row: Row) -> list[_Version]:
        low = np.array(row.low, dtype=np.int32)
        if row.low is row.high:
            return [_Version((0, self.n_layers, row.low[0]), low)]
        high = np.array(row.high, dtype=np.int32)
        return [
            _Version((0, row.fork + 1, row.low[0]), low),
            _Version((row.fork + 1, self.n_layers, row.high[0]), high),
        ]

    def _make(self, members: Sequence[tuple[int, Family]]) -> _Items:
        """The items of some families, all their members given by seat. Those of a split that have its pages in common
        are the members that have its last page in common: pages are shared from the first position on."""
        width = self.split_pages
        cells: list[np.ndarray] = []  # a cell is a split of a row at some blocks: its pages
        seats, counts, numbers, layers, whole = [], [], [], [], []
        for seat, family in members:
            table = next(v.table for v in self._versions[seat] if v.family == family)
            n = -(-len(table) // width)
            spare = n * width - len(table)
            cells += [table, np.full(spare, table[(n - 1) * width], dtype=np.int32)] if spare else [table]
            if family not in self._number:
                self._number[family] = self._next_number
                self._next_number += 1
            seats.append(seat)
            counts.append(n)
            whole.append(len(table) // width)
            numbers.append(self._number[family])
            layers.append(family[:2])
        if not members:
            nothing = np.zeros(0, dtype=np.int32)
            return _Items(
                np.zeros((0, self._most), dtype=np.int32), nothing, np.zeros((0, width), dtype=np.int32), nothing,
                np.zeros((0, 2), dtype=np.int32), nothing, np.zeros(0, dtype=np.int64),
            )  # fmt: skip
        pages = np.concatenate(cells).reshape(-1, width)
        n_cells = len(pages)
        whose = np.repeat(np.arange(len(seats)), counts)
        split = np.arange(n_cells) - np.repeat(np.cumsum(counts) - counts, counts)
        number = np.array(numbers, dtype=np.int64)[whose]
        # Cells with the same code are one item, or several of `most` rows. A split that a row never fills is its own.
        code = number << 32 | pages[:, -1]
        unfilled = split >= np.array(whole)[whose]
        code[unfilled] = (1 << 62) + np.flatnonzero(unfilled)
        order = np.argsort(code, kind="stable")  # of one code: by seat
        begins = np.append(True, np.diff(code[order]) != 0)
        group = np.cumsum(begins) - 1
        nth = np.arange(n_cells) - np.flatnonzero(begins)[group]
        item = np.cumsum(nth % self._most == 0) - 1
        firsts = order[nth % self._most == 0]
        seat_of = np.array(seats, dtype=np.int32)[whose]
        rows = np.full((len(firsts), self._most), -1, dtype=np.int32)
        rows[item, nth % self._most] = seat_of[order]
        made = _Items(
            rows=rows,
            members=np.bincount(item).astype(np.int32),
            pages=pages[firsts],
            splits=split[firsts].astype(np.int32),
            layers=np.array(layers, dtype=np.int32)[whose][firsts],
            owner=seat_of[firsts],
            family=number[firsts],
        )
        return made.take(np.argsort(firsts))  # a row's items one after the other

    def plan(self, positions: np.ndarray, ahead: np.ndarray | int) -> ItemTable:
        """The items for the next ``ahead`` steps of each row, the next of which is at ``positions`` (both ``[rows]``,
        for the rows of the last :meth:`follow`). Of a split's pages, those not reached by then are replaced by its
        first.

        A split of a row is one item, for all blocks or for those below and above its fork. Rows with the same pages in
        a split are one item: sharing follows from the pages alone.
        """
        width, items = self.split_pages, self._items
        reached = np.zeros(len(self._starts), dtype=np.int32)  # pages, by seat
        reached[self._seats] = -(-np.minimum(positions + ahead, self.limit) // self.page_size)
        here = reached[items.owner] - items.splits * width  # pages of each item
        if (here <= 0).any():
            needed = np.flatnonzero(here > 0)
            items, here = items.take(needed), here[needed]
        pages, partly = items.pages, np.flatnonzero(here < width)
        if len(partly):
            pages = pages.copy()
            unreached = np.arange(width) >= here[partly, None]
            pages[partly] = np.where(unreached, pages[partly, :1], pages[partly])
        return ItemTable(
            rows=items.rows,
            pages=pages,
            splits=items.splits,
            layers=items.layers,
            starts=self._starts,
            width=int(items.members.max()),
            depth=min(width, int(here.max())),
        )


def plan_items(
    rows: Sequence[tuple[int, Row]], ahead: Sequence[int], page_size: int, split_pages: int, spec: DecoderSpec
) -> ItemTable:
    """Work items for ``rows`` (each with its seat, ascending) and the next ``ahead`` steps of each."""
    planner = ItemPlanner(page_size, split_pages, spec)
    planner.follow(rows)
    return planner.plan(np.array([row.next_position for _, row in rows]), np.array(ahead))
