"""Prefill: many prompts packed into one pass, chunk by chunk, forked where the branches' steerings part.

The same pass serves generation (KV only), reading (the last token's state after every block) and scoring (the
distribution at every position of a completion): they differ in what looks at the stream.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from icon2_rt.engine.bank import DirectionBank
from icon2_rt.engine.forward import Attend, Model, Observe, computing, embed, finish, run_blocks
from icon2_rt.engine.kv import KVPages
from icon2_rt.engine.record import Record
from icon2_rt.engine.upload import Staging
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
    staging: Staging,
    *,
    observe: Callable[[list[tuple[int, int, int]], int, Tensor], None] | None = None,
    outputs: Outputs | None = None,
) -> None:
    """Compute the KV of all ``jobs`` into their pages, at most ``chunk`` tokens a pass.

    What a pass reads goes up through ``staging`` in one copy, and nothing waits for the device.

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
                    h = _run_pack(model, kv, bank, jobs, pieces, fork, observe, outputs is not None, staging)
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
    staging: Staging,
) -> Tensor | None:
    """One pass; the final normed states ``[tokens, hidden]`` where it went ``to_the_end``."""
    n_layers = model.spec.n_layers
    watch: Observe | None = None if observe is None else (lambda layer, h: observe(pieces, layer, h))
    shared = _Stretch([(n, start, end, jobs[n].copies[0]) for n, start, end in pieces], kv.page_size, bank)
    forked = None
    if fork is not None:
        each = [(n, start, end, copy) for n, start, end in pieces for copy in jobs[n].copies]
        forked = _Stretch(each, kv.page_size, bank)
    # Everything that the pass reads goes up at once.
    host: dict[str, np.ndarray] = {
        "tokens": np.concatenate([np.array(jobs[n].tokens[start:end], dtype=np.int64) for n, start, end in pieces]),
        **{f"shared {name}": array for name, array in shared.arrays.items()},
    }
    if forked is not None:
        host |= {f"forked {name}": array for name, array in forked.arrays.items()}
        host["rows"] = _rows_of_copies(pieces, jobs)
    up = staging.upload(host)
    rope, slots, attend, steering = shared.on(_part(up, "shared "), model, kv)
    stream = embed(model, up["tokens"])
    if forked is None or fork is None:
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
    stream = run_blocks(model, stream, range(fork + 1), rope, kv, slots, attend, steering)
    rope, slots, attend, steering = forked.on(_part(up, "forked "), model, kv)
    run_blocks(
        model,
        stream.take(up["rows"]),
        range(fork + 1, n_layers),
        rope,
        kv,
        slots,
        attend,
        steering,
        kv_only=True,
    )
    return None


@dataclass(frozen=True)
class _PackedSegments(Segments):
    """Segments whose tensors (slots, queries before, keys before) are on the device already."""

    uploaded: tuple[Tensor, Tensor, Tensor]

    @property
    def slots(self) -> Tensor:
        return self.uploaded[0]

    @property
    def queries_before(self) -> Tensor:
        return self.uploaded[1]

    @property
    def keys_before(self) -> Tensor:
        return self.uploaded[2]


class _Stretch:
    """Pieces (job, start, end, copy) that go through the same blocks: what their tokens need there, on the host.

    Attributes:
        arrays: ``positions`` and ``slots`` ``[tokens]`` int64, where each token stands and where its K and V go;
            ``seen`` ``[keys]`` int64, the slots that the pieces attend to, and ``pages`` int64, the pages of those;
            ``queries_before`` and ``keys_before`` ``[pieces + 1]`` int32; and those of the steering.
    """

    def __init__(self, pieces: Sequence[tuple[int, int, int, Copy]], page_size: int, bank: DirectionBank):
        self._spans = [(start, end) for _, start, end, _ in pieces]
        self._page_size = page_size
        offset = np.arange(page_size)
        positions, slots, seen, tables = [], [], [], []
        for _, start, end, copy in pieces:
            pages = np.array(copy.pages[: -(-end // page_size)], dtype=np.int64)
            at = (pages[:, None] * page_size + offset).reshape(-1)[:end]
            positions.append(np.arange(start, end))
            slots.append(at[start:])
            seen.append(at)
            tables.append(pages)
        self.steering = None
        if any(copy.steering for *_, copy in pieces):
            self.steering = bank.know(
                [
                    copy.steering if position >= copy.steer_from else None
                    for _, start, end, copy in pieces
                    for position in range(start, end)
                ]
            )
        queries = [0, *(end - start for start, end in self._spans)]
        keys = [0, *(end for _, end in self._spans)]
        self.arrays: dict[str, np.ndarray] = {
            "positions": np.concatenate(positions),
            "slots": np.concatenate(slots),
            "seen": np.concatenate(seen),
            "pages": np.concatenate(tables),
            "queries_before": np.cumsum(queries, dtype=np.int32),
            "keys_before": np.cumsum(keys, dtype=np.int32),
            **(self.steering.arrays if self.steering is not None else {}),
        }

    def on(
        self, up: Mapping[str, Tensor], model: Model, kv: KVPages
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Attend, RowSteering | None]:
        """Rotary factors, slots, attention and steering, of the arrays on the device."""
        segments, begin, page = [], 0, 0
        for start, end in self._spans:
            n_pages = -(-end // self._page_size)
            segments.append(Segment(begin, begin + end - start, start, up["pages"][page : page + n_pages]))
            begin, page = begin + end - start, page + n_pages
        scale = model.spec.head_dim**-0.5
        uploaded = up["seen"], up["queries_before"], up["keys_before"]
        packed = _PackedSegments(tuple(segments), self._page_size, uploaded)

        def attend(layer: int, q: Tensor) -> Tensor:
            return model.ops.prefill_attention(q, kv.k[layer], kv.v[layer], packed, scale)

        rope = rotary(up["positions"], model.weights.inv_freq, model.spec.rope_scaling, model.dtype)
        return rope, up["slots"], attend, self.steering.on(up) if self.steering is not None else None


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rows_of_copies(pieces: Sequence[tuple[int, int, int]], jobs: Sequence[Prefill]) -> np.ndarray:
    """``[rows]`` int64: which row of the pass each row after the fork comes from, a piece's rows once a copy."""
    rows, begin = [], 0
    for n, start, end in pieces:
        rows += [np.arange(begin, begin + end - start)] * len(jobs[n].copies)
        begin += end - start
    return np.concatenate(rows)
