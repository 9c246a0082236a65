"""A whole engine on a random decoder of two blocks: seats that fill and empty, mixed scopes, stop strings, more groups
than seats. What single ops cannot show is how they follow each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from icon2_rt.engine import Branch, Engine, EngineOptions, Model, Request, Sampling
from icon2_rt.engine.kv import page_bytes
from icon2_rt.engine.record import Record
from icon2_rt.models import DecoderSpec
from icon2_rt.ops import Ops
from icon2_rt.qualify.cache import Subject
from icon2_rt.qualify.verdict import EngineResult
from icon2_rt.trial.decoder import random_weights
from icon2_rt.trial.forms import compiled, direction, raise_if_gone, said_of
from icon2_rt.trial.tell import Teller

CANARY = 7.0
# Log-probabilities of the same tokens, kernels against reference in fp32.
LOGPROBS = 1e-3
SEATS = 4


@dataclass(frozen=True)
class Result:
    """What one row came to."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str | None


def try_engine(
    subject: Subject, ops: Ops, device: torch.device, dtype: torch.dtype, known: set[bool], timed: bool, tell: Teller
) -> Iterator[EngineResult]:
    """The engine with ``ops`` without graphs against the reference ops in fp32, then with graphs against without."""
    on_gpu = device.type == "cuda"
    for graphs in (False, True) if on_gpu else (False,):
        if graphs in known:
            continue
        tell.begin("engine", "graphs" if graphs else None, graphs=graphs)
        wrong, times = None, {}
        try:
            if graphs:
                without, replayed = (_run(subject, ops, device, dtype, g, tell) for g in (False, True))
                wrong = None if replayed == without else _first_difference(replayed, without)
            else:
                plain = _run(subject, Ops(), device, torch.float32, False, tell)
                wrong = _same_tokens(_run(subject, ops, device, torch.float32, False, tell), plain)
            if wrong is None and timed:
                times = {
                    "step": _step_time(subject, ops, device, dtype, graphs, tell),
                    "reference": _step_time(subject, Ops(), device, dtype, False, tell),
                }
        except Exception as error:
            raise_if_gone(device, error)
            wrong = said_of(error)
        result = EngineResult(graphs, wrong, times)
        tell.result(result)
        yield result


def small(spec: DecoderSpec) -> DecoderSpec:
    """Two blocks with the model's heads and hidden size, and little else."""
    return replace(
        spec, n_layers=2, intermediate_size=min(512, spec.intermediate_size), vocab_size=min(1000, spec.vocab_size),
        tied_embeddings=False,
    )  # fmt: skip


def requests(spec: DecoderSpec, page: int, split: int) -> list[Request]:
    """Groups of two and three, more than there are seats, with every scope, and ends of every kind."""
    a, b = (direction(spec, seed) for seed in range(2))
    kinds = [
        (1.0 * a).with_scope("all"), None, (-2.0 * a).with_keep_norm(), b.ablated(),
        (1.5 * b[1:]).with_scope("generated"), 1.0 * a - 1.0 * b, (-1.0 * b).with_scope("all"),
    ]  # fmt: skip
    steerings = [compiled(kind, spec) for kind in kinds]
    samplings = [
        Sampling(repetition_penalty=1.2, stop_strings=("q", "zz")),
        Sampling(do_sample=True, temperature=1.2, top_k=30, top_p=0.9, min_p=0.01, eos_token_ids=(1, 5, 9)),
        Sampling(do_sample=True, min_new_tokens=3, eos_token_ids=tuple(range(20)), stop_strings=("b",)),
    ]
    lengths = [1, page + 1, 2 * page + 5, split + 3, 2 * split + page + 1, page]
    longest = spec.max_length - 12
    found = []
    for n, length in enumerate(lengths):
        how, count = samplings[n % len(samplings)], 2 + n % 2
        tokens = tuple((17 * n + 5 * k + k * k) % spec.vocab_size for k in range(min(length, longest)))
        branches = tuple(
            Branch(steerings[(2 * n + k) % len(kinds)], 77 + 10 * n + k if how.do_sample else None)
            for k in range(count)
        )
        found.append(Request(n, tokens, branches, how, 10 if n % 2 else 7))
    return found


def text_of(before: Sequence[int], tokens: Sequence[int]) -> str:
    """A letter for every token, whatever came ``before``."""
    return "".join(chr(97 + token % 26) for token in tokens)


def _engine(
    subject: Subject, ops: Ops, device: torch.device, dtype: torch.dtype, graphs: bool, pages: int
) -> tuple[Engine, DecoderSpec]:
    spec = small(subject.spec)
    options = EngineOptions(
        kv_memory=pages * page_bytes(spec, subject.page_size, dtype), page_size=subject.page_size,
        split_pages=subject.split_pages, max_rows=SEATS, max_directions=8, max_terms=subject.max_terms,
        prefill_chunk=2 * subject.page_size, cuda_graphs=graphs,
    )  # fmt: skip
    return Engine(Model(spec, random_weights(spec, device, dtype, seed=1), ops), options), spec


def _run(
    subject: Subject, ops: Ops, device: torch.device, dtype: torch.dtype, graphs: bool, tell: Teller
) -> list[Result]:
    split = subject.page_size * subject.split_pages
    most = -(-(2 * split + subject.page_size + 12) // subject.page_size)
    engine, spec = _engine(subject, ops, device, dtype, graphs, pages=3 * SEATS * most)
    kv = engine.kv
    for pages in (kv.k, kv.v):
        pages.fill_(CANARY)
    used: set[int] = set()
    allocate = kv.allocate

    def noting(n: int) -> list[int]:
        pages = allocate(n)
        used.update(pages)
        return pages

    kv.allocate = noting  # type: ignore[method-assign]
    tell.beat()
    results: dict[int, list[Result]] = {}
    record = Record()
    for request, rows in engine.decode(requests(spec, subject.page_size, split), text_of, record):
        results[request.index] = [Result(tuple(r.tokens), tuple(r.logprobs), r.finish) for r in rows]
        tell.beat()
    if graphs and (record.fallbacks or not record.graph_steps):
        raise AssertionError(record.fallbacks[0] if record.fallbacks else "no step was replayed as a CUDA graph")
    others = torch.tensor(sorted(set(range(kv.n_pages)) - used), device=device)
    for pages in (kv.k, kv.v):
        if bool((pages.index_select(1, others) != CANARY).any()):
            raise AssertionError("a page of KV memory that no row owns was written")
    return [row for index in sorted(results) for row in results[index]]


def _same_tokens(mine: Sequence[Result], theirs: Sequence[Result]) -> str | None:
    for n, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if (a.tokens, a.finish) != (b.tokens, b.finish):
            return (
                f"in fp32 row {n} is {list(a.tokens)} ({a.finish}) and {list(b.tokens)} ({b.finish}) by the reference"
            )
        off = max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))
        if not off <= LOGPROBS:
            return f"in fp32 log-probabilities of row {n} are off by {off:.2e}"
    return None


def _first_difference(mine: Sequence[Result], theirs: Sequence[Result]) -> str:
    n = next(n for n, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
    return f"row {n} is {mine[n]} and was {theirs[n]}"


def _step_time(
    subject: Subject, ops: Ops, device: torch.device, dtype: torch.dtype, graphs: bool, tell: Teller
) -> float:
    """Microseconds of a step of all seats, by the clock: what a user would see of two blocks."""
    budget = 64
    pages = SEATS * (-(-(subject.page_size + budget) // subject.page_size) + 1)
    engine, spec = _engine(subject, ops, device, dtype, graphs, pages)
    tokens = tuple(k % spec.vocab_size for k in range(subject.page_size))
    asked = [Request(0, tokens, (Branch(None, None),) * SEATS, Sampling(), budget)]
    took = []
    for _ in range(3):  # the first compiles and captures
        begin = time.perf_counter()
        for _ in engine.decode(asked):
            pass
        took.append(time.perf_counter() - begin)
        tell.beat()
    return 1e6 * min(took[1:]) / budget
