"""What a steering does inside the engine: identity at zero, scopes, linearity, ablations that leave nothing.

The residual stream after the last block is read through a doctored head: the final norm's weight is one and some
rows of the head are known vectors, so that (log p[a] - log p[zero row]) is ⟨h, row a⟩ up to the norm of h.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from icon2_rt import Direction, Runtime, Steering
from icon2_rt.ops.add_steer_rmsnorm import RowSteering, add_steer_rmsnorm
from icon2_rt.steering import compile_steering
from tests import hooks
from tests.models import random_prompts, random_vectors, tiny_llama

N_LAYERS, HIDDEN = 4, 48
SCOPES = ["response", "generated", "all"]
GREEDY = {"do_sample": False, "max_new_tokens": 12}
SAMPLED = {"temperature": 1.0, "top_k": 0, "max_new_tokens": 12, "seed": 5}


def direction(seed: int) -> Direction:
    return Direction(f"d{seed}", random_vectors(N_LAYERS, HIDDEN, seed=seed), torch.ones(N_LAYERS))


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return Runtime(tiny_llama(), page_size=8, prefill_chunk=16, device="cpu")


@pytest.fixture(scope="module")
def a() -> Direction:
    return direction(0)


@pytest.fixture(scope="module")
def b() -> Direction:
    return direction(1)


PROMPTS = random_prompts([5, 1, 17, 8])


# --- zero and absence ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_zero_strength_is_bitwise_the_unsteered_engine(rt, a, b, scope, options):
    plain = rt.generate(PROMPTS, **options)
    for nothing in (0.0 * a, Steering(), 0.0 * a[1:3] + 0.0 * b, 0.3 * a - 0.3 * a, a.amplified(0.0)):
        assert rt.generate(PROMPTS, nothing.with_scope(scope), **options) == plain
        assert rt.generate(PROMPTS, nothing.with_scope(scope).with_keep_norm(), **options) == plain


@pytest.mark.parametrize("scope", SCOPES)
def test_unsteered_rows_beside_steered_ones_are_bitwise_the_unsteered_engine(rt, a, b, scope):
    plain = rt.generate(PROMPTS, **SAMPLED)
    steered = [(5.0 * a).with_scope(scope), None, b.ablated().with_scope(scope), None]
    mixed = rt.generate(PROMPTS, steered, **SAMPLED)
    for i in (1, 3):
        assert mixed[i] == plain[i]  # tokens, log-probabilities to the last bit, seed
    for i in (0, 2):
        assert mixed[i].logprobs != plain[i].logprobs


def test_a_term_is_skipped_at_blocks_where_it_is_zero(rt, a):
    """A steering of block 2 alone, written as a ladder with zeros, is bitwise the sliced one."""
    ladder = a * [0.0, 0.0, 4.0, 0.0]
    assert rt.generate(PROMPTS, ladder, **GREEDY) == rt.generate(PROMPTS, 4.0 * a[2], **GREEDY)


# --- scopes ----------------------------------------------------------------------------------------------------------


def first_token_logprobs(rt: Runtime, prompt: list[int], steering: Steering | None) -> torch.Tensor:
    n = rt.spec.vocab_size
    # A second token, since a scope of generated tokens holds nothing of a completion of one.
    return torch.tensor([s.logprobs[0] for s in rt.score([prompt] * n, [[t, 0] for t in range(n)], steering)])


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: f"{len(p)}-tokens")
def test_the_first_token_feels_response_and_all_but_not_generated(rt, a, prompt):
    plain = first_token_logprobs(rt, prompt, None)
    shift = {s: (first_token_logprobs(rt, prompt, (5.0 * a).with_scope(s)) - plain).abs().max() for s in SCOPES}
    assert float(shift["generated"]) < 1e-5
    assert float(shift["response"]) > 0.05
    assert float(shift["all"]) > 0.05


def test_generated_steers_from_the_second_token_on(rt, a):
    plain = rt.generate(PROMPTS, **GREEDY)
    steered = rt.generate(PROMPTS, (8.0 * a).with_scope("generated"), **GREEDY)
    for one, two in zip(plain, steered, strict=True):
        assert one.token_ids[0] == two.token_ids[0]
        assert abs(one.logprobs[0] - two.logprobs[0]) < 1e-5
        assert one.logprobs[1] != two.logprobs[1]


def test_all_and_response_are_the_same_for_a_one_token_prompt(rt, a):
    """Its only token is the last one; the two differ as soon as there is an earlier one."""
    for prompt, same in [([7], True), ([3, 7], False)]:
        response, whole = (rt.generate([prompt], (5.0 * a).with_scope(s), **GREEDY)[0] for s in ("response", "all"))
        gap = abs(response.logprobs[0] - whole.logprobs[0])
        assert (gap < 1e-5) == same


def test_all_at_the_last_block_only_is_response(rt, a):
    """What is added after the last block reaches no K or V."""
    steering = 6.0 * a[-1]
    for one, two in zip(
        rt.generate(PROMPTS, steering.with_scope("all"), **GREEDY),
        rt.generate(PROMPTS, steering, **GREEDY),
        strict=True,
    ):
        assert one.token_ids == two.token_ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(two.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_several_scopes_strengths_and_lengths_in_one_batch(rt, a, b, scope):
    oracle = tiny_llama()
    steerings = [
        (5.0 * a).with_scope(scope),
        None,
        (a.ablated() + 3.0 * b[2:]).with_scope("all").with_keep_norm(),
        (-5.0 * b).with_scope("generated"),
    ]
    for prompt, steering, completion in zip(PROMPTS, steerings, rt.generate(PROMPTS, steerings, **GREEDY), strict=True):
        expected = hooks.greedy(oracle, prompt, 12, steering, completion.token_ids)
        assert completion.token_ids == expected.token_ids
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0
        )


# --- the law, read through the head ----------------------------------------------------------------------------------

U, V, W, ZERO = 5, 6, 7, 8  # rows of the head


class Probe:
    """A runtime whose head shows ⟨h, u⟩, ⟨h, v⟩ (cosine 0.9 with u) and ⟨h, w⟩ (w orthogonal to both)."""

    def __init__(self) -> None:
        u, v, w = torch.linalg.qr(random_vectors(3, HIDDEN, seed=4).T).Q.T
        v = 0.9 * u + math.sqrt(1 - 0.9**2) * v
        model = tiny_llama()
        with torch.no_grad():
            model.model.norm.weight.fill_(1)
            for row, vector in ((U, u), (V, v), (W, w), (ZERO, torch.zeros(HIDDEN))):
                model.lm_head.weight[row] = vector
        self.rt = Runtime(model, page_size=8, device="cpu")
        self.u, self.v = (Direction(n, x.expand(N_LAYERS, -1), torch.ones(N_LAYERS)) for n, x in (("u", u), ("v", v)))
        self.prompts, self.written = random_prompts([3, 20, 1]), random_prompts([4, 4, 4], seed=2)

    def read(self, steering: Steering | None) -> torch.Tensor:
        """``[prompts, positions, 3]``: ⟨h, u⟩, ⟨h, v⟩ and ⟨h, w⟩ over rms(h), for 5 positions of the response."""
        rows = []
        for prompt, written in zip(self.prompts, self.written, strict=True):
            for n in range(len(written) + 1):
                completions = [[*written[:n], token] for token in (U, V, W, ZERO)]
                scored = self.rt.score([prompt] * 4, completions, steering)
                logprobs = torch.tensor([s.logprobs[n] for s in scored], dtype=torch.float64)
                rows.append(logprobs[:3] - logprobs[3])
        return torch.stack(rows).view(len(self.prompts), -1, 3)


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe()


def test_one_ablation_leaves_no_projection(probe):
    assert float(probe.read(None)[..., 0].abs().max()) > 0.05
    assert float(probe.read(probe.u[-1].ablated())[..., 0].abs().max()) < 1e-5
    assert float(probe.read(probe.u.ablated())[..., 0].abs().max()) < 1e-5


@pytest.mark.parametrize("scope", ["response", "all"])
def test_two_overlapping_ablations_leave_no_projection(probe, scope):
    both = (probe.u.ablated() + probe.v.ablated()).with_scope(scope)
    assert float(probe.read(None)[..., :2].abs().max()) > 0.05
    assert float(probe.read(both)[..., :2].abs().max()) < 1e-5


def test_addition_at_the_last_block_is_linear(probe):
    """⟨h + αu, u⟩ / ⟨h, w⟩ is a straight line in α (the norm of h cancels, w is orthogonal to u)."""
    strengths = [-6.0, -1.0, 0.0, 2.0, 8.0]
    line = torch.stack([(r := probe.read(s * probe.u[-1]))[..., 0] / r[..., 2] for s in strengths])
    slope = (line[-1] - line[0]) / (strengths[-1] - strengths[0])
    scale = slope.abs()
    for strength, measured in zip(strengths, line, strict=True):
        expected = line[0] + (strength - strengths[0]) * slope
        assert float(((measured - expected) / scale).abs().max()) < 1e-2
    doubled = probe.read(2 * (3.0 * probe.u[-1]))
    assert torch.equal(doubled, probe.read(6.0 * probe.u[-1]))


def test_a_clamp_reaches_its_target(probe):
    """⟨h, u⟩ = t whatever h was: ⟨h, u⟩ / ⟨h, w⟩ doubles with t, exactly."""
    one, two = probe.read(probe.u[-1].clamped(2.0)), probe.read(probe.u[-1].clamped(4.0))
    ratio = (two[..., 0] / two[..., 2]) / (one[..., 0] / one[..., 2])
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0), atol=1e-3, rtol=0)


def test_overlapping_clamps_reach_both_targets(probe):
    read = probe.read(probe.u[-1].clamped(2.0) + probe.v[-1].clamped(-1.0))
    ratio = read[..., 0] / read[..., 1]
    torch.testing.assert_close(ratio, torch.full_like(ratio, -2.0), atol=1e-3, rtol=0)


def test_amplifying_multiplies_the_projection(probe):
    plain, more = probe.read(None), probe.read(probe.u[-1].amplified(0.5))
    ratio = (more[..., 0] / more[..., 2]) / (plain[..., 0] / plain[..., 2])
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.5), atol=2e-3, rtol=0)


# --- the op ----------------------------------------------------------------------------------------------------------


def rows_of(steerings: list[Steering | None], n_layers: int, hidden: int) -> RowSteering:
    """A batch's steering buffers, one row each, made by hand: the terms of every block in the order they were given."""
    compiled = [compile_steering(s, n_layers, hidden) for s in steerings]
    vectors = [v for c in compiled if c for v in c.vectors]
    k = max(c.n_terms for c in compiled if c)
    shape = (len(steerings), n_layers, k)
    count, index = torch.zeros(shape[:2], dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    alpha, beta = torch.zeros(shape), torch.zeros(shape)
    first = 0
    for i, c in enumerate(compiled):
        if c is None:
            continue
        for layer in range(n_layers):
            acting = [j for j in range(c.n_terms) if c.alpha[j, layer] or c.beta[j, layer]]
            count[i, layer] = len(acting)
            for place, j in enumerate(acting):
                index[i, layer, place] = first + j
                alpha[i, layer, place], beta[i, layer, place] = c.alpha[j, layer], c.beta[j, layer]
        first += c.n_terms
    active = [count[:, layer].nonzero()[:, 0] for layer in range(n_layers)]
    return RowSteering(
        bank=torch.stack(vectors),
        count=count,
        index=index,
        alpha=alpha,
        beta=beta,
        keep_norm=torch.tensor([bool(c and c.keep_norm) for c in compiled]),
        which=torch.tensor([i if c else -1 for i, c in enumerate(compiled)]),
        rows=tuple(None if not len(a) else slice(None) if len(a) == len(steerings) else a for a in active),
        rescale=any(c is not None and c.keep_norm for c in compiled),
        additive=not bool(beta.any()),
    )


@pytest.mark.parametrize("knowing", [True, False], ids=["hints", "no-hints"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_steer_rmsnorm_is_the_law_and_transformers_norm(dtype, knowing):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    a, b, c = (direction(i) for i in range(3))
    steerings = [
        None,
        4.0 * a[1:3],
        a.ablated() + b.ablated(),
        (3.0 * a - 5.0 * b[2:]).with_keep_norm(),
        c.clamped([1.0, 2.0, 3.0, 4.0]) + a[0].amplified(0.5),
        c[2].ablated().with_keep_norm(),
    ]
    buffers = rows_of(steerings, N_LAYERS, HIDDEN)
    if not knowing:
        buffers = replace(buffers, rows=None, rescale=True, additive=False)
    norm = LlamaRMSNorm(HIDDEN, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    x, residual = (5 * torch.randn(len(steerings), HIDDEN, generator=generator).to(dtype) for _ in range(2))
    plain = add_steer_rmsnorm(x, residual, norm.weight.detach(), 1e-5)
    for layer in range(N_LAYERS):
        measured = torch.full((len(steerings), 1 + buffers.alpha.shape[-1]), torch.nan)
        got, normed = add_steer_rmsnorm(x, residual, norm.weight.detach(), 1e-5, buffers, layer, measured)
        summed = x.float() + residual.float()
        for row, steering in enumerate(steerings):
            terms = [] if steering is None else [t for t in steering.terms if t.alpha[layer] or t.beta[layer]]
            dots = [float(summed[row] @ t.direction.vectors[layer]) for t in terms]
            expected = [float(summed[row].norm()), *dots, *[0.0] * (measured.shape[1] - 1 - len(dots))]
            if row != 2:  # there two overlapping ablations were made orthonormal
                torch.testing.assert_close(measured[row], torch.tensor(expected), atol=1e-3, rtol=1e-4)
        for row, steering in enumerate(steerings):
            if steering is None or layer not in steering.layers:
                assert torch.equal(got[row], plain[0][row])
                assert torch.equal(normed[row], plain[1][row])
                continue
            # One rounding: the law in high precision, then to the residual's dtype.
            expected = hooks.law(summed[row].double(), steering, layer)
            torch.testing.assert_close(
                got[row].double(),
                expected.to(dtype).double(),
                atol=2e-5,
                rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
            )
            if dtype == torch.bfloat16:
                assert float((got[row] != expected.to(dtype)).float().mean()) < 0.05  # halfway cases only
        with torch.no_grad():
            assert torch.equal(normed, norm(got))


def test_keep_norm_of_a_state_that_becomes_zero_is_left_alone():
    d = direction(0)
    steering = rows_of([d.ablated().with_keep_norm()] * 2, N_LAYERS, HIDDEN)
    h = torch.stack([torch.zeros(HIDDEN), 3 * d.vectors[0]])
    got, normed = add_steer_rmsnorm(None, h, torch.ones(HIDDEN), 1e-6, steering, 0)
    assert bool(torch.isfinite(got).all())
    assert bool(torch.isfinite(normed).all())
    assert float(got[0].abs().max()) == 0


# --- one vector at every block ---------------------------------------------------------------------------------------


def test_one_blocks_vector_ablated_everywhere_is_refusal_ablation(a):
    """transformers with hooks that take one vector out of what leaves every block, at every position."""
    model, r = tiny_llama(), a.vectors[2]

    def ablate(module: torch.nn.Module, args: object, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        states = output[0] if isinstance(output, tuple) else output
        states = states - (states @ r)[..., None] * r
        return (states, *output[1:]) if isinstance(output, tuple) else states

    plain = [hooks.greedy(model, prompt, 12).token_ids for prompt in PROMPTS]
    for block in model.model.layers:
        block.register_forward_hook(ablate)
    expected = [hooks.greedy(model, prompt, 12).token_ids for prompt in PROMPTS]
    assert expected != plain
    rt = Runtime(tiny_llama(), page_size=8, device="cpu")
    steering = a.at(2).everywhere().ablated().with_scope("all")
    got = rt.generate(PROMPTS, steering, do_sample=False, max_new_tokens=12)
    assert [c.token_ids for c in got] == expected
