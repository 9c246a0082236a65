"""The rule that picks strengths from a measured ladder, on ladders made by hand."""

from __future__ import annotations

import pytest

from icon2_rt.pipeline.calibrate import CUT_OFF_GAIN, FLUENCY_LOSS, Rung, choose


def _rung(dose: float, agreement: list[float], logprob: float = -1.0, cut_off: float = 0.0) -> Rung:
    return Rung(dose, 10 * dose, logprob, cut_off, tuple(agreement))


BASE = _rung(0.0, [0.0] * 20)


def test_the_highest_fluent_agreement_and_the_mildest_clear_negative() -> None:
    """The paper's rule: γ⁺ by the mean; γ⁻ the best mean among those that the positive beats in over 90 %."""
    ladder = [
        BASE,
        _rung(0.05, [0.1] * 20),
        _rung(0.1, [0.3] * 20),
        _rung(0.2, [0.9] * 20, logprob=-1.0 - 2 * FLUENCY_LOSS),  # agrees most, but broken
        _rung(-0.05, [0.0] * 10 + [0.5] * 10),  # mild: loses in half of them only
        _rung(-0.1, [-0.1] * 20),
        _rung(-0.2, [-0.8] * 20),
    ]
    calibration = choose(ladder)
    assert (calibration.positive.dose, calibration.negative.dose) == (0.1, -0.1)
    assert calibration.positive.gamma == 1.0
    assert calibration.better == 1.0
    assert calibration.notes == ()


def test_without_a_clear_negative_the_one_that_agrees_least_is_taken_and_told() -> None:
    ladder = [
        BASE,
        _rung(0.1, [0.1] * 20),
        _rung(-0.1, [0.2] * 10 + [0.0] * 10),
        _rung(-0.2, [0.2] * 6 + [0.1] * 4 + [0.0] * 10),
    ]
    calibration = choose(ladder)
    assert calibration.negative.dose == -0.2
    assert calibration.better == pytest.approx((10 + 0.5 * 4) / 20)
    assert "agrees least" in calibration.notes[0]


def test_without_a_fluent_rung_the_smallest_is_taken_and_told() -> None:
    broken = {"logprob": -5.0}
    ladder = [BASE, _rung(0.1, [0.5], **broken), _rung(0.2, [0.9], **broken), _rung(-0.1, [-1.0]), _rung(-0.2, [-2.0])]
    calibration = choose([_rung(0.0, [0.0]), *ladder[1:]])
    assert calibration.positive.dose == 0.1
    assert "no positive dose leaves the text fluent" in calibration.notes[0]


def test_running_into_the_token_limit_is_not_fluent() -> None:
    endless = _rung(0.2, [0.9] * 20, cut_off=2 * CUT_OFF_GAIN)
    calibration = choose([BASE, _rung(0.1, [0.1] * 20), endless, _rung(-0.1, [-0.1] * 20)])
    assert calibration.positive.dose == 0.1
    assert calibration.fluent(endless) is False


def test_equal_agreement_takes_the_smaller_dose() -> None:
    flat = [_rung(dose, [0.2] * 20) for dose in (0.2, 0.1)] + [_rung(dose, [-0.2] * 20) for dose in (-0.2, -0.1)]
    calibration = choose([BASE, *flat])
    assert (calibration.positive.dose, calibration.negative.dose) == (0.1, -0.1)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_half_a_ladder_is_refused(missing: int) -> None:
    ladder = [BASE, _rung(0.1, [0.1] * 20), _rung(-0.1, [-0.1] * 20)]
    del ladder[missing]
    with pytest.raises(ValueError, match="unsteered rung"):
        choose(ladder)
