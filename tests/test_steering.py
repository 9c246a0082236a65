"""Directions and steerings as values: their arithmetic, and that a compiled steering is the law of the design."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from icon2_rt.steering import CompiledSteering, Direction, DirectionSet, Steering, compile_steering
from tests import hooks
from tests.models import random_vectors

N_LAYERS, HIDDEN = 6, 32


def direction(seed: int = 0, **kwargs) -> Direction:
    return Direction(f"d{seed}", random_vectors(N_LAYERS, HIDDEN, seed=seed), **kwargs)


@pytest.fixture
def a() -> Direction:
    return direction(0)


@pytest.fixture
def b() -> Direction:
    return direction(1)


@pytest.fixture
def h() -> torch.Tensor:
    return 5 * torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(3))


def tilted(base: Direction, cosine: float, *, name: str = "tilted", seed: int = 9) -> Direction:
    """A direction at a given cosine to another, on every block."""
    noise = random_vectors(N_LAYERS, HIDDEN, seed=seed)
    noise -= (noise * base.vectors).sum(1, keepdim=True) * base.vectors
    noise /= noise.norm(dim=1, keepdim=True)
    return Direction(name, cosine * base.vectors + math.sqrt(1 - cosine**2) * noise)


def applied(compiled: CompiledSteering, h: torch.Tensor, layer: int) -> torch.Tensor:
    """The plain law on what the compiler put out: a sum of terms, no projections, no keep_norm."""
    state, delta = h.double(), torch.zeros_like(h, dtype=torch.float64)
    for vectors, alpha, beta in zip(compiled.vectors, compiled.alpha, compiled.beta, strict=True):
        u = vectors[layer].double()
        delta += (float(alpha[layer]) + float(beta[layer]) * (state @ u))[:, None] * u
    return state + delta


# --- Direction -------------------------------------------------------------------------------------------------------


def test_rows_are_unit_and_the_scale_is_the_length_they_had():
    vectors = random_vectors(N_LAYERS, HIDDEN, seed=4)
    vectors[2] = 0
    d = Direction("x", vectors)
    lengths = vectors.norm(dim=1)
    torch.testing.assert_close(d.scale, lengths)
    torch.testing.assert_close(d.vectors * lengths[:, None], vectors)
    norms = d.vectors.double().norm(dim=1)
    assert float(norms[2]) == 0
    assert (norms[[0, 1, 3, 4, 5]] - 1).abs().max() < 1e-6
    assert d.layers == [0, 1, 3, 4, 5]
    assert (d.n_layers, d.hidden_size) == (N_LAYERS, HIDDEN)


def test_a_given_scale_replaces_the_length():
    d = Direction("x", 7 * random_vectors(N_LAYERS, HIDDEN, seed=4), scale=torch.full((N_LAYERS,), 1.0))
    assert d.scale.tolist() == [1.0] * N_LAYERS
    torch.testing.assert_close(d.vectors.norm(dim=1), torch.ones(N_LAYERS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_and_nested_lists_are_taken(dtype):
    vectors = random_vectors(2, 8, seed=1).to(dtype)
    d = Direction("x", vectors)
    assert d.vectors.dtype == d.scale.dtype == torch.float32
    torch.testing.assert_close(d.vectors * d.scale[:, None], vectors.float())
    torch.testing.assert_close(Direction("x", vectors.tolist()).vectors, d.vectors)


def test_a_direction_does_not_change_with_the_tensors_that_it_was_made_of():
    vectors, scale = random_vectors(N_LAYERS, HIDDEN, seed=4), torch.ones(N_LAYERS)
    vectors /= vectors.norm(dim=1, keepdim=True)
    d = Direction("x", vectors, scale)
    before = d.vectors.clone()
    vectors.zero_()
    scale.zero_()
    assert torch.equal(d.vectors, before)
    assert d.scale.tolist() == [1.0] * N_LAYERS
    with pytest.raises(AttributeError):
        d.name = "y"


@pytest.mark.parametrize(
    ("chosen", "layers"),
    [
        (slice(2, 5), [2, 3, 4]),
        (slice(-2, None), [4, 5]),
        (slice(None, None, 2), [0, 2, 4]),
        (-1, [5]),
        (0, [0]),
        ([3, 5], [3, 5]),
        ([-1, 0], [0, 5]),
        (np.int64(3), [3]),
    ],
)
def test_slices_keep_blocks_and_zero_the_scale_elsewhere(a, chosen, layers):
    part = a[chosen]
    assert part.layers == layers
    assert part.name == a.name
    for i in range(N_LAYERS):
        assert float(part.scale[i]) == (float(a.scale[i]) if i in layers else 0.0)
        if i in layers:
            assert torch.equal(part.vectors[i], a.vectors[i])


def test_slices_of_slices_intersect(a):
    assert a[1:4][3:6].layers == [3]


@pytest.mark.parametrize("bad", [slice(4, 4), slice(9, 12), []])
def test_a_slice_without_a_block_raises(a, bad):
    with pytest.raises(ValueError, match=r"0\.\.5"):
        a[bad]


@pytest.mark.parametrize("bad", [6, -7, [0, 6], "honesty", 1.5])
def test_a_block_that_is_not_there_raises(a, bad):
    with pytest.raises((IndexError, TypeError, ValueError)):
        a[bad]


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (torch.zeros(HIDDEN), "n_layers, hidden_size"),
        (torch.zeros(2, 3, 4), "n_layers, hidden_size"),
        (torch.zeros(0, 4), "n_layers, hidden_size"),
        (torch.full((2, 4), math.nan), "NaN"),
        (torch.tensor([[1.0, 2.0], [math.inf, 0.0]]), r"\[1\]"),
    ],
)
def test_bad_vectors_raise_and_the_message_says_what_is_right(vectors, says):
    with pytest.raises(ValueError, match=says):
        Direction("x", vectors)


@pytest.mark.parametrize("scale", [torch.ones(3), torch.ones(N_LAYERS, 1), torch.full((N_LAYERS,), math.nan)])
def test_a_bad_scale_raises(scale):
    with pytest.raises(ValueError, match="scale"):
        direction(scale=scale)


def test_a_scale_without_a_vector_raises():
    vectors = random_vectors(N_LAYERS, HIDDEN, seed=0)
    vectors[3] = 0
    with pytest.raises(ValueError, match=r"\[3\]"):
        Direction("x", vectors, scale=torch.ones(N_LAYERS))


def test_a_name_is_needed():
    with pytest.raises(ValueError, match="name"):
        Direction("", random_vectors(2, 4, seed=0))


def test_a_set_is_ordered_and_named(a, b):
    group = DirectionSet([b, a])
    assert group.names == ["d1", "d0"]
    assert list(group) == [b, a]
    assert len(group) == 2
    assert group["d0"] is a
    assert "d1" in group
    assert "x" not in group
    with pytest.raises(KeyError, match="d1"):
        group["honesty"]
    with pytest.raises(ValueError, match="d0"):
        DirectionSet([a, a])
    with pytest.raises(ValueError, match="different models"):
        DirectionSet([a, Direction("small", random_vectors(2, 4, seed=0))])
    with pytest.raises(TypeError):
        DirectionSet([a.vectors])


# --- arithmetic ------------------------------------------------------------------------------------------------------


def coefficients(steering: Steering) -> torch.Tensor:
    """``[n_layers, hidden]``: what an additive steering adds."""
    assert all(not bool(t.beta.any()) for t in steering.terms)
    return sum((t.alpha[:, None] * t.direction.vectors for t in steering.terms), torch.zeros(N_LAYERS, HIDDEN))


def test_a_strength_multiplies_the_scale(a):
    term = (0.1 * a[2:4]).terms[0]
    torch.testing.assert_close(term.alpha, 0.1 * a.scale * torch.tensor([0, 0, 1, 1, 0, 0]))
    assert not bool(term.beta.any())


@pytest.mark.parametrize("three", [3, 3.0, np.float32(3), np.float64(3), torch.tensor(3.0)])
def test_any_number_is_a_strength_from_either_side(a, three):
    expected = coefficients(3.0 * a)
    for steering in (a * three, three * a):
        assert isinstance(steering, Steering)
        torch.testing.assert_close(coefficients(steering), expected)


def test_one_strength_per_block(a):
    ladder = [0.0, 1.0, -2.0, 0.5, 0.0, 3.0]
    for form in (ladder, torch.tensor(ladder), np.array(ladder)):
        torch.testing.assert_close((a * form).terms[0].alpha, torch.tensor(ladder) * a.scale)
    assert (ladder * a).layers == [1, 2, 3, 5]


def test_sums_differences_and_multiples_are_those_of_vectors(a, b):
    va, vb = coefficients(1.0 * a), coefficients(1.0 * b)
    for steering, expected in [
        (a + b, va + vb),
        (a - b, va - vb),
        (-a, -va),
        (a / 2, va / 2),
        (0.1 * a - 0.3 * b, 0.1 * va - 0.3 * vb),
        (2 * (0.1 * a - 0.3 * b), 0.2 * va - 0.6 * vb),
        ((a + b) / 4, (va + vb) / 4),
        (-(a - b), vb - va),
        (1.0 * a + b, va + vb),
        (1.0 * a - b, va - vb),
        (a + 1.0 * b, va + vb),
        (sum([a, b, a]), 2 * va + vb),
        (sum([0.5 * a, 0.5 * b]), (va + vb) / 2),
        (Steering() + a, va),
        (0.2 * a[:3] + 0.2 * a[3:], 0.2 * va),
    ]:
        torch.testing.assert_close(coefficients(steering), expected)


def test_terms_of_one_direction_become_one_slot(a):
    assert len((0.1 * a[0] + 0.2 * a[3] - 0.05 * a[5]).terms) == 1


def test_what_cancels_is_no_steering(a):
    assert compile_steering(0.3 * a - 0.3 * a, N_LAYERS, HIDDEN) is None
    assert compile_steering(0.0 * a, N_LAYERS, HIDDEN) is None
    assert compile_steering(Steering(), N_LAYERS, HIDDEN) is None
    assert compile_steering(None, N_LAYERS, HIDDEN) is None
    assert compile_steering(a.amplified(0.0), N_LAYERS, HIDDEN) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, [1.0, 2.0], torch.ones(2, 3), "0.1", True, None])
def test_a_bad_strength_raises(a, bad):
    with pytest.raises((ValueError, TypeError)):
        a * bad
    with pytest.raises((ValueError, TypeError)):
        a.clamped(bad)


@pytest.mark.parametrize("bad", [math.nan, "2", [1.0] * N_LAYERS, None])
def test_a_steering_is_scaled_by_one_finite_number(a, bad):
    with pytest.raises((ValueError, TypeError)):
        (0.1 * a) * bad


def test_a_nonzero_steering_with_nothing_behind_it_raises(a):
    nothing = Direction("hollow", torch.zeros(N_LAYERS, HIDDEN))
    for make in (lambda: 0.1 * nothing, nothing.ablated, lambda: nothing.clamped(1.0), lambda: nothing.amplified(0.5)):
        with pytest.raises(ValueError, match="hollow"):
            make()
    vectors = random_vectors(N_LAYERS, HIDDEN, seed=0)
    vectors[:3] = 0
    with pytest.raises(ValueError, match="late"):
        0.1 * Direction("late", vectors)[:3]


def test_scope_and_keep_norm_belong_to_the_whole(a, b):
    whole = (0.1 * a).with_scope("all").with_keep_norm()
    assert (whole.scope, whole.keep_norm) == ("all", True)
    assert ((2 * whole).scope, (2 * whole).keep_norm) == ("all", True)
    assert ((whole + b).scope, (-whole).scope) == ("all", "all")
    with pytest.raises(ValueError, match="scope"):
        whole + (0.1 * b).with_keep_norm()
    with pytest.raises(ValueError, match="keep_norm"):
        whole + (0.1 * b).with_scope("all")
    with pytest.raises(ValueError, match="response"):
        whole.with_scope("prompt")
    for sum_ in (Steering() + whole, whole + Steering(), sum([whole])):  # nothing has no scope that could disagree
        assert (sum_.scope, sum_.keep_norm) == ("all", True)
        assert torch.equal(coefficients(sum_), coefficients(whole))
    assert (0.1 * a).scope == "response"
    assert not (0.1 * a).keep_norm


def test_directions_of_two_models_do_not_add(a):
    with pytest.raises(ValueError, match="different models"):
        0.1 * a + Direction("small", random_vectors(2, 4, seed=0))


def test_values_are_not_changed_by_arithmetic(a, b):
    s = 0.1 * a
    before = coefficients(s).clone()
    _ = s + b, -s, 2 * s, s.with_scope("all"), s - b
    assert torch.equal(coefficients(s), before)
    assert s.scope == "response"


# --- the law ---------------------------------------------------------------------------------------------------------


def mixtures() -> dict[str, Steering]:
    a, b, c = direction(0), direction(1), direction(2)
    near = tilted(a, 0.9)
    ladder = [0.0, 1.0, -2.0, 0.5, 0.0, 3.0]
    return {
        "add": 3.0 * a[1:4],
        "add two": 0.7 * a - 0.2 * b[2:],
        "per block": ladder * b,
        "ablate": a[2:5].ablated(),
        "ablate two overlapping": a.ablated() + near[3:].ablated(),
        "ablate three": a.ablated() + near.ablated() + b[::2].ablated(),
        "ablate one twice": a.ablated() + a[2:].ablated(),
        "clamp": a.clamped(2.5),
        "clamp two overlapping": a.clamped(2.5) + near.clamped(-1.0),
        "clamp per block": a.clamped(ladder),
        "clamp and ablate": a[1:].clamped(4.0) + near.ablated(),
        "amplify": a.amplified(0.5),
        "shrink": a.amplified(-0.3) + b.amplified([0.1 * i for i in range(N_LAYERS)]),
        "everything": 0.4 * c + a.ablated() + near[2:].clamped(1.5) + b.amplified(0.7) - 0.1 * a[0],
    }


@pytest.mark.parametrize("name", mixtures())
def test_the_compiled_steering_is_the_law(name, h):
    steering = mixtures()[name]
    compiled = compile_steering(steering, N_LAYERS, HIDDEN)
    for layer in range(N_LAYERS):
        expected = hooks.law(h.double(), steering, layer)
        torch.testing.assert_close(applied(compiled, h, layer), expected, atol=2e-5, rtol=1e-5)
        acts = bool((expected - h).abs().max() > 0)
        assert bool(compiled.terms.count[layer]) == acts == (layer in steering.layers)
    assert compiled.terms.count.nonzero()[0].tolist() == steering.layers


def projections(h: torch.Tensor, *directions: Direction, layer: int) -> torch.Tensor:
    return torch.stack([h.double() @ d.vectors[layer].double() for d in directions], dim=-1)


def test_one_ablation_leaves_no_projection(a, h):
    compiled = compile_steering(a.ablated(), N_LAYERS, HIDDEN)
    for layer in range(N_LAYERS):
        assert projections(applied(compiled, h, layer), a, layer=layer).abs().max() < 1e-5


@pytest.mark.parametrize("cosine", [0.9, -0.9, 0.999, 0.0])
def test_two_overlapping_ablations_leave_no_projection(a, h, cosine):
    other = tilted(a, cosine)
    compiled = compile_steering(a.ablated() + other.ablated(), N_LAYERS, HIDDEN)
    for layer in range(N_LAYERS):
        assert projections(applied(compiled, h, layer), a, other, layer=layer).abs().max() < 2e-4
    # Taken one by one they would not: the test above can fail.
    naive = h - (h @ a.vectors[0])[:, None] * a.vectors[0] - (h @ other.vectors[0])[:, None] * other.vectors[0]
    assert cosine == 0.0 or projections(naive, a, other, layer=0).abs().max() > 0.1


def test_overlapping_clamps_reach_both_targets(a, h):
    other = tilted(a, 0.8)
    compiled = compile_steering(a.clamped(2.0) + other.clamped(-3.0), N_LAYERS, HIDDEN)
    for layer in range(N_LAYERS):
        reached = projections(applied(compiled, h, layer), a, other, layer=layer)
        torch.testing.assert_close(reached, torch.tensor([2.0, -3.0]).double().expand_as(reached), atol=1e-4, rtol=0)


def test_the_order_of_pinned_terms_does_not_matter(a, b, h):
    near = tilted(a, 0.9)
    one = compile_steering(a.clamped(1.0) + near.ablated() + b.clamped(2.0), N_LAYERS, HIDDEN)
    two = compile_steering(b.clamped(2.0) + near.ablated() + a.clamped(1.0), N_LAYERS, HIDDEN)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(applied(one, h, layer), applied(two, h, layer), atol=1e-4, rtol=1e-5)


def test_contradicting_clamps_raise_and_agreeing_ones_do_not(a):
    with pytest.raises(ValueError, match="d0"):
        compile_steering(a.clamped(1.0) + a.clamped(2.0), N_LAYERS, HIDDEN)
    with pytest.raises(ValueError, match=r"clamped to 2\.05, but .* fix its projection at 2"):
        compile_steering(a.clamped(2.0) + a.clamped(2.05), N_LAYERS, HIDDEN)
    with pytest.raises(ValueError, match="clamped"):
        compile_steering(a.clamped(1.0) + Direction("same", -a.vectors).clamped(1.0), N_LAYERS, HIDDEN)
    compile_steering(a.clamped(1.0) + Direction("same", -a.vectors).clamped(-1.0), N_LAYERS, HIDDEN)
    compile_steering(a[:2].clamped(1.0) + a[2:].clamped(2.0), N_LAYERS, HIDDEN)


def test_addition_is_linear_in_the_strength(a, b, h):
    steering = 0.7 * a[1:4] - 0.2 * b
    one = compile_steering(steering, N_LAYERS, HIDDEN)
    for factor in (-1.0, 0.5, 3.0):
        many = compile_steering(factor * steering, N_LAYERS, HIDDEN)
        for layer in range(N_LAYERS):
            shift = applied(one, h, layer) - h
            torch.testing.assert_close(applied(many, h, layer) - h, factor * shift, atol=1e-6, rtol=1e-5)


def test_equal_content_has_an_equal_key_and_others_do_not(a, b):
    def keys(steering):
        return compile_steering(steering, N_LAYERS, HIDDEN).keys

    copy = Direction("another name", a.vectors.clone())
    assert keys(0.1 * a) == keys(0.7 * a[2:4]) == keys(a.amplified(0.3)) == keys(1.0 * copy)
    assert keys(0.1 * a) != keys(0.1 * b)


def test_identity_tells_steerings_apart(a, b):
    def identity(steering):
        return compile_steering(steering, N_LAYERS, HIDDEN).identity

    assert identity(0.1 * a) == identity(0.1 * a)
    different = [
        identity(s)
        for s in (
            0.1 * a,
            0.2 * a,
            0.1 * a[:3],
            0.1 * b,
            (0.1 * a).with_scope("all"),
            (0.1 * a).with_keep_norm(),
            a.ablated(),
            a.amplified(0.1),
        )
    ]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    ("vectors", "says"),
    [((N_LAYERS - 1, HIDDEN), "blocks"), ((N_LAYERS, HIDDEN + 1), "size"), ((1, 1), "another model")],
)
def test_a_direction_of_another_size_is_refused(vectors, says):
    d = Direction("foreign", random_vectors(*vectors, seed=0))
    with pytest.raises(ValueError, match=rf"(?s)foreign.*{says}"):
        compile_steering(0.1 * d, N_LAYERS, HIDDEN)


def test_what_is_not_a_steering_is_refused(a):
    for bad in (a, 0.1, "honesty", [0.1 * a]):
        with pytest.raises(TypeError, match="Steering"):
            compile_steering(bad, N_LAYERS, HIDDEN)


# --- one block's vector everywhere -----------------------------------------------------------------------------------


def test_at_is_one_block(a):
    assert a.at(3).layers == [3]
    assert a.at(-1).layers == [N_LAYERS - 1]
    assert torch.equal(a.at(3).scale, a[3].scale)
    for bad in ([3], slice(1, 2), True, 1.0, "3"):
        with pytest.raises(TypeError, match="at\\(\\) takes one block"):
            a.at(bad)
    with pytest.raises(IndexError, match="not 6"):
        a.at(N_LAYERS)


def test_everywhere_has_the_vector_and_the_scale_of_its_block(tmp_path):
    d = direction(0, model="m", method="pca", health={"contrast": [0.1] * N_LAYERS}, metadata={"k": "v"})
    for one in (d.at(3).everywhere(), d[3].everywhere(), d[-3:-2].everywhere()):
        assert one.layers == list(range(N_LAYERS))
        assert all(torch.equal(row, d.vectors[3]) for row in one.vectors)
        assert one.scale.tolist() == [float(d.scale[3])] * N_LAYERS
        assert (one.name, one.model, one.method, one.health) == (d.name, "m", "pca", {})
        assert one.metadata == {"k": "v", "everywhere": "the vector of block 3"}
    alpha = (0.5 * d.at(3).everywhere()).terms[0].alpha
    assert torch.equal(alpha, (0.5 * d.scale[3]).expand(N_LAYERS))
    assert d.at(3).everywhere()[1:3].layers == [1, 2]
    d.at(3).everywhere().save(tmp_path / "one.safetensors")
    again = Direction.load(tmp_path / "one.safetensors")
    assert torch.equal(again.vectors, one.vectors)
    assert again.metadata == one.metadata


def test_everywhere_needs_one_block(a):
    for several in (a, a[1:3], a[[0, 5]]):
        with pytest.raises(ValueError, match=r"d\.at\(17\)\.everywhere"):
            several.everywhere()
    with pytest.raises(ValueError, match="blocks none"):
        a[1][2:].everywhere()
