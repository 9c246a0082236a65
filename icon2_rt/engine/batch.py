"""The running rows as tensors: rebuilt when rows join, leave or change how they are treated, advanced in between."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from icon2_rt.engine.bank import DirectionBank
from icon2_rt.engine.forward import Model, embed, finish, logits, rotary, run_blocks
from icon2_rt.engine.kv import KVPages
from icon2_rt.engine.rows import Row
from icon2_rt.ops import AttentionItems, RowSampling

# Query rows of one attention item. A tensor-core tile has 16; a larger group becomes several adjacent items.
ITEM_ROWS = 16


class Batch:
    """One decode step at a time over ``rows``."""

    def __init__(self, model: Model, kv: KVPages, bank: DirectionBank, split_pages: int, rows: Sequence[Row]):
        self.model, self.kv, self.rows = model, kv, list(rows)
        self.split = split_pages * kv.page_size
        self.split_pages = split_pages
        device = model.device
        self.tokens = torch.tensor([row.token for row in rows], device=device)
        self.positions = torch.tensor([row.position for row in rows], device=device)
        self.index = torch.tensor([len(row.tokens) for row in rows], device=device)
        # New tokens go to a row's own pages, which are the same for all blocks.
        width = max(len(row.low) for row in rows)
        self.page_table = torch.tensor([[*row.low, *[0] * (width - len(row.low))] for row in rows], device=device)
        steerings = [row.steering for row in rows]
        distinct = list({id(s): s for s in steerings}.values())
        place = {id(s): n for n, s in enumerate(distinct)}
        self.steering = bank.row_steering(distinct, [place[id(s)] for s in steerings])
        self.sampling = row_sampling(model, rows)
        self._next_split = 0  # steps until some row's next position lies in another split
        self._items: list[AttentionItems] = []
        self._tails: list[tuple[Tensor, Tensor]] = []

    def step(self) -> tuple[list[int], list[float]]:
        """Feed every row's token, sample the next one: tokens and their log-probabilities, in row order."""
        if self._next_split == 0:
            self._plan_items()
        with torch.inference_mode():
            size = self.kv.page_size
            page = self.page_table.gather(1, (self.positions // size)[:, None])[:, 0]
            slots = page * size + self.positions % size
            model, ops, kv, items = self.model, self.model.ops, self.kv, self._items
            scale = model.spec.head_dim**-0.5

            def attend(layer: int, q: Tensor) -> Tensor:
                return ops.grouped_decode_attention(q, kv.k[layer], kv.v[layer], items[layer], scale)

            rope = rotary(model, self.positions)
            layers = range(model.spec.n_layers)
            stream = run_blocks(model, embed(model, self.tokens), layers, rope, kv, slots, attend, self.steering)
            scores = logits(model, finish(model, stream, self.steering))
            self.tokens, logprobs = ops.sample(scores, self.index, self.sampling)
            self.positions += 1
            self.index += 1
            self._next_split -= 1
            if self._next_split:  # one more position is there for every row's last item
                for mask, flat in self._tails:
                    mask.view(-1).index_fill_(0, flat + self._grown, 0.0)
                self._grown += 1
            if self.sampling.seen is not None:
                self.sampling.seen.scatter_(1, self.tokens[:, None], True)
        return self.tokens.tolist(), logprobs.tolist()

    def _plan_items(self) -> None:
        """The work items of the coming steps, per range of blocks in which no row changes its page table."""
        positions = self.positions.tolist()
        self._next_split = min(self.split - p % self.split for p in positions)
        self._grown = 0
        n_layers = self.model.spec.n_layers
        ends = sorted({row.fork for row in self.rows if row.low is not row.high} | {n_layers - 1})
        self._items, self._tails = [], []
        for end in ends:
            tables = [row.pages_of(end) for row in self.rows]
            items, tail = plan_items(tables, positions, self.kv.page_size, self.split_pages, self.model.device)
            self._items += [items] * (end + 1 - len(self._items))
            self._tails.append((items.mask, tail))


def plan_items(
    tables: Sequence[Sequence[int]], positions: Sequence[int], page_size: int, split_pages: int, device: torch.device
) -> tuple[AttentionItems, Tensor]:
    """Work items for rows that attend to positions [0, positions[r]] through page tables ``tables[r]``.

    Rows with the same pages in a split are one item, up to 16 of them: sharing follows from the pages alone.

    Returns:
        the items; ``[batch]`` int64, where in the flattened mask the position after each row's last one is.
    """
    split = page_size * split_pages
    open_items: dict[tuple, int] = {}
    members: list[list[int]] = []
    pages: list[Sequence[int]] = []
    lengths: list[int] = []
    places: list[list[tuple[int, int]]] = []
    for row, (table, position) in enumerate(zip(tables, positions, strict=True)):
        mine = []
        for begin in range(0, position + 1, split):
            first = begin // page_size
            held = tuple(table[first : first + split_pages])
            key = (first, held)
            item = open_items.get(key)
            if item is None or len(members[item]) == ITEM_ROWS:
                item = open_items[key] = len(members)
                members.append([])
                pages.append(held)
                lengths.append(min(split, position + 1 - begin))
            mine.append((item, len(members[item])))
            members[item].append(row)
        places.append(mine)
    n, width = len(members), max(map(len, members))
    depth = max(map(len, places))
    rows = np.zeros((n, width), dtype=np.int64)
    held_pages = np.zeros((n, split_pages), dtype=np.int64)
    for item, (group, ids) in enumerate(zip(members, pages, strict=True)):
        rows[item, : len(group)] = group
        held_pages[item, : len(ids)] = ids
        held_pages[item, len(ids) :] = ids[0]
    mask = np.where(np.arange(split) < np.array(lengths)[:, None], 0.0, -np.inf).astype(np.float32)
    merge = np.zeros((len(tables), depth), dtype=np.int64)
    merge_mask = np.full((len(tables), depth), -np.inf, dtype=np.float32)
    for row, mine in enumerate(places):
        merge[row, : len(mine)] = [item * width + place for item, place in mine]
        merge_mask[row, : len(mine)] = 0.0
    tail = [mine[-1][0] * split + (position + 1) % split for mine, position in zip(places, positions, strict=True)]

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    items = AttentionItems(put(rows), put(held_pages), put(mask), put(merge), put(merge_mask))
    return items, torch.tensor(tail, device=device)


def row_sampling(model: Model, rows: Sequence[Row]) -> RowSampling:
    """The rows' sampling options as tensors; None where no row needs them."""
    device, vocab = model.device, model.spec.vocab_size
    options = [row.request.sampling for row in rows]
    sampled = [row.seed is not None for row in rows]

    def per_row(name: str, neutral: float, dtype: torch.dtype) -> Tensor | None:
        values = [
            getattr(o, name) if s or name == "repetition_penalty" else neutral
            for o, s in zip(options, sampled, strict=True)
        ]
        if all(value == neutral for value in values):
            return None
        return torch.tensor(values, dtype=dtype, device=device)

    penalty = per_row("repetition_penalty", 1.0, torch.float32)
    top_k = per_row("top_k", 0, torch.int64)
    seen = banned = None
    if penalty is not None:
        seen = torch.zeros(len(rows), vocab, dtype=torch.bool, device=device)
        for n, row in enumerate(rows):
            seen[n, torch.tensor([*row.request.tokens, *row.tokens], device=device)] = True
    early = [(n, list(row.request.sampling.eos_token_ids)) for n, row in enumerate(rows) if not may_end(row)]
    if early:
        banned = torch.zeros(len(rows), vocab, dtype=torch.bool, device=device)
        for n, tokens in early:
            banned[n, tokens] = True
    seeds = [row.seed or 0 for row in rows]
    return RowSampling(
        sampled=torch.tensor(sampled, device=device) if any(sampled) else None,
        seeds=torch.tensor([[s & 0xFFFFFFFF, s >> 32] for s in seeds], device=device) if any(sampled) else None,
        temperature=per_row("temperature", 1.0, torch.float32),
        top_k=None if top_k is None else torch.where(top_k == 0, vocab, top_k),
        top_p=per_row("top_p", 1.0, torch.float32),
        min_p=per_row("min_p", 0.0, torch.float32),
        repetition_penalty=penalty,
        seen=seen,
        banned=banned,
    )


def may_end(row: Row) -> bool:
    """May the next token be an eos? Not before min_new_tokens (or min_length, prompt included)."""
    sampling, generated = row.request.sampling, len(row.tokens)
    return generated >= sampling.min_new_tokens and len(row.request.tokens) + generated >= sampling.min_length
