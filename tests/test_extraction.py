"""Directions from states: what is kept of them agrees with the singular vectors of them all, on whatever device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import host
from icon2_rt import Runtime
from icon2_rt.extraction import PENDING, RANK, ContrastStatistics, PairStates
from tests.models import random_prompts, tiny_llama

CPU = torch.device("cpu")
LAYERS, HIDDEN = 3, 96


def pairs(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States of n pairs: a common direction of its own size per block, over noise with a falling spectrum."""
    noise = torch.Generator().manual_seed(seed)
    negative = 4 * torch.randn(n, LAYERS, HIDDEN, generator=noise)
    axis = torch.randn(LAYERS, HIDDEN, generator=noise)
    spectrum = torch.linspace(1.0, 0.01, HIDDEN)
    difference = torch.randn(n, LAYERS, HIDDEN, generator=noise) * spectrum + 0.3 * axis
    return negative + difference, negative


def expected(positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
    """All differences at once, in double precision."""
    v = (positive - negative).double().transpose(0, 1)
    mean = v.mean(dim=1)

    def first(rows: Tensor) -> Tensor:
        u = torch.linalg.svd(rows, full_matrices=False).Vh[:, 0]
        return torch.where(((u * mean).sum(-1) < 0)[:, None], -u, u)

    u = first(v)
    unit = mean / mean.norm(dim=-1, keepdim=True)
    norms = (positive.double().norm(dim=-1) + negative.double().norm(dim=-1)).sum(dim=0)
    return {
        "u": u,
        "cos_mean_difference": (u * unit).sum(-1),
        "sign_agreement": ((v @ u[:, :, None])[..., 0] > 0).double().mean(dim=1),
        "split_half_cosine": (first(v[:, 0::2]) * first(v[:, 1::2])).sum(-1),
        "contrast": mean.norm(dim=-1) / (norms / (2 * len(positive))),
    }


@pytest.mark.parametrize("n", [2, 3, 17, RANK, 2 * PENDING + 9, 700])
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_statistics_agree_with_the_svd_of_all_differences(n: int, batch: int) -> None:
    positive, negative = pairs(n)
    statistics = ContrastStatistics(LAYERS, HIDDEN, CPU)
    for begin in range(0, n, batch):
        statistics.add(positive[begin : begin + batch], negative[begin : begin + batch])
    u, health = statistics.direction("pca")
    found = {"u": u, **{name: torch.tensor(figures) for name, figures in health.items()}}
    for name, value in expected(positive, negative).items():
        # A row whose projection is nearly nothing may be counted on the other side.
        tolerance = 1.5 / n if name == "sign_agreement" and n > RANK else 2e-4
        torch.testing.assert_close(found[name].double(), value, atol=tolerance, rtol=0)
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(LAYERS))


def test_the_mean_difference_is_a_unit_vector_too() -> None:
    positive, negative = pairs(40)
    statistics = ContrastStatistics(LAYERS, HIDDEN, CPU)
    statistics.add(positive, negative)
    u, _ = statistics.direction("mean_difference")
    mean = (positive - negative).mean(dim=0)
    torch.testing.assert_close(u, mean / mean.norm(dim=-1, keepdim=True))


def test_what_is_kept_does_not_grow_with_the_states() -> None:
    positive, negative = pairs(PENDING)
    statistics = ContrastStatistics(LAYERS, HIDDEN, CPU)
    for _ in range(6):
        statistics.add(positive, negative)
        for half in statistics._halves:
            assert half._weighted.shape[1] <= RANK
            assert sum(rows.shape[1] for rows in half._pending) < PENDING


def test_differences_of_one_half_may_all_be_nothing() -> None:
    positive, negative = pairs(4)
    positive[1::2] = negative[1::2]
    statistics = ContrastStatistics(LAYERS, HIDDEN, CPU)
    statistics.add(positive, negative)
    u, health = statistics.direction("pca")
    assert torch.isfinite(u).all()
    assert health["split_half_cosine"] == [0.0] * LAYERS


# --- states ----------------------------------------------------------------------------------------------------------


def shown(states: PairStates, prompts: list[int], all_states: Tensor, layers: int = LAYERS) -> None:
    for layer in range(layers):
        states.keep(prompts, layer, all_states[prompts, layer])


def test_states_become_pairs_whatever_the_passes() -> None:
    all_states = torch.randn(10, LAYERS, HIDDEN)
    states, found = PairStates(LAYERS), []
    for passes in ([[0, 1, 2]], [[5, 3], [4]], [[6]], [[9, 8], [7]]):
        for prompts in passes:
            shown(states, prompts, all_states)
        found.append(states.take())
    assert found[2] is None
    got = [torch.cat([f[k] for f in found if f is not None]) for k in (0, 1)]
    assert torch.equal(got[0], all_states[0::2])
    assert torch.equal(got[1], all_states[1::2])
    assert not states._left


def test_pairs_are_put_together_without_waiting_for_the_device() -> None:
    all_states, states = torch.randn(6, LAYERS, HIDDEN), PairStates(LAYERS)
    shown(states, [5, 0, 3, 1, 2], all_states)
    with host.Crossings() as crossings:
        found = states.take()
    assert found is not None
    assert torch.equal(found[0], all_states[[0, 2]])
    assert torch.equal(found[1], all_states[[1, 3]])
    assert not crossings.count


def test_a_pass_that_broke_off_is_repeated_in_smaller_ones() -> None:
    all_states = torch.randn(4, LAYERS, HIDDEN)
    states = PairStates(LAYERS)
    shown(states, [0, 1, 2, 3], torch.full_like(all_states, torch.nan), LAYERS - 1)
    shown(states, [0, 1], all_states)
    shown(states, [2, 3], all_states)
    taken = states.take()
    assert taken is not None
    assert torch.equal(taken[0], all_states[0::2])


def test_a_state_is_kept_as_it_was_shown() -> None:
    states, h = PairStates(1), torch.ones(2, 5)
    states.keep([0, 1], 0, h)
    h.zero_()
    taken = states.take()
    assert taken is not None and taken[0].sum() == 5


# --- the host's part -------------------------------------------------------------------------------------------------


class HostCopies(TorchDispatchMode):
    """Counts what would wait for a device: copies to the host, and numbers that are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_states_are_not_copied_to_the_host_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has a copy a block where states leave the device; here only the result does."""
    copies = [0]
    cpu = Tensor.cpu

    def counted(self: Tensor) -> Tensor:
        copies[0] += 1
        return cpu(self)

    rt = Runtime(tiny_llama(), device="cpu", page_size=8, prefill_chunk=64)
    monkeypatch.setattr(Tensor, "cpu", counted)
    sides = [random_prompts([20] * 24, seed=seed) for seed in (1, 2)]
    direction = rt.extract_direction(*sides, name="x")
    assert copies == [1]
    assert direction.vectors.device.type == "cpu"


def test_a_batch_of_pairs_is_added_without_looking_at_a_number() -> None:
    statistics, states = ContrastStatistics(LAYERS, HIDDEN, CPU), PairStates(LAYERS)
    all_states = torch.randn(300, LAYERS, HIDDEN)
    with HostCopies() as mode:
        for begin in range(0, 300, 30):
            shown(states, [*range(begin, begin + 30)], all_states)
            taken = states.take()
            assert taken is not None
            statistics.add(*taken)
    assert mode.count == 0
