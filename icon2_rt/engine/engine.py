"""The engine: admits groups, prefills their prompts, decodes all rows together, hands back what is done.

A group is admitted when the pages that its rows could ever need are free, so a running row never waits for memory and
nothing is preempted; until then it waits in order. Everything that can be refused is refused before work starts.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icon2_rt.engine.bank import DirectionBank
from icon2_rt.engine.batch import Batch, Manner
from icon2_rt.engine.buffers import BatchSizes
from icon2_rt.engine.forward import Model, logits
from icon2_rt.engine.items import ITEM_QUERIES, partials_of
from icon2_rt.engine.kv import LEAST_PARTIALS, PARTIALS_SHARE, SCORED_ROWS, KVPages, Reserve, page_bytes, plan_pages
from icon2_rt.engine.prefill import Copy, Prefill, fork_layer, run_prefill
from icon2_rt.engine.record import Record
from icon2_rt.engine.rows import PinnedPrefix, Reading, Request, Row
from icon2_rt.engine.stops import Decode, StopText
from icon2_rt.engine.stream import EngineStream, in_stream, steps_in_stream
from icon2_rt.engine.turns import turns_on
from icon2_rt.engine.upload import Staging
from icon2_rt.outputs import FinishReason
from icon2_rt.steering import CompiledSteering

# How many steps the device may be ahead of what the host has looked at: enough that it never waits for Python.
_BEHIND = 3
# A prefill pass costs the host about as much as a decode step, so groups are let in several at a time (_is_due).
_LEAST_ROWS_ADMITTED, _MOST_SEATS_KEPT_FREE = 4, 0.25
_LONGEST_HELD = 16  # steps
# source page, target page, blocks
PageCopy = tuple[int, int, slice]


@dataclass(frozen=True)
class EngineOptions:
    """Sizes that are fixed when a runtime is made. ``kv_memory`` in bytes, or None: what is free."""

    kv_memory: int | str | None = None
    page_size: int = 32
    split_pages: int = 4
    max_rows: int = 64
    max_directions: int = 64
    max_terms: int = 8
    prefill_chunk: int = 2048
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("page_size", "split_pages", "max_rows", "max_directions", "max_terms", "prefill_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not isinstance(self.cuda_graphs, bool):
            raise ValueError(f"cuda_graphs must be True or False, not {self.cuda_graphs!r}")


@dataclass(frozen=True)
class _Plan:
    """The pages of one group, counted before they are taken: ``shared`` full pages of the prompt (``reused`` of them
    from a pinned prefix) for the first copy, the same number for each further copy, ``own`` for every row."""

    shared: int
    reused: int
    own: int
    copies: int
    rows: int

    @property
    def pages(self) -> int:
        return self.shared * self.copies - self.reused + self.own * self.rows


class Engine:
    """KV memory, the direction bank and the loop over both. One per runtime; calls may nest (a stream may be open
    while another call runs), each sees only its own rows. One thread at a time may work with it: ``turns`` is for
    whoever calls to take."""

    def __init__(self, model: Model, options: EngineOptions):
        spec = model.spec
        self.model, self.options = model, options
        self.stream = EngineStream(model.device)  # every entry point that touches the device runs in it
        heads = spec.n_heads // spec.n_kv_heads
        fixed = model.ops.fixed
        self.turns = turns_on(model.device, fixed)
        if fixed and heads > ITEM_QUERIES:
            raise ValueError(
                f"this model has {heads} query heads for each KV head; the Triton kernels' tile holds {ITEM_QUERIES}. "
                f"Use backend='reference'"
            )
        n_pages = plan_pages(
            spec, options.page_size, model.dtype, model.device, options.kv_memory, self._reserve(fixed)
        )
        # In the engine's own stream, where the zeros are written before anything else. And not in inference mode:
        # tensors made inside it could not be written to outside.
        with self.stream(), torch.inference_mode(False):
            self.kv = KVPages(spec, n_pages, options.page_size, model.dtype, model.device)
            self.bank = DirectionBank(
                options.max_directions, options.max_terms, spec.n_layers, spec.hidden_size, model.device
            )
            self.staging = Staging(model.device)
        self._prefixes: set[PinnedPrefix] = set()
        self._batches: list[Batch] = []
        cuda = model.device.type == "cuda"
        self._manner = Manner(fixed, _BEHIND if fixed and cuda else 0, fixed and cuda and options.cuda_graphs)

    # ---------------------------------------------------------------- decoding

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse what can never run.

        Raises:
            ValueError: a group needs more pages than there are (the message holds the arithmetic), or the steerings
                more terms or directions than the runtime was made for.
        """
        self.bank.check(b.steering for r in requests for b in r.branches)
        for request in requests:
            plan = self._plan(request)
            self._check_fits(
                plan.pages + plan.reused,
                f"prompts[{request.index}]: {plan.rows} branch(es) of {len(request.tokens)} prompt tokens "
                f"and {request.budget} new ones",
                f"{plan.shared} shared × {plan.copies} version(s) of the prompt + {plan.own} own × {plan.rows}",
            )

    @steps_in_stream
    def decode(
        self, requests: Sequence[Request], decode: Decode | None = None, record: Record | None = None
    ) -> Iterator[tuple[Request, list[Row]]]:
        """Run ``requests``; yields each with its finished rows when the last of them is done. A row whose logits are
        not finite ends there (``finish`` "error"), and it alone.

        Rows run together, at most ``max_rows`` at once (a larger group runs by itself). The schedule follows from the
        requests and the options alone. Closing the iterator gives all pages back; ``record`` is whole then.

        Raises:
            RuntimeError: a prefix was let go before the first step, or others hold the pages that a group needs.
        """
        self.check(requests)
        record = record if record is not None else Record()
        prefixes = {r.prefix for r in requests if r.prefix is not None}
        if not prefixes <= self._prefixes:
            raise RuntimeError("the prefix was let go before this stream began: take its first pair inside the `with`")
        waiting = deque((request, self._plan(request)) for request in requests)
        pinned = self.bank.pin(b.steering for r in requests for b in r.branches)
        for prefix in prefixes:  # groups that wait need it even if its `with` block ends before the stream does
            self.kv.retain(prefix.pages)
        held = 0  # steps that groups wait although there is room for them
        groups: dict[int, list[Row]] = {}
        running: list[Row] = []
        batch = None
        try:
            batch = self._take_batch(requests)
            batch.record = record
            while waiting or running:
                if batch.sparse and not batch.under_way:
                    batch.close_ranks()
                fitting = self._fitting(waiting, len(running), batch)
                if self._is_due(fitting, len(running), len(waiting), held):
                    admitted = self._admit(fitting, batch.record)
                    joining = [row for rows in admitted for row in rows]
                    running += joining  # first of all: whatever happens, their pages are given back
                    for rows in admitted:
                        waiting.popleft()
                        groups[id(rows[0].request)] = rows
                        if decode is not None and (strings := rows[0].request.sampling.stop_strings):
                            for row in rows:
                                row.stops = StopText(strings, row.request.tokens, decode)
                    batch.join(joining)
                    fitting, held = [], 0
                if not running:  # nothing of ours will free a page: somebody else holds them
                    self._check_free(waiting[0][1].pages)
                # Rows that sit far apart are moved together once nothing is under way.
                wait = bool(batch.under_way) and batch.sparse and not waiting
                if not wait and any(row.launched < row.request.budget for row in running):
                    batch.launch()
                    held += bool(fitting)
                    if len(batch.under_way) <= batch.behind:
                        continue
                done = []
                for row, token, logprob in batch.results():
                    if math.isnan(logprob):  # its logits are not finite: this row ends alone
                        row.finish = "error"
                        self.kv.spoil(row.pages)
                        done.append(row)
                        continue
                    row.token = token
                    row.position += 1
                    row.tokens.append(token)
                    row.logprobs.append(logprob)
                    row.finish = _finish_reason(row)
                    if row.finish is not None:
                        done.append(row)
                if done:
                    batch.leave(done)
                    running = [row for row in running if row.finish is None]
                    for row in done:
                        self.kv.release(row.pages)
                        record.decoded(row)
                    for key in dict.fromkeys(id(row.request) for row in done):
                        if all(row.finish is not None for row in groups[key]):
                            rows = groups.pop(key)
                            yield rows[0].request, rows
        finally:
            for row in running:  # what is finished has left this list
                self.kv.release(row.pages)
                record.decoded(row)
            for prefix in prefixes:
                self.kv.release(prefix.pages)
            self.bank.unpin(pinned)
            if batch is not None:
                record.fallbacks += batch.fallbacks
                batch.clear()
                self._batches.append(batch)

    def _take_batch(self, requests: Sequence[Request]) -> Batch:
        """Buffers for a call, used again by the next one; calls that nest have each their own."""
        options, kv = self.options, self.kv
        split = kv.page_size * options.split_pages
        needs = [len(r.branches) * partials_of(r, split) for r in requests]
        each = 4 * self.model.spec.n_heads * (self.model.spec.head_dim + 1)  # bytes of a partial result
        room = max(LEAST_PARTIALS, kv.n_bytes // PARTIALS_SHARE) // each
        seats = max([options.max_rows, *(len(r.branches) for r in requests)])
        sizes = BatchSizes(
            seats=seats,
            partials=max([min(room, seats * -(-self.model.spec.max_length // split)), *needs]),
            eos=max([4, *(len(r.sampling.eos_token_ids) for r in requests)]),
            terms=options.max_terms,
            split_pages=options.split_pages,
        )
        for n, batch in enumerate(self._batches):
            if batch.sizes.hold(sizes):
                return self._batches.pop(n)
        self._batches.clear()  # too small, all of them: their memory goes to the new one
        return Batch(self.model, kv, self.bank, sizes, self._manner, self.staging)

    def _plan(self, request: Request) -> _Plan:
        kv = self.kv
        full = (len(request.tokens) - 1) // kv.page_size
        copies = len(self._versions(request)[1])
        own = kv.pages_for(request.positions) - full
        return _Plan(full, request.reused // kv.page_size, own, copies, len(request.branches))

    def _versions(self, request: Request) -> tuple[int | None, list[int]]:
        """l* (None: nothing forks), and the first branch of each distinct version of the prompt's later KV."""
        steerings = request.prompt_steerings
        fork = fork_layer(steerings, self.model.spec.n_layers)
        if fork is None:
            return None, [0]
        first: dict[object, int] = {}
        for n, steering in enumerate(steerings):
            first.setdefault(steering.identity if steering else None, n)
        return fork, list(first.values())

    def _fitting(self, waiting: Sequence[tuple[Request, _Plan]], n_running: int, batch: Batch) -> list[Request]:
        """The groups at the front for which there are seats, pages and places for partial results now. A group larger
        than ``max_rows`` runs by itself."""
        fitting: list[Request] = []
        rows, pages, partials = n_running, self.kv.free_pages, batch.free_partials
        seats = min(self.options.max_rows, batch.capacity)
        for request, plan in waiting:
            if rows and rows + plan.rows > seats:
                break
            rows += plan.rows
            pages -= plan.pages
            partials -= plan.rows * batch.partials_of(request)
            if pages < 0 or partials < 0:
                break
            fitting.append(request)
        return fitting

    def _is_due(self, fitting: Sequence[Request], n_running: int, n_waiting: int, held: int) -> bool:
        """Whether the groups that fit are let in now, by one rule that knows nothing of time: where nothing runs, where
        they have at least ``max(4, max_rows / 8)`` rows or a quarter of ``max_rows``, where no other group waits, or
        when they were held back for 16 steps."""
        if not fitting:
            return False
        if not n_running or len(fitting) == n_waiting or held >= _LONGEST_HELD:
            return True
        rows, seats = sum(len(request.branches) for request in fitting), self.options.max_rows
        # With few seats, those that are kept free cost more steps than passes are saved.
        return rows >= min(max(_LEAST_ROWS_ADMITTED, seats // 8), _MOST_SEATS_KEPT_FREE * seats)

    def _admit(self, requests: Sequence[Request], record: Record) -> list[list[Row]]:
        """Give groups their pages, and prefill them together."""
        admitted: list[list[Row]] = []
        jobs: list[Prefill] = []
        copies: list[PageCopy] = []
        try:
            for request in requests:
                rows, job, partly_filled = self._open(request)
                admitted.append(rows)
                jobs.append(job)
                copies += partly_filled
            self._prefill(jobs, record)
            self._copy(copies)
        except BaseException:
            for rows in admitted:
                for row in rows:
                    self.kv.release(row.pages)
            raise
        return admitted

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        """Copy pages, none of which is a source and a target at the same blocks, all of the same blocks together."""
        by_blocks: dict[tuple[int | None, int | None], list[tuple[int, int]]] = defaultdict(list)
        for source, target, blocks in copies:
            by_blocks[blocks.start, blocks.stop].append((source, target))
        if not by_blocks:
            return
        pages = self.staging.upload({str(span): np.array(pairs).T for span, pairs in by_blocks.items()})
        for span in by_blocks:
            sources, targets = pages[str(span)].unbind()
            self.kv.copy(sources, targets, slice(*span))

    def _prefill(self, jobs: Sequence[Prefill], record: Record, **watching: Any) -> None:
        chunk = self.options.prefill_chunk
        run_prefill(self.model, self.kv, self.bank, jobs, chunk, record, self.staging, **watching)

    def _open(self, request: Request) -> tuple[list[Row], Prefill, list[PageCopy]]:
        """Give a group its pages: the rows, the prefill that fills them, and the copies that follow it, by which each
        row gets a last, partly filled page of its own."""
        kv, plan = self.kv, self._plan(request)
        fork, firsts = self._versions(request)
        last = len(request.tokens) - 1
        reused = list(request.prefix.pages[: plan.reused]) if request.prefix else []
        kv.retain(reused)
        versions = [reused + kv.allocate(plan.shared - plan.reused), *(kv.allocate(plan.shared) for _ in firsts[1:])]
        steerings = request.prompt_steerings
        identities = [steering and steering.identity for steering in steerings]
        rows, version_of = [], []
        for n in range(plan.rows):
            version = 0 if fork is None else next(v for v, f in enumerate(firsts) if identities[f] == identities[n])
            own = kv.allocate(plan.own)
            low = versions[0] + own
            high = low if version == 0 else versions[version] + own
            kv.retain({*versions[0], *versions[version]})
            boundary = self.model.spec.n_layers - 1 if fork is None else fork
            rows.append(Row(request, n, low, high, boundary, last, request.tokens[last]))
            version_of.append(version)
        for pages in versions:
            kv.release(pages)  # the rows hold them now
        start = request.reused
        if request.prefix is not None and start % kv.page_size:
            # The part of the pinned prefix that does not fill a page is copied, and continued.
            kv.copy(request.prefix.pages[start // kv.page_size], rows[0].low[start // kv.page_size])
        copies: list[PageCopy] = []
        if last % kv.page_size:
            for n, row in enumerate(rows):
                first = firsts[version_of[n]]
                if n != 0:
                    blocks = slice(None) if fork is None else slice(fork + 1)
                    copies.append((rows[0].low[plan.shared], row.low[plan.shared], blocks))
                if fork is not None and n != first:
                    copies.append((rows[first].low[plan.shared], row.low[plan.shared], slice(fork + 1, None)))
        job = Prefill(request.tokens, start, last, [Copy(steerings[f], rows[f].high) for f in firsts], fork)
        return rows, job, copies

    # ---------------------------------------------------------------- prefixes

    @in_stream
    def pin(self, tokens: Sequence[int]) -> PinnedPrefix:
        """Prefill ``tokens``, unsteered, and hold their pages until :meth:`unpin`.

        Raises:
            ValueError: more pages than there are. RuntimeError: more than are free now.
        """
        n = self.kv.pages_for(len(tokens))
        self._check_fits(n, f"a prefix of {len(tokens)} tokens", f"{len(tokens)} / {self.kv.page_size}, rounded up")
        self._check_free(n)
        pages = self.kv.allocate(n)
        try:
            job = Prefill(tokens, 0, len(tokens), [Copy(None, pages)])
            self._prefill([job], Record())
        except BaseException:
            self.kv.release(pages)
            raise
        prefix = PinnedPrefix(tuple(tokens), tuple(pages))
        self._prefixes.add(prefix)
        return prefix

    @in_stream
    def unpin(self, prefix: PinnedPrefix) -> None:
        self._prefixes.remove(prefix)
        self.kv.release(prefix.pages)

    # ---------------------------------------------------------------- reading

    @steps_in_stream
    def read(
        self,
        prompts: Sequence[Reading],
        visit: Callable[[list[int], int, Tensor], None],
        record: Record,
        prefix: PinnedPrefix | None = None,
    ) -> Iterator[list[int]]:
        """Show the residual stream of prompts at chosen positions: ``visit(places [n], layer, h [n, hidden])`` after
        each block, a batch of prompts at a time. All positions of all prompts are numbered one after the other, and a
        place is such a number: the prompt's index where each prompt shows one. Yields the indices of each batch."""
        first = list(accumulate((len(p.positions) for p in prompts), initial=0))

        def observe(jobs: list[int], pieces: list[tuple[int, int, int]], layer: int, h: Tensor) -> None:
            begin, rows, places = 0, [], []
            for n, start, end in pieces:
                for k, position in enumerate(prompts[jobs[n]].positions):
                    if start <= position < end:
                        rows.append(begin + position - start)
                        places.append(first[jobs[n]] + k)
                begin += end - start
            if rows:
                visit(places, layer, h[self.staging.upload({"rows": np.array(rows)})["rows"]])

        pinned = self.bank.pin(p.steering for p in prompts)
        try:
            for jobs, tables in self._borrow([p.end for p in prompts]):
                work: list[Prefill] = []
                copies: list[PageCopy] = []
                for n, pages in zip(jobs, tables, strict=True):
                    prompt, start = prompts[n], prompts[n].reused(prefix)
                    if prefix is not None and start:
                        count = self.kv.pages_for(start)
                        copies += zip(prefix.pages[:count], pages[:count], repeat(slice(None)))
                    begin = 0 if prompt.steering is None else first_steered(prompt.steering, len(prompt.tokens))
                    if prompt.steering is not None:
                        self.kv.spoil(pages)  # it may be too strong: no number that is not finite stays in them
                    work.append(Prefill(prompt.tokens, start, prompt.end, [Copy(prompt.steering, pages, begin)]))
                self._copy(copies)
                watch = partial(observe, jobs)
                self._prefill(work, record, observe=watch)
                for job in work:
                    [copy] = job.copies
                    record.read(copy.steering, max(0, job.end - copy.steer_from))
                yield jobs
        finally:
            self.bank.unpin(pinned)

    @steps_in_stream
    def score(
        self, sequences: Sequence[tuple[Sequence[int], int, CompiledSteering | None]], record: Record
    ) -> Iterator[tuple[int, list[float], list[float]]]:
        """Teacher-forced figures of sequences (tokens, number of prompt tokens, steering): yields (index,
        log-probability of each completion token, entropy in nats of the distribution that it came from)."""
        pinned = self.bank.pin(steering for *_, steering in sequences)
        try:
            for jobs, tables in self._borrow([len(tokens) for tokens, *_ in sequences]):
                work = []
                for n, pages in zip(jobs, tables, strict=True):
                    tokens, n_prompt, steering = sequences[n]
                    begin = 0 if steering is None else first_steered(steering, n_prompt)
                    work.append(Prefill(tokens, 0, len(tokens) - 1, [Copy(steering, pages, begin)]))
                figures: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in jobs}

                def collect(
                    pieces: list[tuple[int, int, int]], h: Tensor, jobs: list[int] = jobs, figures: dict = figures
                ) -> None:
                    begin = 0
                    for n, start, end in pieces:
                        tokens, n_prompt, _ = sequences[jobs[n]]
                        first = max(start, n_prompt - 1)
                        if first < end:
                            states = h[begin + first - start : begin + end - start]
                            logprobs, entropies = self._figures(states, tokens[first + 1 : end + 1])
                            figures[jobs[n]][0].extend(logprobs)
                            figures[jobs[n]][1].extend(entropies)
                        begin += end - start

                self._prefill(work, record, outputs=collect)
                for n, job in zip(jobs, work, strict=True):
                    [copy] = job.copies
                    if any(map(math.isnan, figures[n][0])):
                        self.kv.spoil(copy.pages)
                    record.scored(copy.steering, max(0, job.end - copy.steer_from), len(figures[n][0]))
                    yield n, *figures[n]
        finally:
            self.bank.unpin(pinned)

    def _figures(self, h: Tensor, targets: Sequence[int]) -> tuple[list[float], list[float]]:
        """Log-probabilities of ``targets`` and entropies, from final states ``[n, hidden]``, a few rows at a time:
        the logits of a long completion would be larger than the model."""
        logprobs: list[float] = []
        entropies: list[float] = []
        for begin in range(0, len(targets), SCORED_ROWS):
            scores = logits(self.model, h[begin : begin + SCORED_ROWS]).float().log_softmax(dim=-1)
            wanted = self.staging.upload({"ids": np.array(targets[begin : begin + SCORED_ROWS])})["ids"]
            logprobs += scores.gather(1, wanted[:, None])[:, 0].tolist()
            entropies += torch.special.entr(scores.exp()).sum(dim=-1).tolist()
        return logprobs, entropies

    def _borrow(self, lengths: Sequence[int]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Batches of sequences (about a chunk of tokens each) with pages for the time of one loop body."""
        for n, length in enumerate(lengths):
            need = self.kv.pages_for(length)
            self._check_fits(need, f"prompt {n} of {length} tokens", f"{length} / {self.kv.page_size}, rounded up")
        n = 0
        while n < len(lengths):
            jobs: list[int] = []
            tables: list[list[int]] = []
            tokens = 0
            while n < len(lengths) and (not jobs or tokens + lengths[n] <= self.options.prefill_chunk):
                need = self.kv.pages_for(lengths[n])
                if need > self.kv.free_pages:
                    if not jobs:
                        self._check_free(need)
                    break
                tables.append(self.kv.allocate(need))
                jobs.append(n)
                tokens += lengths[n]
                n += 1
            try:
                yield jobs, tables
            finally:
                for pages in tables:
                    self.kv.release(pages)

    # ---------------------------------------------------------------- memory

    def _reserve(self, fixed: bool) -> Reserve:
        options = self.options
        return Reserve.of(
            self.model.spec,
            self.model.dtype,
            seats=options.max_rows,
            prefill_chunk=options.prefill_chunk,
            max_directions=options.max_directions,
            max_terms=options.max_terms,
            page_size=options.page_size,
            graphs=fixed and options.cuda_graphs,
        )

    def _check_fits(self, pages: int, what: str, arithmetic: str) -> None:
        if pages > self.kv.n_pages:
            each = page_bytes(self.model.spec, self.kv.page_size, self.model.dtype)
            raise ValueError(
                f"{what} need(s) {pages} KV pages ({arithmetic}) of {self.kv.page_size} tokens, and there are "
                f"{self.kv.n_pages} in all ({self.kv.n_pages * each / 2**20:.1f} MiB of KV memory; this needs "
                f"{pages * each / 2**20:.1f} MiB). Ask for fewer tokens or branches, or a larger kv_memory."
            )

    def _check_free(self, pages: int) -> None:
        if pages > self.kv.free_pages:
            raise RuntimeError(
                f"{pages} KV pages are needed and {self.kv.free_pages} of {self.kv.n_pages} are free: the others are "
                f"held by an open stream or by rt.prefix(...). Finish or close it first, or use a larger kv_memory."
            )


def first_steered(steering: CompiledSteering, n_prompt: int) -> int:
    """The first position of a sequence that a steering's scope holds, behind a prompt of ``n_prompt`` tokens."""
    return {"all": 0, "response": n_prompt - 1, "generated": n_prompt}[steering.scope]


def _finish_reason(row: Row) -> FinishReason | None:
    """Why a row ends with the token it just got, if it does: eos first, then a stop string, then the budget."""
    request = row.request
    if row.token in request.sampling.eos_token_ids:
        return "eos"
    if row.stops is not None and row.stops.reached(row.tokens):
        return "stop_string"
    return "length" if len(row.tokens) >= request.budget else None
