"""The planner of attention items gives what the plain definition gives, however rows come, go and advance."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from icon2_rt.engine.items import ItemPlanner, ItemTable, plan_items
from icon2_rt.engine.rows import Branch, PinnedPrefix, Request, Row
from icon2_rt.engine.sampling import Sampling
from icon2_rt.models import DecoderSpec
from tests import item_oracle

LAYERS = 6


def spec(heads: int = 8, kv_heads: int = 2) -> DecoderSpec:
    return DecoderSpec("llama", LAYERS, 64, heads, kv_heads, 8, 64, 100, 4096, None, 1e-5, 1.0, False)


class Pool:
    """Groups as the engine opens them: full pages of the prompt in common, of a pinned prefix across groups, and later
    blocks forked by version."""

    def __init__(self, draw: Random, page_size: int):
        self.draw, self.page_size, self.next_page = draw, page_size, 0
        self.prefixes = [self.prefix(draw.randrange(1, 14 * page_size)) for _ in range(2)]

    def pages(self, n: int) -> list[int]:
        self.next_page += n
        return list(range(self.next_page - n, self.next_page))

    def prefix(self, tokens: int) -> PinnedPrefix:
        return PinnedPrefix((1,) * tokens, tuple(self.pages(-(-tokens // self.page_size))))

    def group(self) -> list[Row]:
        draw, page = self.draw, self.page_size
        branches, budget = draw.randrange(1, 10), draw.randrange(1, 60)
        prefix = draw.choice([None, None, *self.prefixes])
        tokens = draw.choice([1, page, draw.randrange(1, 12 * page)])
        if prefix is not None:
            tokens = len(prefix.tokens) + draw.randrange(0, 3 * page)
        request = Request(0, (1,) * tokens, (Branch(None, None),) * branches, Sampling(), budget, prefix)
        shared = (tokens - 1) // page
        reused = request.reused // page
        versions = [list(prefix.pages[:reused]) if prefix else []]
        versions[0] += self.pages(shared - reused)
        fork = draw.randrange(LAYERS - 1) if prefix is None and draw.random() < 0.4 else None
        if fork is not None:
            versions += [self.pages(shared) for _ in range(draw.randrange(1, 3))]
        rows = []
        for n in range(branches):
            own = self.pages(-(-request.positions // page) - shared)
            version = draw.randrange(len(versions))
            low = versions[0] + own
            high = low if version == 0 else versions[version] + own
            rows.append(Row(request, n, low, high, LAYERS - 1 if fork is None else fork, tokens - 1, 0))
        return rows


def listed(table: ItemTable) -> tuple[Any, ...]:
    """Everything but the order of the items."""
    fields = zip(table.splits.tolist(), table.layers.tolist(), table.rows.tolist(), table.pages.tolist(), strict=True)
    return sorted(fields), table.starts.tolist(), table.width, table.depth


@pytest.mark.parametrize("seed", range(40))
def test_the_planner_follows_the_definition(seed):
    draw = Random(seed)
    page, split_pages = draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 3, 4])
    model = spec(*draw.choice([(8, 2), (4, 4), (16, 1), (14, 2)]))
    pool, planner = Pool(draw, page), ItemPlanner(page, split_pages, model)
    seated: dict[int, Row] = {}
    checked = shared = 0
    for _ in range(30):
        if draw.random() < 0.5:
            for row in pool.group():
                seat = next(n for n in range(1000) if n not in seated and draw.random() < 0.8)
                seated[seat] = row
        for seat in [s for s in seated if draw.random() < draw.choice([0.0, 0.1, 0.9])]:
            del seated[seat]
        if draw.random() < 0.1:  # the rows move to the lowest seats
            seated = dict(enumerate(seated[seat] for seat in sorted(seated)))
        if not seated:
            planner.follow([])
            continue
        rows = sorted(seated.items())
        left = [row.request.positions - row.next_position for _, row in rows]
        ahead = draw.randrange(1, 40)
        steps = [min(ahead, max(1, n)) for n in left]
        planner.follow(rows)
        np.testing.assert_array_equal(planner.limit, [row.request.positions for _, row in rows])
        np.testing.assert_array_equal(
            planner.first + [row.launched for _, row in rows], [r.next_position for _, r in rows]
        )
        got = planner.plan(planner.first + [row.launched for _, row in rows], np.array(steps))
        expected = item_oracle.plan_items(rows, steps, page, split_pages, model)
        assert listed(got) == listed(expected)
        assert listed(plan_items(rows, steps, page, split_pages, model)) == listed(expected)
        checked += 1
        shared += int((got.rows >= 0).sum() > len(got.rows))
        done = draw.randrange(1, 20)
        for _, row in rows:
            row.launched += min(done, max(0, row.request.budget - row.launched))
    assert checked > 5
    assert shared or model.n_heads == 16


def test_rows_of_several_groups_share_a_pinned_prefix():
    """Two groups that continue one prefix of 8 pages: its whole splits are one item for all their rows."""
    pool = Pool(Random(0), 4)
    prefix = pool.prefix(32)
    rows = []
    for tokens in (40, 47):
        request = Request(0, (1,) * tokens, (Branch(None, None),) * 2, Sampling(), 5, prefix)
        shared = list(prefix.pages) + pool.pages((tokens - 1) // 4 - 8)
        for n in range(2):
            pages = shared + pool.pages(-(-request.positions // 4) - len(shared))
            rows.append(Row(request, n, pages, pages, LAYERS - 1, tokens - 1, 0))
    table = plan_items(list(enumerate(rows)), [1] * 4, 4, 4, spec())
    assert [r.tolist() for r, s in zip(table.rows, table.splits, strict=True) if s < 2] == [[0, 1, 2, 3]] * 2
    one = replace(rows[0].request, prefix=None)
    assert len(plan_items([(3, replace(rows[0], request=one))], [1], 4, 4, spec()).rows) == 3
