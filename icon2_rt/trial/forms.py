"""Every form of every op on the arguments that a decode step of the model passes, recorded from an engine.

The arguments are those of a graph: fixed buffers, seats that nobody has, every sampling option. Each form runs on
copies of them in fenced memory (:mod:`icon2_rt.trial.check`), twice and in replays of a captured call, and is then
timed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from icon2_rt.engine import Branch, Engine, EngineOptions, Model, Request, Sampling
from icon2_rt.engine.kv import page_bytes
from icon2_rt.models import DecoderSpec
from icon2_rt.ops import Ops, RowSampling, RowState, Segments, forms, native, native_cuda_ops, prefill, triton_ops
from icon2_rt.ops.philox import exponential_noise
from icon2_rt.ops.sample import process, warp
from icon2_rt.qualify.cache import Subject
from icon2_rt.qualify.verdict import ESSENTIAL, PREFILL, REPLACEABLE, FormResult
from icon2_rt.steering import CompiledSteering, Direction, compile_steering
from icon2_rt.trial.check import SCRATCH, TIE, Fenced, Fences, compare, copy_of, rebuild, same_bytes, tensors, upcast
from icon2_rt.trial.decoder import random_weights
from icon2_rt.trial.tell import Teller
from icon2_rt.trial.timing import captured, microseconds

OPS = (*ESSENTIAL, *REPLACEABLE)
# Bytes of arguments that are gone through in turn while a form is timed: more than a cache holds.
ROTATE_BYTES, MOST_SETS = 256 << 20, 8
# Elements of a weight above which its product in fp32 is worked out in pieces.
LARGE = 1 << 26


@dataclass(frozen=True)
class Effort:
    """How much a trial does: the numbers of rows, replays of each case, and how often a time is taken (0: not)."""

    rows: tuple[int, ...]
    replays: int
    times: int


@dataclass(frozen=True)
class Case:
    """Recorded arguments of one call. ``rows``: of the decode step that it is from, None for one of a prefill."""

    op: str
    rows: int | None
    arguments: tuple[Any, ...]


class Recorder:
    """The reference ops, which keep a copy of the arguments of every kind of call of a decode step, and of the first of
    every kind in a prefill. ``kept``: addresses of tensors that are not copied (weights)."""

    def __init__(self, kept: frozenset[int]):
        self.cases: dict[tuple[Any, ...], Case] = {}
        self._kept = kept
        self._rows: int | None = None

    def ops(self) -> Ops:
        """To be run in the buffers of the kernels, their scratch included."""
        wrapped: dict[str, Any] = {op: self._wrap(op, reference_of(op)) for op in (*OPS, PREFILL)}
        return replace(Ops(), fixed=True, attention_partials=True, sample_scratch=_most_scratch, **wrapped)

    def _wrap(self, op: str, function: Callable) -> Callable:
        signature = inspect.signature(function)

        def record(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).args
            if op == "begin_step":
                self._rows = len(given[0].positions)
            kinds = _continued if self._rows is None else _kind
            key = (op, self._rows, tuple(map(kinds, given)))
            if key not in self.cases:
                self.cases[key] = Case(op, self._rows, self._copy(given))
            result = function(*given)
            if op == "sample":
                self._rows = None
            return result

        return record

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.data_ptr() in self._kept else copy_of(value)
        return rebuild(value, lambda v, part: v if part in SCRATCH else self._copy(v))


def _most_scratch(rows: int, vocab: int) -> int:
    """Bytes that are enough for ``sample`` in every form."""
    there = [triton_ops(), *([native_cuda_ops()] if hasattr(native.extension, "cuda_sample_scratch") else [])]
    return max(ops.sample_scratch(rows, vocab) for ops in there)


def reference_of(op: str) -> Callable:
    """The definition of an op."""
    return prefill.prefill_attention if op == PREFILL else getattr(Ops(), op)


def _continued(argument: Any) -> bool:
    """Calls of a prefill are of two kinds: prompts attend from their beginning, or some go on behind what is there."""
    return isinstance(argument, Segments) and any(run.start > 0 for run in argument.runs)


def _kind(argument: Any) -> Any:
    """Calls of one kind compile to the same kernel and read the same tensors."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape)
    return argument if argument is None or isinstance(argument, int) else type(argument).__name__


def record(
    subject: Subject, device: torch.device, dtype: torch.dtype, effort: Effort
) -> tuple[list[Case], frozenset[int]]:
    """The calls of decode steps of a random decoder of two blocks with the model's own sizes, and the addresses of its
    weights."""
    spec = decoder_spec(subject.spec)
    weights = random_weights(spec, device, dtype)
    named = [weights.embedding, weights.final_norm, weights.lm_head, weights.inv_freq]
    named += [w for layer in weights.layers for w in vars(layer).values() if w is not None]
    recorder = Recorder(frozenset(w.data_ptr() for w in named))
    split = subject.page_size * subject.split_pages
    prompt, budget, most = min(2 * split + split // 3 + 2, spec.max_length - 4), 3, max(effort.rows)
    pages = most * -(-(prompt + budget) // subject.page_size) + 4
    options = EngineOptions(
        kv_memory=pages * page_bytes(spec, subject.page_size, dtype), page_size=subject.page_size,
        split_pages=subject.split_pages, max_rows=most, max_directions=8, max_terms=subject.max_terms,
        prefill_chunk=2 * split, cuda_graphs=False,  # shorter than a prompt, so that passes go on behind others
    )  # fmt: skip
    engine = Engine(Model(spec, weights, recorder.ops()), options)
    for pages_ in (engine.kv.k, engine.kv.v):  # what nobody may read is far off
        pages_.fill_(100.0)
    for rows in effort.rows:
        groups = max(1, rows // 2 - (rows > 2))  # a bucket that is not full: seats that do not run
        for _ in engine.decode(list(requests(spec, groups, prompt, budget))):
            pass
    return list(recorder.cases.values()), recorder._kept


def decoder_spec(spec: DecoderSpec) -> DecoderSpec:
    """The model's sizes in two blocks; one embedding for both ends spares a gigabyte."""
    return replace(spec, n_layers=2, tied_embeddings=True)


def requests(spec: DecoderSpec, groups: int, prompt: int, budget: int) -> Iterator[Request]:
    """Pairs with every kind of steering and of sampling."""
    a, b = (direction(spec, seed) for seed in range(2))
    kinds = [1.0 * a, -1.0 * a, None, a.ablated(), (2.0 * a - 1.0 * b).with_keep_norm(), (0.5 * b).with_scope("all")]
    steerings = [compiled(kind, spec) for kind in kinds]
    warm = {"do_sample": True, "eos_token_ids": (1, 3), "min_new_tokens": 2}
    samplings = [
        Sampling(repetition_penalty=1.3, eos_token_ids=(2,)),
        Sampling(temperature=0.7, top_k=50, **warm),  # type: ignore[arg-type]
        Sampling(temperature=1.1, top_p=0.9, min_p=0.02, **warm),  # type: ignore[arg-type]
        Sampling(**warm),  # type: ignore[arg-type]
    ]
    for n in range(groups):
        how = samplings[n % len(samplings)]
        length = max(1, prompt - 7 * (n % 5))
        tokens = tuple((31 * n + 7 * k + k * k) % spec.vocab_size for k in range(length))
        pair = (steerings[n % len(kinds)], steerings[(n + 1) % len(kinds)])
        seeds = (1000 + 2 * n, 1001 + 2 * n) if how.do_sample else (None, None)
        branches = tuple(Branch(s, seed) for s, seed in zip(pair, seeds, strict=True))
        yield Request(n, tokens, branches, how, budget)


def direction(spec: DecoderSpec, seed: int) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    return Direction(f"random-{seed}", torch.randn(spec.n_layers, spec.hidden_size, generator=generator))


def compiled(steering: Any, spec: DecoderSpec) -> CompiledSteering | None:
    return None if steering is None else compile_steering(1.0 * steering, spec.n_layers, spec.hidden_size)


# --- trying ----------------------------------------------------------------------------------------------------------


# Tensors that a call returned or could have written, by what they are.
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Truth:
    """What a case must give: the reference's results in fp32, and those in the model's own dtype."""

    expected: Results
    reference: Results


def try_forms(
    cases: Sequence[Case], kept: frozenset[int], device: torch.device, effort: Effort, known: set[tuple[str, str]],
    tell: Teller,
) -> Iterator[FormResult]:  # fmt: skip
    """Try every form of every op but those that are ``known``, and say what was found."""
    there = forms(device)
    for op in OPS:
        mine = [case for case in cases if case.op == op]
        tried = {form: f for form, f in there[op].items() if op in REPLACEABLE or form != "reference"}
        missing = {form: f for form, f in tried.items() if (op, form) not in known}
        if not missing:
            continue
        tell.begin(op, "reference" if "reference" in missing else next(iter(missing)))
        truths = [truth(case, kept) for case in mine]
        for form, function in missing.items():
            result = try_form(form, function, mine, truths, kept, device, effort, tell)
            tell.result(result)
            yield result


def truth(case: Case, kept: frozenset[int]) -> Truth:
    plain = reference_of(case.op)
    ours = Fences().copy(case.arguments, kept)
    reference = _outputs(plain(*ours), ours, case, kept)
    if case.op == "linear" and case.arguments[1].numel() > LARGE:
        exact = [_linear_in_pieces(*case.arguments), *(upcast(t) for t in list(reference.values())[1:])]
        return Truth(dict(zip(reference, exact, strict=True)), reference)
    wide = upcast(case.arguments)
    expected = _outputs(plain(*wide), wide, case, kept)
    del wide
    # What the reference leaves as it is need not be kept a second and a third time: KV pages are large.
    for name, original in _outputs(None, case.arguments, case, kept).items():
        if same_bytes(reference[name], original) is None:
            expected[name] = reference[name] = original
    return Truth(expected, reference)


def _linear_in_pieces(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    pieces = [F.linear(x.float(), piece.float()) for piece in weight.split(max(1, LARGE // weight.shape[1]))]
    product = torch.cat(pieces, dim=1)
    return product if bias is None else product + bias.float()


def _outputs(returned: Any, arguments: tuple[Any, ...], case: Case, kept: frozenset[int]) -> Results:
    """Everything that a call returned or could have written: its arguments, but for the weights."""
    found = {f"result {n}": t for n, (_, t) in enumerate(tensors(returned))}
    copied = [t.data_ptr() not in kept for t in _all(case.arguments)]
    parameters = dict(zip(inspect.signature(reference_of(case.op)).parameters, arguments, strict=False))
    return found | {name: t for (name, t), mine in zip(tensors(parameters), copied, strict=True) if mine}


def _all(value: Any) -> list[Tensor]:
    return [t for _, t in tensors(value)]


def try_form(
    form: str, function: Callable, cases: Sequence[Case], truths: Sequence[Truth], kept: frozenset[int],
    device: torch.device, effort: Effort, tell: Teller,
) -> FormResult:  # fmt: skip
    """One form on all cases of its op."""
    op = cases[0].op
    tell.begin(op, form)
    worst, wrong = 0.0, None
    first: list[Results] = []
    try:
        for case, right in zip(cases, truths, strict=True):
            found = _once(function, case, kept)
            error, said = _judge(case, found, right)
            worst, wrong = max(worst, error), wrong or said
            first.append(found)
            tell.beat()
        tell.begin(op, form, running=True)
        if form != "reference":
            for case, found in zip(cases, first, strict=True):
                wrong = wrong or _again(function, case, found, kept, device, effort)
                tell.beat()
    except Exception as error:  # Triton's own errors derive from nothing narrower
        raise_if_gone(device, error)
        wrong = wrong or said_of(error)
    if form == "reference":
        wrong = None  # the definition
    times = {} if wrong is not None else _times(function, cases, kept, device, effort, tell)
    return FormResult(op, form, wrong, worst, times)


class _Wrong(AssertionError):
    """A check that failed, in words."""


def _once(function: Callable, case: Case, kept: frozenset[int]) -> Results:
    fences = Fences()
    ours = fences.copy(case.arguments, kept)
    with Fenced(fences):
        returned = function(*ours)
    if (name := fences.broken()) is not None:
        raise _Wrong(f"it wrote outside {name}")
    found = _outputs(returned, ours, case, kept)
    for name, original in _outputs(None, case.arguments, case, kept).items():
        if same_bytes(found[name], original) is None:
            found[name] = original
    return found


def _judge(case: Case, found: Results, right: Truth) -> tuple[float, str | None]:
    expected, reference = right.expected, right.reference
    if case.op == "sample":
        found, expected, reference = _sampled_alike(case, found, expected, reference)
    difference = compare(found, expected, reference)
    if difference.wrong is None:
        return difference.error, None
    rows = "a prefill" if case.rows is None else f"{case.rows} rows"
    return difference.error, f"{difference.wrong} ({rows})"


def _sampled_alike(case: Case, found: Results, expected: Results, reference: Results) -> tuple[Results, ...]:
    """Without the rows whose token is another one that was as good, since all that follows from it differs; and
    without what is noted as seen by seats that do not run, which nobody reads."""
    logits, how, state = case.arguments
    mine, theirs = found["state.tokens"], expected["state.tokens"]
    keep = torch.ones_like(state.running)
    if not torch.equal(mine, theirs):
        inside = mine.clamp(0, logits.shape[1] - 1)
        race = process(logits.float(), how, state).double()
        if how.sampled is not None and how.seeds is not None:
            noise = exponential_noise(how.seeds, state.generated.long(), logits.shape[1])
            drawn = warp(race.float(), how).double().softmax(dim=-1).log() - noise.log()
            race = torch.where(how.sampled[:, None], drawn, race)
        one, other = (race.gather(1, t[:, None])[:, 0] for t in (inside, theirs))
        keep = ~((one - other).abs() <= TIE * other.abs().clamp(min=1.0)) | (mine == theirs) | (mine != inside)
    rows = len(keep)

    def left(name: str, t: Tensor) -> Tensor:
        which = keep & state.running if name == "how.seen" else keep
        return t[which] if t.dim() and t.shape[0] == rows else t

    return tuple({name: left(name, t) for name, t in group.items()} for group in (found, expected, reference))


def _again(
    function: Callable, case: Case, first: Results, kept: frozenset[int], device: torch.device, effort: Effort
) -> str | None:
    """Once more, and in replays: the same bits."""
    if (name := same_bytes(first, _once(function, case, kept))) is not None:
        return f"a second call gives other bits in {name}"
    fences = Fences()
    ours = fences.copy(case.arguments, kept)
    before = _outputs(None, case.arguments, case, kept)
    copies = _outputs(None, ours, case, kept)
    changed = [(copies[name], t) for name, t in before.items() if not torch.equal(first[name], t)]

    def call() -> Results:
        for mine, t in changed:
            mine.copy_(t)
        with Fenced(fences):
            return _outputs(function(*ours), ours, case, kept)

    replay, results = captured(call, device)
    for n in range(effort.replays):
        replay()
        if (name := same_bytes(first, results)) is not None:
            return f"replay {n + 1} gives other bits in {name}"
    if (name := fences.broken()) is not None:
        return f"a replay wrote outside {name}"
    return None


def _times(
    function: Callable, cases: Sequence[Case], kept: frozenset[int], device: torch.device, effort: Effort, tell: Teller
) -> dict[str, float]:
    """Microseconds of one call by the number of rows: all calls of a step in turn, on several copies of what they
    read. Nothing for a form that cannot be captured."""
    found: dict[str, float] = {}
    if not effort.times:
        return found
    for rows in effort.rows:
        sets = [_for_timing(case) for case in cases if case.rows == rows]
        size = sum(t.nbytes for s in sets for t in _all(s))
        calls = [_copied(s, kept) for _ in range(max(1, min(MOST_SETS, ROTATE_BYTES // max(size, 1)))) for s in sets]
        tell.beat()

        def call(calls: list[tuple[Any, ...]] = calls) -> None:
            for arguments in calls:
                function(*arguments)

        try:
            replay, _ = captured(call, device)
            found[str(rows)] = microseconds(replay, device, effort.times) / len(calls)
        except RuntimeError as error:
            raise_if_gone(device, error)
            return {}
    return found


def _copied(value: Any, kept: frozenset[int]) -> Any:
    if isinstance(value, Tensor):
        return value if value.data_ptr() in kept else copy_of(value)
    return rebuild(value, lambda v, part: v if part in SCRATCH else _copied(v, kept))


def _for_timing(case: Case) -> tuple[Any, ...]:
    """The arguments such that any number of calls does the same work: no row ends."""

    def endless(value: Any, _: str | None = None) -> Any:
        if isinstance(value, RowSampling):
            return replace(value, eos=torch.full_like(value.eos, -1), budget=torch.full_like(value.budget, 1 << 30))
        return replace(value, running=torch.ones_like(value.running)) if isinstance(value, RowState) else value

    return rebuild(case.arguments, endless) if case.op == "sample" else case.arguments


# --- prefill ---------------------------------------------------------------------------------------------------------


def try_prefill(
    cases: Iterable[Case], kept: frozenset[int], device: torch.device, effort: Effort, known: set[tuple[str, str]],
    tell: Teller,
) -> Iterator[FormResult]:  # fmt: skip
    """Every path of prefill attention that can be had here."""
    mine = [case for case in cases if case.op == PREFILL]
    paths = [prefill.SDPA]
    q = mine[0].arguments[0]
    if device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        major, _ = torch.cuda.get_device_capability(device)
        here = [p for p in prefill.PATHS if p.takes(major, q.shape[2]) and p.why_not() is None]
        paths = [*here, prefill.SDPA]
    missing = [path for path in paths if (PREFILL, path.name) not in known]
    if not missing:
        return
    truths = [truth(case, kept) for case in mine]
    for path in missing:
        tell.begin(PREFILL, path.name)
        worst, wrong = 0.0, None
        times: dict[str, float] = {}

        def call(*arguments: Any, path: prefill.Path = path) -> Tensor:
            q, k_pages, v_pages, segments, scale = arguments
            return prefill.prefill_attention(q, k_pages, v_pages, segments, scale, path.attend)

        try:
            for case, right in zip(mine, truths, strict=True):
                found = _once(call, case, kept)
                error, said = _judge(case, found, right)
                worst, wrong = max(worst, error), wrong or said
                if (name := same_bytes(found, _once(call, case, kept))) is not None:
                    wrong = wrong or f"a second call gives other bits in {name}"
                tell.beat()
            tell.begin(PREFILL, path.name, running=True)
            if effort.times and wrong is None:
                for case in mine:
                    tokens = str(len(case.arguments[0]))
                    times[tokens] = times.get(tokens, 0.0) + microseconds(
                        partial(call, *case.arguments), device, effort.times
                    )
        except Exception as failure:  # a library of somebody else's: whatever it raises costs this path alone
            raise_if_gone(device, failure)
            wrong = said_of(failure)
        result = FormResult(PREFILL, path.name, wrong, worst, times)
        tell.result(result)
        yield result


def raise_if_gone(device: torch.device, error: BaseException) -> None:
    """Raise ``error`` where the device took it so badly that nothing more can run in this process; and memory that is
    not there, which is nothing of the op's."""
    if out_of_memory(error):
        raise error
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            raise error from None


def out_of_memory(error: BaseException) -> bool:
    """Does it say that the device has no memory left? Only torch's allocator has a class for it: the driver says so
    when it loads a kernel, cuBLAS when it makes a handle, and the engine's graphs when they do not fit."""
    said = str(error).lower()
    words = ("out of memory", "alloc_failed", "no memory is left")
    return isinstance(error, torch.OutOfMemoryError) or any(word in said for word in words)


def said_of(error: BaseException) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines()
    said = lines[0] if lines else ""
    return said if isinstance(error, _Wrong) else f"{type(error).__name__}: {said}"[:300]
