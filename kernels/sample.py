"""From logits to tokens in two launches, without sorting the vocabulary.

1. ``scan_kernel``, a program per row and chunk of the vocabulary. It reads the chunk once and keeps: maximum and sum of
   exp of the raw logits, for the log-probability; the best token of the chunk, greedy or by the race argmin(E / p),
   which is argmin(E·exp(-score)). For a row with top_k, top_p or min_p it runs no race and keeps maximum and mass of
   every block of 64 tokens instead (128 where the vocabulary has more than 131072).
2. ``choose_kernel``, a program per row. It reduces the chunks and advances the row's state. Where the row filters, it
   first finds the threshold. The blocks' maxima and masses bound it from below (k blocks whose maxima reach t hold k
   tokens that reach t; likewise for the mass), so only the blocks that reach the bound are read again: 50 of 2004 for
   top_k 50, about as many as tokens are kept for top_p where the distribution is peaked, all where it is flat. A
   bisection over them, on values, snaps both ends of its bracket to scores that exist, and so ends exactly. The race is
   run over the blocks that reach the threshold.

Bytes per row of V logits of b bytes: V·b, plus V with a repetition penalty, plus V / 8 and what is read again with a
filter; all else is some 20 bytes per chunk. A race costs arithmetic, some 75 instructions per token, 20 of them Philox.

Predicted, not measured, for 128256 tokens in bf16 on an H100 at 3.35 TB/s: 2 rows (0.5 MB, 0.15 µs of traffic) 4 µs and
3 µs, latency alone; 256 rows (66 MB, 20 µs of traffic) 25 µs greedy, 110 µs with a race, bound by its arithmetic. The
search has 6 to 11 rounds in bf16, 6 to 20 in fp32: of 1 µs where few blocks are listed, of 15 µs where a flat
distribution lists all of them, since one program reads them.

Sums are taken in an order that depends on shapes alone: the same logits give the same bytes. The reference races in
fp64; another token than its can win only where two are as close as fp32 (in 210 thousand draws: never).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from icon2_rt.kernels.budget import Budget
from icon2_rt.kernels.philox import exponential, philox

# The narrow loads are the row's settings; rows of odd length (the shipped vocabulary of 975) read their logits so too.
SCAN = Budget(registers=144, shared=8192, narrow_loads=48)
CHOOSE = Budget(registers=128, shared=16384, narrow_loads=80)

CHUNK = 2048  # tokens of one program of the scan: 126 programs for 2 rows of 128k
BLOCK = 64  # tokens whose maximum and mass are kept, and which are read again together
TILE = 64  # blocks that are read at a time
MAX_BLOCKS = 2048  # of a row, in one program's registers (4096 spill); a larger vocabulary has larger blocks

_NONE: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _finite(maximum):
    """A maximum to be subtracted: 0 where there is nothing but -inf, so that exp(-inf - maximum) is 0, not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _highest(scores, tokens):
    """The highest score and its token, the first of equal ones (``_NONE`` where every score is NaN)."""
    scores, tokens = tl.ravel(scores), tl.ravel(tokens)
    top = tl.max(scores, 0)
    return top, tl.min(tl.where(scores == top, tokens, _NONE), 0)


@triton.jit
def _lowest(keys, tokens):
    """The lowest key and its token, the first of equal ones (``_NONE`` where every key is NaN)."""
    keys, tokens = tl.ravel(keys), tl.ravel(tokens)
    key = tl.min(keys, 0)
    return key, tl.min(tl.where(keys == key, tokens, _NONE), 0)


@triton.jit
def _settings(row, vocab, sampled, temperature, top_k, top_p, min_p):
    """Does the row draw; its temperature, top_k, top_p and min_p, neutral where it does not."""
    draws = tl.load(sampled + row) != 0
    t = tl.full((), 1.0, tl.float32)
    k = tl.full((), 0, tl.int32) + vocab
    p = tl.full((), 1.0, tl.float32)
    least = tl.full((), 0.0, tl.float32)
    if temperature is not None:
        t = tl.where(draws, tl.load(temperature + row), t)
    if top_k is not None:
        k = tl.where(draws, tl.minimum(tl.load(top_k + row), k), k)
    if top_p is not None:
        p = tl.where(draws, tl.load(top_p + row), p)
    if min_p is not None:
        least = tl.where(draws, tl.load(min_p + row), least)
    return draws, t, k, p, least


@triton.jit
def _is_early(row, index, min_tokens):
    if min_tokens is not None:
        return index < tl.load(min_tokens + row)
    return index < 0


@triton.jit
def _process(raw, tokens, inside, row, penalties, seen, seen_stride, early, eos, n_eos, t):
    """Repetition penalty, no early eos, temperature. Divisions are IEEE's, as the reference's: equal stays equal."""
    scores = raw
    if seen is not None:
        penalty = tl.load(penalties + row)
        if penalty != 1.0:
            known = tl.load(seen + row * seen_stride + tokens, mask=inside, other=0) != 0
            scores = tl.where(known, tl.where(raw < 0, raw * penalty, tl.div_rn(raw, penalty)), raw)
    if early:
        for place in range(n_eos):
            scores = tl.where(tokens == tl.load(eos + row * n_eos + place), float("-inf"), scores)
    if t != 1.0:
        scores = tl.div_rn(scores, t)
    return scores


@triton.jit
def _race(scores, first, top, index, row, seeds, BLOCK: tl.constexpr):
    """E·exp(top - score), the lowest of every four in ``scores [n, BLOCK]``, and its token; rows begin at ``first``.

    Four tokens share a Philox block, so the scores are split by token & 3 instead of computing every block four times.
    """
    seed0 = tl.load(seeds + 2 * row).to(tl.uint32)
    seed1 = tl.load(seeds + 2 * row + 1).to(tl.uint32)
    zero = tl.full((), 0, tl.uint32)
    even, odd = tl.split(tl.reshape(scores, (scores.shape[0], BLOCK // 4, 2, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    token = first[:, None] + 4 * tl.arange(0, BLOCK // 4)[None, :]
    w0, w1, w2, w3 = philox((token >> 2).to(tl.uint32), index.to(tl.uint32), zero, zero, seed0, seed1)
    key0, key1 = exponential(w0) * tl.exp(top - s0), exponential(w1) * tl.exp(top - s1)
    key2, key3 = exponential(w2) * tl.exp(top - s2), exponential(w3) * tl.exp(top - s3)
    # Of equal keys the first token wins, as in argmin.
    half0, half1 = tl.minimum(key0, key1), tl.minimum(key2, key3)
    step = tl.where(half1 < half0, tl.where(key3 < key2, 3, 2), tl.where(key1 < key0, 1, 0))
    return tl.minimum(half0, half1), token + step


@triton.jit
def scan_kernel(
    logits, row_stride, vocab, running, generated, sampled, seeds, temperature, top_k, top_p, min_p,
    penalties, seen, seen_stride, eos, n_eos, min_tokens,
    raw_max, raw_sum, top, best, winner, block_top, block_mass, n_blocks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    if tl.load(running + row) == 0:
        return
    blocks = chunk * (CHUNK // BLOCK) + tl.arange(0, CHUNK // BLOCK)
    tokens = (blocks * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = tokens < vocab
    raw = tl.load(logits + row * row_stride + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    highest = tl.max(tl.ravel(raw), 0)
    total = tl.sum(tl.ravel(tl.exp(raw - _finite(highest))), 0)
    at = row * tl.num_programs(0) + chunk
    tl.store(raw_max + at, highest)
    tl.store(raw_sum + at, total)

    index = tl.load(generated + row)
    early = _is_early(row, index, min_tokens)
    key = tl.full((), 1.0, tl.float32)
    if sampled is None:
        scores = _process(raw, tokens, inside, row, penalties, seen, seen_stride, early, eos, n_eos, 1.0)
        chunk_top, token = _highest(scores, tokens)
    else:
        draws, t, k, p, least = _settings(row, vocab, sampled, temperature, top_k, top_p, min_p)
        scores = _process(raw, tokens, inside, row, penalties, seen, seen_stride, early, eos, n_eos, t)
        chunk_top, token = _highest(scores, tokens)
        races = draws
        if block_top is not None:
            filters = (k < vocab) | (p < 1.0) | (least > 0.0)
            races = draws & ~filters
            if filters:
                tops = tl.max(scores, 1)
                mass = tl.sum(tl.exp(scores - _finite(tops)[:, None]), 1)
                tl.store(block_top + row * n_blocks + blocks, tops, mask=blocks < n_blocks)
                tl.store(block_mass + row * n_blocks + blocks, mass, mask=blocks < n_blocks)
        if races:
            keys, candidates = _race(scores, blocks * BLOCK, _finite(chunk_top), index, row, seeds, BLOCK)
            key, token = _lowest(keys, candidates)
    tl.store(top + at, chunk_top)
    tl.store(best + at, key)
    tl.store(winner + at, token)


@triton.jit
def _list(chosen, blocks, listed):
    """Writes the chosen of ``blocks`` one after another; returns how many they are."""
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.debug_barrier()  # what was listed before has been read by all warps
    tl.store(listed + place, blocks, mask=chosen)
    tl.debug_barrier()
    return tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def _listed_tokens(start, n_listed, listed, vocab, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens of the listed blocks number start … start + TILE, ``[TILE, BLOCK]``, and which of them exist."""
    place = start + tl.arange(0, TILE)
    first = tl.load(listed + place, mask=place < n_listed, other=0) * BLOCK
    tokens = first[:, None] + tl.arange(0, BLOCK)[None, :]
    return first, tokens, (tokens < vocab) & (place < n_listed)[:, None]


@triton.jit
def _ordered(x):
    """The int32 that is ordered as the fp32 x; its own inverse but for the type."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def _between(low, high, rounds):
    """A value in [low, high): the mean; after 24 rounds that of the bit patterns, which is through in 32 more."""
    mean = 0.5 * low + 0.5 * high
    a, b = _ordered(low.to(tl.int32, bitcast=True)), _ordered(high.to(tl.int32, bitcast=True))
    image = _ordered((a >> 1) + (b >> 1) + (a & b & 1)).to(tl.float32, bitcast=True)
    mid = tl.where(rounds < 24, mean, image)
    return tl.where((mid >= low) & (mid < high), mid, low)


@triton.jit
def _bound(tops, mass, vocab, k, p, top, whole, BLOCK: tl.constexpr):
    """A value that the threshold is not below, from the blocks' maxima and masses (as shares of exp(top)).

    With top_k: as many blocks reach it as tokens are to be kept. With top_p alone: blocks that reach it have more than
    p of the mass even if all their other tokens lie just below it.
    """
    sure = tl.full((), float("-inf"), tl.float32)
    low, high = tl.min(tl.where(tops > float("-inf"), tops, top), 0), top
    peaks = tl.exp(tops - top)
    # The sums of the search have another order: a bound within their rounding is none.
    enough = tl.where(k < vocab, k.to(tl.float32), p * whole * 1.0001)
    for _ in range(14):
        mid = 0.5 * low + 0.5 * high
        certain = tl.maximum(peaks, mass - (BLOCK - 1) * tl.exp(mid - top))
        held = tl.sum(tl.where(tops >= mid, tl.where(k < vocab, 1.0, certain), 0.0), 0)
        sure = tl.where(held >= enough, mid, sure)
        low, high = tl.where(held >= enough, mid, low), tl.where(held >= enough, high, mid)
    return sure


@triton.jit
def _filtered(
    top, k, p, least, index, row, logits, vocab, seeds, penalties, seen, seen_stride, early, eos, n_eos, t,
    block_top, block_mass, listed, n_blocks,
    BLOCKS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The winner among the tokens that top_k, top_p and min_p leave."""
    blocks = tl.arange(0, BLOCKS)
    exists = blocks < n_blocks
    low = tl.full((), float("-inf"), tl.float32)
    if (k < vocab) | (p < 1.0):
        tops = tl.load(block_top + row * n_blocks + blocks, mask=exists, other=float("-inf"))
        mass = tl.load(block_mass + row * n_blocks + blocks, mask=exists, other=0.0) * tl.exp(tops - top)
        whole = tl.sum(mass, 0)
        low = _bound(tops, mass, vocab, k, p, top, whole, BLOCK)
        n_listed = _list(exists & (tops >= low), blocks, listed)
        # The threshold of top_k is the least score that fewer than k exceed, top_p's the least that less than p of the
        # mass exceeds; both lie in [low, high]. A round looks at what is above a value between the two, and moves one
        # of them to the next score on its side. Phase 0 is top_k, 2 is top_p, and 1 weighs what top_k has left.
        phase = tl.where(k < vocab, 0, 2)
        high, rounds = top, 0
        searching = low < high
        while searching:
            weighs = phase == 1
            mid = tl.where(weighs, low, _between(low, high, rounds))
            counts = tl.zeros((TILE, BLOCK), tl.int32)
            masses = tl.zeros((TILE, BLOCK), tl.float32)
            above = tl.full((TILE, BLOCK), float("inf"), tl.float32)
            below = tl.full((TILE, BLOCK), float("-inf"), tl.float32)
            for start in range(0, n_listed, TILE):
                _, tokens, inside = _listed_tokens(start, n_listed, listed, vocab, TILE, BLOCK)
                raw = tl.load(logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
                scores = _process(raw, tokens, inside, row, penalties, seen, seen_stride, early, eos, n_eos, t)
                higher = (scores > mid) | (weighs & (scores == mid))
                counts += higher.to(tl.int32)
                masses += tl.where(higher, tl.exp(scores - top), 0.0)
                above = tl.minimum(above, tl.where(higher, scores, float("inf")))
                below = tl.maximum(below, tl.where(higher, float("-inf"), scores))
            count, held = tl.sum(tl.ravel(counts), 0), tl.sum(tl.ravel(masses), 0)
            keeps = tl.where(phase == 0, count < k, held < p * whole)
            if weighs:
                whole, high, phase, rounds = held, top, 2, 0
            else:
                low = tl.where(keeps, low, tl.min(tl.ravel(above), 0))
                high = tl.where(keeps, tl.max(tl.ravel(below), 0), high)
                rounds += 1
                phase = tl.where((low >= high) & (phase == 0) & (p < 1.0), 1, phase)
            searching = (low < high) | (phase == 1)
    # Read again: kept through the search, they would occupy registers.
    tops = tl.load(block_top + row * n_blocks + blocks, mask=exists, other=float("-inf"))
    n_listed = _list(exists & (tops >= low) & (tl.exp(tops - top) >= least), blocks, listed)
    best = tl.full((TILE, BLOCK // 4), float("inf"), tl.float32)
    candidates = tl.full((TILE, BLOCK // 4), _NONE, tl.int32)
    for start in range(0, n_listed, TILE):
        first, tokens, inside = _listed_tokens(start, n_listed, listed, vocab, TILE, BLOCK)
        raw = tl.load(logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
        scores = _process(raw, tokens, inside, row, penalties, seen, seen_stride, early, eos, n_eos, t)
        stays = (scores >= low) & (tl.exp(scores - top) >= least)
        keys, lanes = _race(tl.where(stays, scores, float("-inf")), first, top, index, row, seeds, BLOCK)
        candidates = tl.where(keys < best, lanes, candidates)
        best = tl.minimum(keys, best)
    _, token = _lowest(best, candidates)
    return token


@triton.jit
def choose_kernel(
    logits, row_stride, vocab, fed, positions, generated, running, logprobs,
    sampled, seeds, temperature, top_k, top_p, min_p, penalties, seen, seen_stride, eos, n_eos, min_tokens, budget,
    raw_max, raw_sum, top, best, winner, n_chunks, block_top, block_mass, listed, n_blocks,
    CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, EOS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(running + row) == 0:
        return
    index = tl.load(generated + row)
    chunks = tl.arange(0, CHUNKS)
    at, exists = row * n_chunks + chunks, chunks < n_chunks
    maxima = tl.load(raw_max + at, mask=exists, other=float("-inf"))
    highest = _finite(tl.max(maxima, 0))
    sums = tl.load(raw_sum + at, mask=exists, other=0.0) * tl.exp(maxima - highest)
    log_total = highest + tl.log(tl.sum(sums, 0))
    tops = tl.load(top + at, mask=exists, other=float("-inf"))
    winners = tl.load(winner + at, mask=exists, other=_NONE)
    peak, token = _highest(tops, winners)
    if sampled is not None:
        draws, t, k, p, least = _settings(row, vocab, sampled, temperature, top_k, top_p, min_p)
        races = draws
        if listed is not None:
            filters = (k < vocab) | (p < 1.0) | (least > 0.0)
            races = draws & ~filters
            # Nothing can be weighed in a row that is not finite: it keeps its highest token, and its NaN says so.
            if filters & (tl.abs(log_total) < float("inf")) & (tl.abs(peak) < float("inf")):
                early = _is_early(row, index, min_tokens)
                token = _filtered(
                    peak, k, p, least, index, row, logits + row * row_stride, vocab, seeds, penalties, seen,
                    seen_stride, early, eos, n_eos, t, block_top, block_mass, listed + row * n_blocks, n_blocks,
                    BLOCKS, TILE, BLOCK,
                )  # fmt: skip
        if races:
            keys = tl.load(best + at, mask=exists, other=float("inf")) * tl.exp(_finite(peak) - tops)
            _, token = _lowest(keys, winners)
    token = tl.minimum(token, vocab - 1)
    logprob = tl.load(logits + row * row_stride + token).to(tl.float32) - log_total
    places = tl.arange(0, EOS)
    ends = tl.load(eos + row * n_eos + places, mask=places < n_eos, other=-1) == token
    goes_on = (tl.max(ends.to(tl.int32), 0) == 0) & (index + 1 < tl.load(budget + row))
    position = tl.load(positions + row)
    tl.debug_barrier()  # every warp has read the row's state before one of them changes it
    tl.store(fed + row, token.to(tl.int64))
    tl.store(logprobs + row, logprob)
    tl.store(positions + row, position + 1)
    tl.store(generated + row, index + 1)
    tl.store(running + row, goes_on)
    if seen is not None:
        tl.store(seen + row * seen_stride + token, True)


def _parts(vocab: int) -> tuple[int, int, int]:
    """Tokens of a block; chunks and blocks of a row."""
    block = BLOCK
    while triton.cdiv(vocab, block) > MAX_BLOCKS:
        block *= 2
    return block, triton.cdiv(vocab, max(CHUNK, block)), triton.cdiv(vocab, block)


def _aligned(n_bytes: int) -> int:
    """Every part of the scratch begins where an allocation of its own might: the kernels are compiled for that."""
    return triton.cdiv(n_bytes, 256) * 256


def scratch_bytes(rows: int, vocab: int) -> int:
    """Bytes that :func:`sample` needs beside its arguments, for ``rows`` rows or fewer."""
    _, n_chunks, n_blocks = _parts(vocab)
    return 5 * _aligned(4 * rows * n_chunks) + 3 * _aligned(4 * rows * n_blocks)


def sample(logits: Tensor, how: Any, state: Any) -> None:
    """See :func:`icon2_rt.ops.sample`. The last dimension of every tensor is contiguous, ``how`` and ``state`` all are.

    A row that does not run keeps all it has. A row whose logits are not finite gets a valid token and the
    log-probability NaN.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return
    block, n_chunks, n_blocks = _parts(vocab)
    chunk, tile = max(CHUNK, block), max(1, TILE * BLOCK // block)
    sampled = None if how.seeds is None else how.sampled
    filters = sampled is not None and any(f is not None for f in (how.top_k, how.top_p, how.min_p))
    memory = how.scratch
    if memory is None:
        memory = torch.empty(scratch_bytes(rows, vocab), dtype=torch.uint8, device=logits.device)
    used = 0

    def scratch(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        nonlocal used
        begin, used = used, used + _aligned(4 * rows * n)
        return memory[begin : begin + 4 * rows * n].view(dtype)

    raw_max, raw_sum, top, best = (scratch(n_chunks) for _ in range(4))
    winner = scratch(n_chunks, torch.int32)
    block_top = block_mass = listed = None
    if filters:
        block_top, block_mass, listed = scratch(n_blocks), scratch(n_blocks), scratch(n_blocks, torch.int32)
    penalties, seen = (None, None) if how.seen is None else (how.repetition_penalty, how.seen)
    seen_stride = 0 if seen is None else seen.stride(0)
    n_eos = how.eos.shape[1]
    settings = (sampled, how.seeds, how.temperature, how.top_k, how.top_p, how.min_p)
    scan_kernel[(n_chunks, rows)](
        logits, logits.stride(0), vocab, state.running, state.generated, *settings,
        penalties, seen, seen_stride, how.eos, n_eos, how.min_tokens,
        raw_max, raw_sum, top, best, winner, block_top, block_mass, n_blocks,
        CHUNK=chunk, BLOCK=block, num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    # enable_fp_fusion=False is needed here for more than parity. With a product fused into a butterfly sum, lanes of a
    # warp can disagree in its last bit, leave the search's loop at different turns and hang at a barrier.
    choose_kernel[(rows,)](
        logits, logits.stride(0), vocab, state.tokens, state.positions, state.generated, state.running, state.logprobs,
        *settings, penalties, seen, seen_stride, how.eos, n_eos, how.min_tokens, how.budget,
        raw_max, raw_sum, top, best, winner, n_chunks, block_top, block_mass, listed, n_blocks,
        CHUNKS=triton.next_power_of_2(n_chunks), BLOCKS=triton.next_power_of_2(n_blocks), TILE=tile, BLOCK=block,
        EOS=triton.next_power_of_2(n_eos), num_warps=16 if filters else 1, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
