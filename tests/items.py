"""Attention items of a made-up batch, and what attention over it must give: row by row, in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icon2_rt.ops import AttentionItems, RowState


@dataclass(frozen=True)
class Group:
    """A prompt and its branches: row i has ``prefix`` positions that all share and ``own[i]`` of its own (the last is
    the one that is decoded now). From block ``fork`` on nothing is shared. ``idle`` rows have a seat and do not run."""

    prefix: int
    own: tuple[int, ...]
    fork: int | None = None
    idle: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Items of groups over random KV of one block; ``tables[r]`` are the pages that row r reads at that block."""

    q: Tensor
    k: Tensor
    v: Tensor
    items: AttentionItems
    state: RowState
    tables: list[list[int]]
    layer: int

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, AttentionItems, float, int]:
        """As the op takes them."""
        return self.q, self.k, self.v, self.items, self.scale, self.layer

    def expected(self) -> Tensor:
        """``[batch, H · d]`` fp64: each row by itself through its own page table."""
        batch, heads, d = self.q.shape
        out = torch.zeros(batch, heads, d, dtype=torch.float64)
        group = heads // self.k.shape[2]
        for r in range(batch):
            if not self.state.running[r]:
                continue
            n, table = int(self.state.positions[r]) + 1, torch.tensor(self.tables[r])
            k, v = (t[table].flatten(0, 1)[:n].double().repeat_interleave(group, dim=1) for t in (self.k, self.v))
            weight = (torch.einsum("hd,nhd->hn", self.q[r].double(), k) * self.scale).softmax(dim=-1)
            out[r] = torch.einsum("hn,nhd->hd", weight, v)
        return out.view(batch, heads * d)

    def on(self, device: torch.device | str, dtype: torch.dtype) -> Scene:
        """The same on another device, with q and KV in another dtype."""
        q, k, v = (t.to(device, dtype) for t in (self.q, self.k, self.v))
        moved = {name: x.to(device) for name, x in vars(self.items).items() if isinstance(x, Tensor)}
        return replace(self, q=q, k=k, v=v, items=replace(self.items, **moved))


def scene(
    groups: Sequence[Group],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 16,
    page_size: int = 4,
    split_pages: int = 2,
    layer: int = 0,
    n_layers: int = 4,
    shared: bool = True,
    spare: int = 3,
    dtype: torch.dtype = torch.float32,
    hidden: float = torch.nan,
    seed: int = 0,
) -> Scene:
    """Lay ``groups`` out as the engine does, one range of blocks before each group's fork and one after it.

    Args:
        shared: False gives every row items of its own, over the same pages. spare: items after the last that counts.
        hidden: what K and V hold wherever no position exists that is read.
    """
    split, width = page_size * split_pages, max(1, 16 // (heads // kv_heads))
    noise = torch.Generator().manual_seed(seed)
    fresh = iter(torch.randperm(sum(_n_pages(g, page_size) for g in groups), generator=noise).tolist())
    listed: list[tuple[list[int], list[int], int, tuple[int, int]]] = []  # rows, pages, split, blocks
    tables, positions, running = [], [], []
    for g in groups:
        base, n_shared = len(positions), g.prefix // page_size
        prompt = [next(fresh) for _ in range(n_shared)]
        own = [[next(fresh) for _ in range(-(-(g.prefix + n) // page_size) - n_shared)] for n in g.own]
        copies = [[next(fresh) for _ in prompt] for _ in g.own] if g.fork is not None else []
        positions += [g.prefix + n - 1 for n in g.own]
        running += [i not in g.idle for i in range(len(g.own))]
        low = [prompt + pages for pages in own]
        high = [copy + pages for copy, pages in zip(copies, own, strict=True)] if copies else low
        tables += low if g.fork is None or layer < g.fork else high
        for table, blocks in ((low, (0, g.fork or n_layers)), (high, (g.fork or n_layers, n_layers))):
            if blocks[0] == blocks[1]:
                continue
            # One split beyond the last: its item is there before its first position is.
            for s in range(max(g.prefix + n for n in g.own) // split + 2):
                members: dict[tuple[int, ...], list[int]] = {}
                for i, pages in enumerate(table):
                    if s > (g.prefix + g.own[i]) // split + 1:
                        continue
                    ids = tuple((pages[s * split_pages :] + [0] * split_pages)[:split_pages])
                    full = (s + 1) * split <= g.prefix + g.own[i] - 1
                    members.setdefault((*ids, -1 if full and shared else i), []).append(base + i)
                for ids, rows in members.items():
                    listed += [(rows[at : at + width], list(ids[:-1]), s, blocks) for at in range(0, len(rows), width)]
    n, batch = len(listed), len(positions)
    # What comes after the last item must not be looked at.
    rows = torch.full((n + spare, width), 1 << 30, dtype=torch.int32)
    pages = torch.full((n + spare, split_pages), 1 << 30, dtype=torch.int32)
    splits = torch.zeros(n + spare, dtype=torch.int32)
    layers = torch.tensor([[0, n_layers]] * (n + spare), dtype=torch.int32)
    for i, (members_, ids_, s, blocks) in enumerate(listed):
        rows[i] = torch.tensor(members_ + [-1] * (width - len(members_)))
        pages[i], splits[i], layers[i] = torch.tensor(ids_), s, torch.tensor(blocks)
    depth = int(splits.max()) + 1
    state = RowState(
        tokens=torch.zeros(batch, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        generated=torch.zeros(batch, dtype=torch.int32),
        running=torch.tensor(running),
        logprobs=torch.zeros(batch),
    )
    items = AttentionItems(
        rows=rows,
        pages=pages,
        splits=splits,
        layers=layers,
        count=torch.tensor([n], dtype=torch.int32),
        # Places in no particular order of the rows.
        starts=(torch.randperm(batch, generator=noise) * depth).to(torch.int32),
        lengths=torch.zeros(n + spare, dtype=torch.int32),
        n_splits=torch.zeros(batch, dtype=torch.int32),
        split=split,
        n_partials=batch * depth,
    )
    items.update(state)
    items.lengths[n:] = split
    n_pages = 1 + max(page for table in tables for page in table)
    q, k, v = (
        torch.randn(shape, generator=noise).to(dtype)
        for shape in ((batch, heads, d), *[(n_pages, page_size, kv_heads, d)] * 2)
    )
    exists = torch.zeros(n_pages, page_size, dtype=torch.bool)
    for position, table in zip(positions, tables, strict=True):
        at = torch.arange(position + 1)
        exists[torch.tensor(table)[at // page_size], at % page_size] = True
    k[~exists] = v[~exists] = hidden
    return Scene(q, k, v, items, state, tables, layer)


def _n_pages(g: Group, page_size: int) -> int:
    return sum(-(-(g.prefix + n) // page_size) for n in g.own) + (len(g.own) + 1) * (g.prefix // page_size)
