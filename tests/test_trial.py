"""What a trial holds to be right: fenced memory, and the rule by which results are held against the reference."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

from icon2_rt import ops
from icon2_rt.engine import Branch
from icon2_rt.ops import RowSampling, RowState
from icon2_rt.trial import __main__ as trial
from icon2_rt.trial import forms, timing, whole
from icon2_rt.trial.check import Fenced, Fences, compare, same_bytes, tensors, upcast
from icon2_rt.trial.decoder import random_weights, weight_bytes
from icon2_rt.trial.forms import Case, Effort, try_form
from icon2_rt.trial.tell import Teller

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- the rule -------------------------------------------------------------------------------------------------------


def judged(change, dtype, rows=5, width=512):
    """The comparison for silu_mul's results after ``change`` has been at them."""
    gate_up = (2 * torch.randn(rows, 2 * width)).to(dtype)
    expected, reference = ops.silu_mul(gate_up.float()), ops.silu_mul(gate_up)
    out = reference.clone()
    change(out)
    return compare(out, expected, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_itself_is_right(dtype):
    found = judged(lambda out: None, dtype)
    assert found.wrong is None
    assert found.error < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_that_is_off_is_found(dtype):
    """By one tenth of what such an element usually is."""

    def change(out):
        out[3, 77] += 0.5

    found = judged(change, dtype)
    assert found.wrong is not None
    assert "1 of 2560 elements" in found.wrong and "element 77 of row 3" in found.wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_in_a_coarser_format_is_found_though_no_element_is_far_off(dtype):
    coarse = 2.0 ** {torch.float32: -13, torch.bfloat16: -6, torch.float16: -8}[dtype]  # fp32: as TF32 would be

    def change(out):
        out[2] *= 1 + coarse * torch.rand(512).mul(2).sub(1).to(dtype)

    found = judged(change, dtype)
    assert found.wrong is not None and "row 2" in found.wrong


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_wrong(value):
    def change(out):
        out[0, 0] = value

    assert judged(change, torch.bfloat16).wrong is not None


def test_a_row_of_zeros_must_be_zeros():
    zeros = torch.zeros(3, 8)
    assert compare(zeros.clone(), zeros, zeros).wrong is None
    almost = zeros.clone()
    almost[1, 1] = 1e-20
    assert compare(almost, zeros, zeros).wrong is not None


def test_integers_are_equal_and_shapes_too():
    one = torch.arange(6)
    other = one.clone()
    other[4] = 9
    assert compare(one.clone(), one, one).wrong is None
    assert compare({"slots": other}, {"slots": one}, {"slots": one}).wrong == "1 of 6 elements of slots differ"
    assert "shape" in str(compare(one[:5], one, one).wrong)


def test_scratch_is_nobodys_result():
    @dataclass
    class How:
        budget: torch.Tensor
        scratch: torch.Tensor | None = None

    one, other = (How(torch.ones(2), torch.full((2,), fill)) for fill in (1.0, 2.0))
    assert [name for name, _ in tensors({"how": one})] == ["how.budget"]
    assert compare({"how": one}, {"how": other}, {"how": other}).wrong is None


# --- fences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [-1, 24])
def test_a_write_beside_a_tensor_is_found(place):
    fences = Fences()
    copy = fences.copy(torch.zeros(4, 6))
    assert fences.broken() is None
    flat = torch.as_strided(copy, (1,), (1,), copy.storage_offset() + place)
    flat.fill_(1.0)
    assert fences.broken() == "argument"


@pytest.mark.parametrize("make", [
    lambda: torch.empty(3, 5, dtype=torch.float16),
    lambda: torch.empty((3, 5)),
    lambda: torch.empty_like(torch.ones(3, 5)),
    lambda: torch.ones(1).new_empty((3, 5)),
    lambda: torch.empty_like(torch.ones(3, 5), dtype=torch.bfloat16),
])  # fmt: skip
def test_memory_that_an_op_asks_for_is_fenced_and_nonsense(make):
    fences = Fences()
    with Fenced(fences):
        found = make()
    assert tuple(found.shape) == (3, 5) and found.dtype == make().dtype
    assert bool(found.isnan().all())
    found.fill_(0.0)
    assert fences.broken() is None
    torch.as_strided(found, (1,), (1,), found.storage_offset() + 15).fill_(0.0)
    assert fences.broken() == "a result"


def test_copies_are_everybodys_own_but_for_weights():
    state = RowState(*(torch.zeros(2) for _ in range(5)))
    weight = torch.ones(3)
    copied = Fences().copy((state, weight, None, 3), frozenset([weight.data_ptr()]))
    assert copied[1] is weight and copied[2:] == (None, 3)
    copied[0].tokens.fill_(1.0)
    assert bool((state.tokens == 0).all())
    assert upcast((torch.ones(2, dtype=torch.bfloat16), torch.bfloat16))[1] == torch.float32


def test_bits_not_numbers():
    assert same_bytes(torch.tensor([torch.nan]), torch.tensor([torch.nan])) is None
    assert same_bytes({"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])}) == "x"


# --- a form on a case -------------------------------------------------------------------------------------------------

EFFORT = Effort(rows=(5,), replays=2, times=1)


def tried(function, *, op="silu_mul", arguments=None, form="triton", told=None):
    arguments = arguments or (torch.randn(5, 64),)
    case = Case(op, 5, arguments)
    kept: frozenset[int] = frozenset()
    return try_form(form, function, [case], [forms.truth(case, kept)], kept, CPU, EFFORT, Teller())


def test_a_right_form_is_right_and_timed():
    found = tried(lambda x: ops.silu_mul(x))
    assert found.wrong is None
    assert found.microseconds["5"] > 0


def silu_into(fill):
    """silu_mul into memory of torch.empty, as a kernel does it; ``fill`` does something to it afterwards."""

    def function(x):
        out = torch.empty(5, 32)
        out.copy_(ops.silu_mul(x))
        fill(out, x)
        return out

    return function


def test_every_way_to_be_wrong_is_told():
    calls = iter(range(100))

    def off(out, x):
        out[1, 2] += 0.1

    def unwritten(out, x):
        out[4] = torch.empty(5, 32)[4]

    def outside(out, x):
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).fill_(0.0)

    def argument(out, x):
        x[0, 0] += 1.0

    def varying(out, x):
        out[0, 0] += 1e-7 * next(calls)

    for fill, said in [
        (off, "1 of 160 elements of result 0 are wrong; the first, element 2 of row 1"),
        (unwritten, "32 of 160 elements"),
        (outside, "it wrote outside a result"),
        (argument, "1 of 320 elements of gate_up are wrong"),
        (varying, "a second call gives other bits in result 0"),
    ]:
        found = tried(silu_into(fill))
        assert found.wrong is not None and said in found.wrong, (said, found.wrong)
        assert found.microseconds == {}


def test_replays_that_differ_are_told():
    calls = iter(range(100))

    def fill(out, x):
        if next(calls) >= 3:  # the two calls before, and the one that is captured
            out[0, 0] += 1e-6

    assert "replay 1 gives other bits" in str(tried(silu_into(fill)).wrong)


def test_what_raises_is_told_and_costs_the_form_alone():
    def refuse(x):
        raise ValueError("no such shape\nand more")

    assert tried(refuse).wrong == "ValueError: no such shape"


def test_the_reference_is_right_by_definition():
    assert tried(silu_into(lambda out, x: out[1].add_(0.5)), form="reference").wrong is None


def sampling(rows=5, vocab=40):
    how = RowSampling(
        sampled=torch.tensor([True, False] * rows)[:rows], seeds=torch.randint(0, 2**32, (rows, 2)),
        temperature=torch.ones(rows), top_k=torch.full((rows,), vocab, dtype=torch.int32), top_p=torch.ones(rows),
        min_p=torch.zeros(rows), repetition_penalty=torch.ones(rows), seen=torch.zeros(rows, vocab, dtype=torch.bool),
        eos=torch.full((rows, 1), -1, dtype=torch.int32), min_tokens=torch.zeros(rows, dtype=torch.int32),
        budget=torch.full((rows,), 9, dtype=torch.int32),
    )  # fmt: skip
    i32 = torch.int32
    state = RowState(
        torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=i32), torch.zeros(rows, dtype=i32),
        torch.arange(rows) != 3, torch.zeros(rows),
    )  # fmt: skip
    return torch.randn(rows, vocab), how, state


def test_a_tie_may_go_either_way_and_nothing_else():
    logits, how, state = sampling()
    logits[1] = -5.0
    logits[1, 7], logits[1, 9] = 3.0, 3.0  # row 1 is greedy: the reference takes 7

    def takes(token):
        def sample(logits, how, state):
            ops.sample(logits, how, state)
            how.seen[1, state.tokens[1]] = False
            state.tokens[1] = token
            state.logprobs[1] = logits[1].log_softmax(0)[token]
            how.seen[1, token] = True

        return sample

    for token, right in [(7, True), (9, True), (8, False)]:
        found = tried(takes(token), op="sample", arguments=(logits, how, state))
        assert (found.wrong is None) == right, (token, found.wrong)


def test_a_seat_that_does_not_run_is_left_alone():
    logits, how, state = sampling()

    def sample(logits, how, state):
        ops.sample(logits, how, state)
        state.logprobs[3] = 1.0  # it does not run

    assert "state.logprobs" in str(tried(sample, op="sample", arguments=(logits, how, state)).wrong)


# --- what is recorded -------------------------------------------------------------------------------------------------

SUBJECT = forms.Subject(trial.SMALL, "float32", page_size=16, split_pages=2)


def test_the_calls_of_a_graphs_step_are_recorded():
    with torch.inference_mode():
        cases, kept = forms.record(SUBJECT, CPU, torch.float32, Effort((2, 8), 1, 0))
    by_rows = {(c.op, c.rows) for c in cases}
    for op in forms.OPS:
        assert (op, 2) in by_rows and (op, 8) in by_rows, op
    assert any(c.op == "prefill_attention" and c.rows is None for c in cases)
    steered = [c for c in cases if c.op == "add_steer_rmsnorm" and c.rows == 2]
    assert {(c.arguments[0] is None, len(c.arguments) > 4 and c.arguments[4] is not None) for c in steered} == {
        (True, False), (False, False), (False, True),
    }  # fmt: skip
    [sample] = [c for c in cases if c.op == "sample" and c.rows == 2]
    assert all(value is not None for value in vars(sample.arguments[1]).values())
    [attention, *_] = [c for c in cases if c.op == "grouped_decode_attention" and c.rows == 2]
    assert attention.arguments[3].partials is not None
    fences = Fences()
    how = fences.copy(sample.arguments)[1]
    how.scratch.view(-1).as_strided((1,), (1,), how.scratch.storage_offset() + how.scratch.numel()).fill_(0)
    assert fences.broken() == "scratch"
    linear = [c for c in cases if c.op == "linear" and c.rows == 2]
    assert len(linear) == 5 and all(c.arguments[1].data_ptr() in kept for c in linear)


def test_reference_forms_pass_and_a_cpu_without_the_interpreter_says_so(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert trial.main(["--device", "cpu", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["status"] == "not tried" and "TRITON_INTERPRET" in verdict["reason"]


def test_large_products_are_exact_in_pieces(monkeypatch):
    monkeypatch.setattr(forms, "LARGE", 64 * 7)
    x, weight, bias = torch.randn(3, 64).bfloat16(), torch.randn(100, 64).bfloat16(), torch.randn(100).bfloat16()
    case = Case("linear", 3, (x, weight, bias))
    truth = forms.truth(case, frozenset([weight.data_ptr(), bias.data_ptr()]))
    torch.testing.assert_close(truth.expected["result 0"], x.float() @ weight.float().T + bias.float())
    assert truth.expected.keys() == truth.reference.keys() == {"result 0", "x"}


# --- the whole engine -------------------------------------------------------------------------------------------------


def test_the_whole_engine_of_the_reference_is_itself():
    with torch.inference_mode():
        [found] = whole.try_engine(SUBJECT, ops.Ops(), CPU, torch.float32, set(), True, Teller())
    assert (found.graphs, found.wrong) == (False, None)
    assert set(found.microseconds) == {"step", "reference"}


def test_its_rows_end_in_every_way():
    with torch.inference_mode():
        results = whole._run(SUBJECT, ops.Ops(), CPU, torch.float32, False, Teller())
    assert {r.finish for r in results} == {"eos", "stop_string", "length"}
    assert len(results) > whole.SEATS
    assert len({r.tokens for r in results}) > 5


@pytest.mark.parametrize(
    ("op", "change", "said"),
    [
        ("silu_mul", lambda out: out * 1.01, "in fp32 row"),
        ("rope_append", lambda out: out + 0.05, "in fp32 log-probabilities"),
    ],
)
def test_a_whole_engine_that_is_off_is_refused(op, change, said):
    right = getattr(ops.Ops(), op)
    wrong = replace(ops.Ops(), **{op: lambda *a: change(right(*a))})
    with torch.inference_mode():
        [found] = whole.try_engine(SUBJECT, wrong, CPU, torch.float32, set(), False, Teller())
    assert found.wrong is not None and said in found.wrong


def test_a_page_that_nobody_owns_is_a_canary():
    right = ops.rope_append

    def stray(qkv, cos, sin, q_norm, k_norm, eps, k_pages, v_pages, slots):
        k_pages[-1, 0] = 0.0
        return right(qkv, cos, sin, q_norm, k_norm, eps, k_pages, v_pages, slots)

    with torch.inference_mode():
        wrong = replace(ops.Ops(), rope_append=stray)
        [found] = whole.try_engine(SUBJECT, wrong, CPU, torch.float32, set(), False, Teller())
    assert found.wrong is not None and "no row owns" in found.wrong


def test_random_weights_are_of_the_family_and_as_large_as_is_said():
    for family in ("llama", "qwen2", "qwen3"):
        spec = replace(trial.SMALL, family=family)
        weights = random_weights(spec, CPU, torch.bfloat16)
        layer = weights.layers[0]
        assert (layer.qkv_bias is not None) == (family == "qwen2")
        assert (layer.q_norm is not None) == (family == "qwen3")
        matrices = [weights.embedding, weights.lm_head]
        matrices += [m for w in weights.layers for m in (w.qkv, w.o, w.gate_up, w.down)]
        assert sum(m.nbytes for m in matrices) == weight_bytes(spec, torch.bfloat16)


# --- saying so --------------------------------------------------------------------------------------------------------


def test_the_marker_is_there_before_the_attempt_and_counts(tmp_path):
    marker = tmp_path / "a" / "x.trying"
    for times in (1, 2):
        tell = Teller(None, str(marker))
        tell.begin("facts")
        assert json.loads(marker.read_text())["at"] == "facts"
        tell.begin("sample", "triton")
        found = json.loads(marker.read_text())
        assert (found["at"], found["times"]) == ("sample (triton)", times)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "ran out of memory"),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "exclusive mode"),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040)"), "driver is too old"),
        (AssertionError("Torch not compiled with CUDA enabled"), "not compiled with CUDA"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_circumstances_are_told_from_faults(error, said):
    found = trial.why_cannot(error)
    assert (found is None) == (said is None)
    assert said is None or said in str(found)


def test_one_gigabyte_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    subject = forms.Subject(trial.LLAMA_3_8B, "bfloat16")
    said = trial._short_of_memory(subject, torch.device("cuda", 0))
    assert said is not None and said.startswith("1.0 GiB of the device are free")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 80 << 30))
    assert trial._short_of_memory(subject, torch.device("cuda", 0)) is None


def test_a_repeated_call_writes_its_results_anew():
    n = iter(range(9))
    replay, result = timing.captured(lambda: torch.tensor([next(n)]), CPU)
    assert result.tolist() == [0]
    replay()
    assert result.tolist() == [1]


def test_a_call_is_captured_by_the_engines_own_graphs(monkeypatch):
    """On CUDA, where a capture that fails leaves the process able to go on: its reason is what is told."""

    class Graphs:
        largest = 1

        def __init__(self, step, sizes, device):
            step(1)  # to warm up
            step(1)  # captured
            self.largest = int(worked)
            if not worked:
                warnings.warn("a decode step could not be captured as a CUDA graph (no)", stacklevel=1)

        def run(self, rows, step):
            replayed.append(rows)

    replayed: list[int] = []
    calls = iter(range(9))
    monkeypatch.setattr(timing, "StepGraphs", Graphs)
    worked = True
    replay, result = timing.captured(lambda: next(calls), torch.device("cuda", 0))
    replay()
    assert (result, replayed) == (1, [1])
    worked = False
    with pytest.raises(RuntimeError, match=r"could not be captured as a CUDA graph \(no\)"):
        timing.captured(lambda: 0, torch.device("cuda", 0))


def test_what_nobody_changes_is_kept_once():
    case = Case("silu_mul", 5, (torch.randn(5, 64),))
    truth = forms.truth(case, frozenset())
    assert truth.expected["gate_up"] is truth.reference["gate_up"] is case.arguments[0]
    assert forms._once(ops.silu_mul, case, frozenset())["gate_up"] is case.arguments[0]


def test_branches_of_the_trial_are_of_every_kind():
    asked = list(forms.requests(trial.SMALL, 12, 20, 3))
    branches = [b for r in asked for b in r.branches]
    assert all(isinstance(b, Branch) for b in branches)
    assert {b.steering.scope if b.steering else None for b in branches} == {None, "response", "all"}
    assert {b.seed is None for b in branches} == {True, False}
