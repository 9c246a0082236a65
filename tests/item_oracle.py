"""What attention items are, said in the plainest way: the definition that the engine's planner is held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icon2_rt.engine.items import ItemTable, item_rows, partials_of
from icon2_rt.engine.rows import Row
from icon2_rt.models import DecoderSpec


def plan_items(
    rows: Sequence[tuple[int, Row]], ahead: Sequence[int], page_size: int, split_pages: int, spec: DecoderSpec
) -> ItemTable:
    """Work items for ``rows`` (each with its seat) and the next ``ahead`` steps of each.

    A split of a row is one item, for all blocks or for those below and above its fork. Rows with the same pages in a
    split are one item: sharing follows from the pages alone.
    """
    split, most = page_size * split_pages, item_rows(spec)
    place: dict[tuple[int, int, int, tuple[int, ...]], int] = {}
    members: list[list[int]] = []
    found: list[tuple[int, int, int, tuple[int, ...]]] = []
    starts = np.zeros(max(seat for seat, _ in rows) + 1, dtype=np.int32)
    taken = 0
    for (seat, row), steps in zip(rows, ahead, strict=True):
        end = min(row.next_position + steps, row.request.positions)
        n_pages = -(-end // page_size)
        forked = row.low is not row.high
        versions = [(row.low, 0, row.fork + 1), (row.high, row.fork + 1, spec.n_layers)]
        if not forked:
            versions = [(row.low, 0, spec.n_layers)]
        for table, first, last in versions:
            for n, begin in enumerate(range(0, n_pages, split_pages)):
                key = (n, first, last, tuple(table[begin : min(begin + split_pages, n_pages)]))
                item = place.get(key)
                if item is None or len(members[item]) == most:
                    item = place[key] = len(members)
                    members.append([])
                    found.append(key)
                members[item].append(seat)
        starts[seat] = taken
        taken += partials_of(row.request, split)
    table_of_rows = np.full((len(members), most), -1, dtype=np.int32)
    pages = np.empty((len(members), split_pages), dtype=np.int32)
    for item, (seats, (*_, ids)) in enumerate(zip(members, found, strict=True)):
        table_of_rows[item, : len(seats)] = seats
        pages[item, : len(ids)] = ids
        pages[item, len(ids) :] = ids[0]
    return ItemTable(
        rows=table_of_rows,
        pages=pages,
        splits=np.array([key[0] for key in found], dtype=np.int32),
        layers=np.array([key[1:3] for key in found], dtype=np.int32),
        starts=starts,
        width=max(map(len, members)),
        depth=max(len(key[3]) for key in found),
    )
