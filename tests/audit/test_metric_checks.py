"""Faithfulness and robustness of measures."""

from __future__ import annotations

import math

import pytest

from palimpsest.audit import metric_checks as checks
from palimpsest.core.errors import InvalidAudit


def test_a_faithful_measure_tells_models_with_the_knowledge():
    assert checks.faithfulness([0.9, 0.8], [0.1, 0.2, 0.3]) == 1
    assert checks.faithfulness([0.5, 0.5], [0.5, 0.5]) == 0.5
    with pytest.raises(InvalidAudit, match="models with"):
        checks.faithfulness([], [0.1])
    with pytest.raises(InvalidAudit, match="NaN"):
        checks.faithfulness([math.nan], [0.1])


@pytest.mark.parametrize(
    ("unlearned", "control", "expected"),
    [
        ((0.2, 0.8), (0.1, 0.4), 0.5),  # learns twice as fast as the control
        ((0.2, 0.5), (0.1, 0.9), 1.0),
        ((0.4, 0.4), (0.1, 0.5), 1.0),  # gained nothing
        ((0.1, 0.6), (0.3, 0.2), 0.0),  # the control lost
    ],
)
def test_relearning_is_compared_with_the_control(unlearned, control, expected):
    assert checks.relearning_robustness(unlearned, control) == pytest.approx(expected)


def test_as_released_a_control_that_lost_gives_a_negative_share():
    assert checks.relearning_robustness((0.1, 0.6), (0.3, 0.2), as_released=True) == pytest.approx(-0.2)


def test_rounding_that_brings_knowledge_back_lowers_the_robustness():
    assert checks.quantization_robustness(0.21, 0.84) == pytest.approx(0.25)
    assert checks.quantization_robustness(0.5, 0.3) == 1
    assert checks.quantization_robustness(0.0, 0.0) == 1
    with pytest.raises(InvalidAudit, match="not negative"):
        checks.quantization_robustness(-0.1, 0.3)


def test_robustness_is_the_harmonic_mean():
    assert checks.robustness(1.0, 0.25) == pytest.approx(0.4)
    assert checks.robustness(0.0, 1.0) == 0


def test_the_relative_difference_is_in_per_cent_of_the_reference():
    assert checks.relative_difference(0.3, 0.2) == pytest.approx(50)
    assert checks.relative_difference(0.2, 0.2) == 0
    with pytest.raises(InvalidAudit, match="not defined"):
        checks.relative_difference(1.0, 0.0, tiny=0.0)
