"""The running rows as tensors: rebuilt when rows join, leave or change how they are treated, advanced in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icon2_rt.engine.bank import DirectionBank
from icon2_rt.engine.forward import Model, computing, embed, finish, logits, rotary, run_blocks
from icon2_rt.engine.kv import KVPages
from icon2_rt.engine.rows import Row
from icon2_rt.ops import AttentionItems, RowSampling

# Query rows of one attention item. A tensor-core tile has 16; a larger group becomes several adjacent items.
ITEM_ROWS = 16

# Steps that are laid out at a time: slots, rotary factors and masks of this many positions ahead.
HORIZON = 32


class Batch:
    """One decode step at a time over ``rows``, until they change: then a new batch is made of them."""

    def __init__(self, model: Model, kv: KVPages, bank: DirectionBank, split_pages: int, rows: Sequence[Row]):
        self.model, self.kv, self.rows = model, kv, list(rows)
        self.split_pages = split_pages
        self.tokens = torch.tensor([row.token for row in rows], device=model.device)
        self._plan: list[_Step] = []
        self.steering = bank.row_steering([row.steering for row in rows])
        self.sampling = row_sampling(model, rows)

    def step(self) -> tuple[list[int], list[float]]:
        """Feed every row's token, sample the next one: tokens and their log-probabilities, in row order."""
        with computing(self.model):
            if not self._plan:
                self._plan = self._lay_out()[::-1]
            plan = self._plan.pop()
            for mask, flat in plan.grown:
                mask.view(-1).index_fill_(0, flat, 0.0)
            model, ops, kv = self.model, self.model.ops, self.kv
            scale = model.spec.head_dim**-0.5

            def attend(layer: int, q: Tensor) -> Tensor:
                return ops.grouped_decode_attention(q, kv.k[layer], kv.v[layer], plan.items[layer], scale)

            stream = run_blocks(
                model,
                embed(model, self.tokens),
                range(model.spec.n_layers),
                plan.rope,
                kv,
                plan.slots,
                attend,
                self.steering,
            )
            scores = logits(model, finish(model, stream, self.steering))
            self.tokens, logprobs = ops.sample(scores, plan.index, self.sampling)
            if self.sampling.seen is not None:
                self.sampling.seen.scatter_(1, self.tokens[:, None], True)
        return self.tokens.tolist(), logprobs.tolist()

    def _lay_out(self) -> list[_Step]:
        """The next steps, as many as have the same work items: no row enters another split or ends by its budget."""
        device, size = self.model.device, self.kv.page_size
        split = size * self.split_pages
        first = [row.position for row in self.rows]
        n_steps = min(
            HORIZON,
            *(split - row.position % split for row in self.rows),
            *(row.request.positions - row.position for row in self.rows),
        )
        ahead = torch.arange(n_steps, device=device)[:, None]
        positions = ahead + torch.tensor(first, device=device)
        # New tokens go to a row's own pages, which are the same for all blocks.
        width = max(len(row.low) for row in self.rows)
        table = torch.tensor([[*row.low, *[0] * (width - len(row.low))] for row in self.rows], device=device)
        slots = table.gather(1, (positions // size).t()).t() * size + positions % size
        cos, sin = rotary(self.model, positions)
        index = ahead + torch.tensor([len(row.tokens) for row in self.rows], device=device)

        items: list[AttentionItems] = []
        tails: list[tuple[Tensor, Tensor]] = []
        n_layers = self.model.spec.n_layers
        for end in sorted({row.fork for row in self.rows if row.low is not row.high} | {n_layers - 1}):
            tables = [row.pages_of(end) for row in self.rows]
            planned, tail = plan_items(tables, first, n_steps, size, self.split_pages, self.model)
            items += [planned] * (end + 1 - len(items))
            tails.append((planned.mask, tail))
        return [
            _Step(slots[t], (cos[t], sin[t]), index[t], items, [(mask, tail + t) for mask, tail in tails])
            for t in range(n_steps)
        ]


@dataclass(frozen=True)
class _Step:
    """What one step reads besides the tokens: ``slots`` and ``index`` ``[rows]``, cos and sin ``[rows, 1, d]``, the
    items of every block, and per mask the places ``[rows]`` of the positions that come into being with this step."""

    slots: Tensor
    rope: tuple[Tensor, Tensor]
    index: Tensor
    items: list[AttentionItems]
    grown: list[tuple[Tensor, Tensor]]


def plan_items(
    tables: Sequence[Sequence[int]],
    positions: Sequence[int],
    n_steps: int,
    page_size: int,
    split_pages: int,
    model: Model,
) -> tuple[AttentionItems, Tensor]:
    """Work items of ``n_steps`` steps for rows at ``positions`` that read through page tables ``tables``.

    Rows with the same pages in a split are one item, up to 16 of them: sharing follows from the pages alone. The mask
    shows positions [0, positions[r]); each step adds one.

    Returns:
        the items; ``[batch]`` int64, where in the flattened mask row r's position ``positions[r]`` is.
    """
    split = page_size * split_pages
    open_items: dict[tuple[int, tuple[int, ...]], int] = {}
    members: list[list[int]] = []
    pages: list[tuple[int, ...]] = []
    lengths: list[int] = []
    places: list[list[tuple[int, int]]] = []
    for row, (table, position) in enumerate(zip(tables, positions, strict=True)):
        mine = []
        used = (position + n_steps - 1) // page_size + 1
        for begin in range(0, position + 1, split):
            first = begin // page_size
            ids = tuple(table[first : min(first + split_pages, used)])
            item = open_items.get((first, ids))
            if item is None or len(members[item]) == ITEM_ROWS:
                item = open_items[first, ids] = len(members)
                members.append([])
                pages.append(ids)
                lengths.append(min(split, position - begin))
            mine.append((item, len(members[item])))
            members[item].append(row)
        places.append(mine)
    n, width = len(members), max(map(len, members))
    depth, most_pages = max(map(len, places)), max(map(len, pages))
    rows = np.zeros((n, width), dtype=np.int64)
    held = np.zeros((n, most_pages), dtype=np.int64)
    for item, (group, ids) in enumerate(zip(members, pages, strict=True)):
        rows[item, : len(group)] = group
        held[item, : len(ids)] = ids
        held[item, len(ids) :] = ids[0]
    span = most_pages * page_size
    merge = np.zeros((len(tables), depth), dtype=np.int64)
    merge_mask = np.full((len(tables), depth, 1), -np.inf, dtype=np.float32)
    for row, mine in enumerate(places):
        merge[row, : len(mine)] = [item * width + place for item, place in mine]
        merge_mask[row, : len(mine)] = 0.0
    tail = [mine[-1][0] * span + position % split for mine, position in zip(places, positions, strict=True)]

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(model.device)

    mask = np.where(np.arange(span) < np.array(lengths)[:, None], 0.0, -np.inf).astype(np.float32)
    single = depth == 1 and width == 1
    items = AttentionItems(
        rows=put(rows),
        pages=put(held),
        mask=put(mask)[:, None, None, :].to(model.dtype),
        merge=None if single else put(merge),
        merge_mask=put(merge_mask),
    )
    return items, torch.tensor(tail, device=model.device)


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
