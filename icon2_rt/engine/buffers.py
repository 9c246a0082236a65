"""The buffers that a step reads, allocated once for all seats of a batch. Who writes them decides where they are.

What only the host writes (settings, page tables, steering tables, items) is in one arena. What the device advances
(:class:`~icon2_rt.ops.RowState`) is apart from it, so that no upload touches a row that runs; of it the sampled tokens
and their log-probabilities are side by side, so that one copy brings both down. The rest is memory that ops leave
partial results in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from icon2_rt.engine.bank import DirectionBank
from icon2_rt.engine.forward import Model
from icon2_rt.engine.items import item_rows
from icon2_rt.engine.kv import KVPages
from icon2_rt.engine.rows import Row
from icon2_rt.engine.step import StepInputs
from icon2_rt.engine.upload import ALIGNMENT, Arena, Field
from icon2_rt.ops import AttentionItems, RowSampling, RowState, RowSteering


@dataclass(frozen=True)
class BatchSizes:
    """``seats`` rows; ``partials`` places for the partial results of attention; at most ``eos`` ending tokens a row;
    ``terms`` of a steering; ``split_pages`` pages in a split."""

    seats: int
    partials: int
    eos: int
    terms: int
    split_pages: int

    def hold(self, other: BatchSizes) -> bool:
        return self.seats >= other.seats and self.partials >= other.partials and self.eos >= other.eos


class Buffers:
    """All buffers of a batch at their full size, every seat free.

    Attributes:
        arena: what the host writes, by the names of the fields of RowSampling, RowSteering and AttentionItems, and
            ``tables``, ``joining``, ``join_tokens``, ``join_positions``, ``join_generated`` (``[seats]``): the state of
            rows that take their seats with the next upload.
        results: ``[n]`` uint8, the bytes of ``state.tokens`` and ``state.logprobs``.
        inputs: tensors over all of it, for a step of all seats.
    """

    def __init__(self, model: Model, kv: KVPages, bank: DirectionBank, sizes: BatchSizes):
        spec, device, seats = model.spec, model.device, sizes.seats
        n_items = 2 * sizes.partials  # a row's split is one item below its fork and one above
        steering = (seats, spec.n_layers, sizes.terms)
        i32, i64, f32, bits = np.int32, np.int64, np.float32, np.bool_
        self.arena = Arena(
            {
                "joining": Field((seats,), i64),
                "join_tokens": Field((seats,), i64),
                "join_positions": Field((seats,), i32),
                "join_generated": Field((seats,), i32),
                "sampled": Field((seats,), bits),
                "seeds": Field((seats, 2), i64),
                "temperature": Field((seats,), f32, 1.0),
                "top_k": Field((seats,), i32, spec.vocab_size),
                "top_p": Field((seats,), f32, 1.0),
                "min_p": Field((seats,), f32),
                "repetition_penalty": Field((seats,), f32, 1.0),
                "eos": Field((seats, sizes.eos), i32, -1),
                "min_tokens": Field((seats,), i32),
                "budget": Field((seats,), i32),
                "keep_norm": Field((seats,), bits),
                "which": Field((seats,), i32, -1),
                "items": Field((1,), i32),
                "starts": Field((seats,), i32),
                "splits": Field((n_items,), i32),
                "layers": Field((n_items, 2), i32),
                "pages": Field((n_items, sizes.split_pages), i32),
                "rows": Field((n_items, item_rows(spec)), i32, -1),
                "count": Field(steering[:2], i32),
                "index": Field(steering, i32),
                "alpha": Field(steering, f32),
                "beta": Field(steering, f32),
                "tables": Field((seats, min(kv.n_pages, kv.pages_for(spec.max_length))), i32),
            },
            device,
        )
        up = self.arena.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        behind_tokens = -(-8 * seats // ALIGNMENT) * ALIGNMENT
        self.results = zeros(behind_tokens + 4 * seats, dtype=torch.uint8)
        partials = partial_lse = None
        if model.ops.attention_partials:
            partials = zeros(sizes.partials, spec.n_heads, spec.head_dim, dtype=torch.float32)
            partial_lse = zeros(sizes.partials, spec.n_heads, dtype=torch.float32)
        scratch = model.ops.sample_scratch(seats, spec.vocab_size)
        self._of: dict[int, StepInputs] = {}
        self.inputs = StepInputs(
            state=RowState(
                tokens=tokens_of(self.results, seats),
                positions=zeros(seats),
                generated=zeros(seats),
                running=zeros(seats, dtype=torch.bool),
                logprobs=logprobs_of(self.results, seats),
            ),
            tables=up["tables"],
            items=AttentionItems(
                rows=up["rows"],
                pages=up["pages"],
                splits=up["splits"],
                layers=up["layers"],
                count=up["items"],
                starts=up["starts"],
                lengths=zeros(n_items),
                n_splits=zeros(seats),
                split=kv.page_size * sizes.split_pages,
                n_partials=sizes.partials,
                partials=partials,
                partial_lse=partial_lse,
            ),
            steering=RowSteering(
                bank=bank.vectors,
                count=up["count"],
                index=up["index"],
                alpha=up["alpha"],
                beta=up["beta"],
                keep_norm=up["keep_norm"],
                which=up["which"],
            ),
            sampling=RowSampling(
                seen=zeros(seats, spec.vocab_size, dtype=torch.bool),
                scratch=zeros(scratch, dtype=torch.uint8) if scratch else None,
                **{f.name: up[f.name] for f in fields(RowSampling) if f.name in up},
            ),
        )

    def of(self, n: int) -> StepInputs:
        """The first ``n`` seats, with nothing known about them; the items as they are now, of which an op may keep what
        it worked out."""
        if n not in self._of:
            self._of[n] = self._first(n)
        return replace(self._of[n], items=replace(self._of[n].items))

    def _first(self, n: int) -> StepInputs:
        b = self.inputs
        assert b.steering is not None
        per_row = {name: x[:n] for name, x in vars(b.sampling).items() if name != "scratch"}
        return StepInputs(
            state=RowState(*(x[:n] for x in vars(b.state).values())),
            tables=b.tables[:n],
            items=replace(b.items, starts=b.items.starts[:n], n_splits=b.items.n_splits[:n]),
            steering=replace(b.steering, which=b.steering.which[:n]),
            sampling=replace(b.sampling, **per_row),
        )


def tokens_of(results: Tensor, seats: int) -> Tensor:
    """``[seats]`` int64, in the bytes of :attr:`Buffers.results`."""
    return results[: 8 * seats].view(torch.int64)


def logprobs_of(results: Tensor, seats: int) -> Tensor:
    """``[seats]`` fp32, in the bytes of :attr:`Buffers.results`."""
    return results[-4 * seats :].view(torch.float32)


def read_results(copied: Tensor, seats: int, n: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of the first ``n`` of ``seats`` seats, from the bytes of :attr:`Buffers.results` on
    the host. By numpy, whose views cost a tenth of torch's: this is done in every step."""
    found = copied.numpy()
    return found[: 8 * n].view(np.int64).tolist(), found[-4 * seats :].view(np.float32)[:n].tolist()


def sampling_of(rows: Sequence[Row], vocab: int, n_eos: int) -> dict[str, np.ndarray]:
    """The rows' settings under the names of :class:`~icon2_rt.ops.RowSampling`; a greedy row's filters are neutral."""
    options = [row.request.sampling for row in rows]
    seeds = [row.seed for row in rows]

    def column(name: str, neutral: float, dtype: type) -> np.ndarray:
        values = (neutral if seed is None else getattr(o, name) for o, seed in zip(options, seeds, strict=True))
        return np.fromiter(values, dtype=dtype, count=len(rows))

    top_k = column("top_k", 0, np.int32)
    words = [(0, 0) if seed is None else (seed & 0xFFFFFFFF, seed >> 32) for seed in seeds]
    eos = np.full((len(rows), n_eos), -1, dtype=np.int32)
    for row, o in enumerate(options):
        eos[row, : len(o.eos_token_ids)] = o.eos_token_ids
    return {
        "sampled": np.array([seed is not None for seed in seeds]),
        "seeds": np.array(words, dtype=np.int64),
        "temperature": column("temperature", 1.0, np.float32),
        "top_k": np.where(top_k == 0, vocab, top_k).astype(np.int32),
        "top_p": column("top_p", 1.0, np.float32),
        "min_p": column("min_p", 0.0, np.float32),
        "repetition_penalty": np.array([o.repetition_penalty for o in options], dtype=np.float32),
        "eos": eos,
        "min_tokens": np.array([max(0, row.min_tokens) for row in rows], dtype=np.int32),
        "budget": np.array([row.request.budget for row in rows], dtype=np.int32),
    }
