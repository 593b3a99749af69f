from __future__ import annotations

import numpy as np
import pytest

from palimpsest.audit.language.fact_rates import cluster_error, clustered_rate, worst
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.finding import Finding


def test_values_of_one_subject_count_as_one_when_they_always_agree():
    values = np.repeat([1.0, 0.0, 1.0, 0.0], 10)
    alone, together = cluster_error(values, np.arange(40)), cluster_error(values, np.repeat(np.arange(4), 10))
    assert together == pytest.approx(cluster_error(np.array([1.0, 0.0, 1.0, 0.0]), np.arange(4)))
    assert together > 3 * alone


def test_the_cluster_error_is_the_deviation_over_resampled_subjects():
    random = np.random.default_rng(0)
    means = random.random(30)
    values = (random.random((30, 8)) < means[:, None]).astype(float)
    drawn = values[random.integers(0, 30, (4000, 30))].mean((1, 2))
    assert cluster_error(values.ravel(), np.repeat(np.arange(30), 8)) == pytest.approx(drawn.std(), rel=0.1)


def test_a_rate_of_zero_is_known_as_well_as_its_subjects_allow():
    few, many = (clustered_rate(np.zeros(24), np.repeat(np.arange(n), 24 // n)) for n in (4, 24))
    assert few.value == many.value == 0
    assert few.high == pytest.approx(0.49, abs=0.01) and many.high < 0.15


def test_the_interval_holds_the_rate_of_the_subjects_in_most_draws():
    random = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        means = random.choice([0.1, 0.9], 20)
        values = (random.random((20, 5)) < means[:, None]).astype(float).ravel()
        rate = clustered_rate(values, np.repeat(np.arange(20), 5))
        held += rate.low <= 0.5 <= rate.high
    assert held >= 360


def test_no_value_has_no_rate():
    with pytest.raises(InvalidAudit, match="one value and one subject"):
        clustered_rate(np.array([]), np.array([], int))


def test_the_headline_is_the_highest_k_that_is_surely_above_zero():
    def finding(name: str, k: float | None, low: float) -> Finding:
        return Finding("a", name, 0.5, k=k, k_low=low, k_high=1.0, valid=k is not None)

    found = worst(
        [finding("unsure", 0.9, -0.4), finding("sure", 0.6, 0.2), finding("bad", None, 0)], "worst", "ways"
    )
    assert found is not None and found.k == 0.6 and found.bears == "inside"
    assert "sure, the worst of 2 valid ways (3 tried)" in found.note
    assert worst([finding("bad", None, 0)], "worst", "ways") is None
