"""Prefill: many prompts packed into one pass, chunk by chunk, forked where the branches' steerings part.

The same pass serves generation (KV only), reading (the last token's state after every block) and scoring (the
distribution at every position of a completion): they differ in what looks at the stream.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from icon2_rt.engine.bank import DirectionBank
from icon2_rt.engine.forward import Attend, Model, Observe, computing, embed, finish, run_blocks
from icon2_rt.engine.kv import KVPages
from icon2_rt.engine.record import Record
from icon2_rt.ops import RowSteering, Segment, Segments, rotary
from icon2_rt.steering import CompiledSteering


@dataclass(frozen=True)
class Copy:
    """One version of a prompt's KV: how its positions from ``steer_from`` on are steered, and the pages it is in."""

    steering: CompiledSteering | None
    pages: Sequence[int]
    steer_from: int = 0


@dataclass(frozen=True)
class Prefill:
    """Positions ``[start, end)`` of one prompt. Blocks up to ``fork`` are computed once, into the first copy's pages;
    later blocks once per copy, each into its own pages. ``fork`` is the design's l*; without one there is one copy."""

    tokens: Sequence[int]
    start: int
    end: int
    copies: Sequence[Copy]
    fork: int | None = None


@dataclass
class _Pack:
    """The pieces of one pass: a piece is a job's positions [start, end)."""

    pieces: list[tuple[int, int, int]] = field(default_factory=list)  # (job, start, end)
    n_tokens: int = 0


# (jobs and positions of every row, its final normed state [rows, hidden])
Outputs = Callable[[list[tuple[int, int, int]], Tensor], None]


def fork_layer(steerings: Sequence[CompiledSteering | None], n_layers: int) -> int | None:
    """l*: the lowest block after which the prompts' steerings differ; None where later blocks' KV stays common.

    A difference after the last block changes no KV.
    """
    effects = [s.effects if s is not None else (None,) * n_layers for s in dict.fromkeys(steerings)]
    return next((layer for layer in range(n_layers - 1) if len({e[layer] for e in effects}) > 1), None)


def run_prefill(
    model: Model,
    kv: KVPages,
    bank: DirectionBank,
    jobs: Sequence[Prefill],
    chunk: int,
    record: Record,
    *,
    observe: Callable[[list[tuple[int, int, int]], int, Tensor], None] | None = None,
    outputs: Outputs | None = None,
) -> None:
    """Compute the KV of all ``jobs`` into their pages, at most ``chunk`` tokens a pass.

    Args:
        record: counts the passes, and keeps the warnings about smaller ones.
        observe: called as ``observe(pieces, layer, h)`` after every block, ``h [tokens, hidden]`` being the pieces
            ``(job, start, end)`` one after the other; again from the first block if a pass does not fit the memory and
            is repeated in smaller ones. outputs: called with the final normed states instead of stopping
            at the last block's KV. Both need jobs without a fork.
    """
    by_fork: dict[int | None, list[int]] = defaultdict(list)
    for n, job in enumerate(jobs):
        if job.end > job.start:
            by_fork[job.fork].append(n)
    for fork, members in by_fork.items():
        todo = deque(_packs([(n, jobs[n].start, jobs[n].end) for n in members], chunk))
        while todo:
            pieces = todo.popleft().pieces
            try:
                with computing(model):
                    h = _run_pack(model, kv, bank, jobs, pieces, fork, observe, outputs is not None)
            except torch.OutOfMemoryError:
                if chunk <= kv.page_size:
                    raise
                chunk = max(chunk // 2, kv.page_size)
                record.fall_back(
                    f"no memory for a prefill pass of {sum(end - start for _, start, end in pieces)} tokens: passes of "
                    f"{chunk} are tried. A smaller prefill_chunk= or kv_memory= avoids this"
                )
                left = [pieces, *(pack.pieces for pack in todo)]
                todo = deque(_packs([piece for some in left for piece in some], chunk))
                continue
            record.prefill_passes += 1
            if outputs is not None and h is not None:
                with computing(model):
                    outputs(pieces, h)


def _packs(spans: Sequence[tuple[int, int, int]], chunk: int) -> Iterator[_Pack]:
    """Fill passes of ``chunk`` tokens with ``spans`` (job, start, end). A prompt is cut at absolute multiples of
    ``chunk`` only, whatever its neighbours, so that the same positions are always computed in the same pieces."""
    pack = _Pack()
    for n, start, stop in spans:
        while start < stop:
            end = min(stop, (start // chunk + 1) * chunk)
            if pack.pieces and pack.n_tokens + end - start > chunk:
                yield pack
                pack = _Pack()
            pack.pieces.append((n, start, end))
            pack.n_tokens += end - start
            start = end
    if pack.pieces:
        yield pack


def _run_pack(
    model: Model,
    kv: KVPages,
    bank: DirectionBank,
    jobs: Sequence[Prefill],
    pieces: list[tuple[int, int, int]],
    fork: int | None,
    observe: Callable[[list[tuple[int, int, int]], int, Tensor], None] | None,
    to_the_end: bool,
) -> Tensor | None:
    """One pass; the final normed states ``[tokens, hidden]`` where it went ``to_the_end``."""
    n_layers, device = model.spec.n_layers, model.device
    tokens = torch.tensor([t for n, start, end in pieces for t in jobs[n].tokens[start:end]], device=device)
    watch: Observe | None = None if observe is None else (lambda layer, h: observe(pieces, layer, h))

    def lay_out(copies: list[tuple[int, int, int, Copy]]) -> tuple[tuple[Tensor, Tensor], Tensor, Attend]:
        """Rotary factors, slots and attention of pieces (job, start, end) with the copy that they are computed for."""
        positions = torch.cat([_span(start, end) for _, start, end, _ in copies])
        slots, segments, begin = [], [], 0
        for _, start, end, copy in copies:
            pages = torch.tensor(copy.pages[: kv.pages_for(end)], device="cpu")
            at = _span(start, end)
            slots.append(pages[at // kv.page_size] * kv.page_size + at % kv.page_size)
            segments.append(Segment(begin, begin + end - start, start, pages.to(device)))
            begin += end - start
        scale, packed = model.spec.head_dim**-0.5, Segments(tuple(segments), kv.page_size)

        def attend(layer: int, q: Tensor) -> Tensor:
            return model.ops.prefill_attention(q, kv.k[layer], kv.v[layer], packed, scale)

        rope = rotary(positions.to(device), model.weights.inv_freq, model.spec.rope_scaling, model.dtype)
        return rope, torch.cat(slots).to(device), attend

    def steer(copies: list[tuple[int, int, int, Copy]]) -> RowSteering | None:
        return bank.row_steering(
            [
                copy.steering if position >= copy.steer_from else None
                for _, start, end, copy in copies
                for position in range(start, end)
            ]
        )

    shared = [(n, start, end, jobs[n].copies[0]) for n, start, end in pieces]
    rope, slots, attend = lay_out(shared)
    stream = embed(model, tokens)
    if fork is None:
        steering = steer(shared) if any(copy.steering for *_, copy in shared) else None
        stream = run_blocks(
            model,
            stream,
            range(n_layers),
            rope,
            kv,
            slots,
            attend,
            steering,
            watch,
            kv_only=not to_the_end and watch is None,
        )
        return finish(model, stream, steering, watch) if to_the_end or watch is not None else None
    # Up to block l* the copies agree, also in what is added after the blocks before l*.
    stream = run_blocks(model, stream, range(fork + 1), rope, kv, slots, attend, steer(shared))
    forked, rows, begin = [], [], 0
    for n, start, end in pieces:
        for copy in jobs[n].copies:
            forked.append((n, start, end, copy))
            rows.append(_span(begin, begin + end - start))
        begin += end - start
    rope, slots, attend = lay_out(forked)
    run_blocks(
        model,
        stream.take(torch.cat(rows).to(device)),
        range(fork + 1, n_layers),
        rope,
        kv,
        slots,
        attend,
        steer(forked),
        kv_only=True,
    )
    return None


def _span(start: int, end: int) -> Tensor:
    return torch.arange(start, end, device="cpu")
