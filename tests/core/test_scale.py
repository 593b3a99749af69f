from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from palimpsest.core.finding import Finding, Judgement
from palimpsest.core.intervals import auc, auc_interval, clopper_pearson, mean_interval
from palimpsest.core.scale import SEED_SPREAD, judged, lowest_expected, scale

controls = st.lists(st.floats(0.0, 0.2), min_size=1, max_size=5)


@given(controls)
def test_the_original_is_at_1_and_the_mean_control_at_0(values):
    assert scale(1.0, 1.0, values).k == pytest.approx(1.0)
    assert scale(float(np.mean(values)), 1.0, values).k == pytest.approx(0.0, abs=1e-9)


@given(controls, st.floats(-1, 2), st.floats(0.1, 10), st.floats(-5, 5))
def test_k_does_not_depend_on_the_unit_of_the_measurement(values, value, factor, shift):
    plain = scale(value, 1.0, values)
    moved = scale(value * factor + shift, factor + shift, [v * factor + shift for v in values])
    assert moved.k == pytest.approx(plain.k, rel=1e-6, abs=1e-6)
    assert moved.valid == plain.valid or abs(1 - np.mean(values)) < 1e-6


def test_a_probe_in_which_controls_differ_as_much_as_the_original_is_invalid():
    noisy = scale(0.5, 0.6, [0.2, 0.5, 0.8])
    assert not noisy.valid and "3 times the noise" in noisy.reason
    assert not scale(0.5, 0.5, [0.5]).valid
    assert not scale(0.5, 0.53, [0.5], prior=SEED_SPREAD).valid


def test_more_controls_of_the_same_spread_narrow_the_interval():
    few, many = scale(0.5, 1.0, [0.0, 0.1]), scale(0.5, 1.0, [0.0, 0.1] * 5)
    assert many.high - many.low < few.high - few.low


def test_the_interval_holds_a_further_retraining_as_often_as_it_says():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        *some, further = random.normal(0.3, 0.1, 4)
        scaled = scale(further, 1.0, some, prior=0.1)
        inside += scaled.low <= 0 <= scaled.high
    assert 0.94 < inside / 2000 <= 1.0


def test_an_infinite_measurement_is_invalid_and_not_an_error():
    assert not scale(math.inf, 1.0, [0.0]).valid


def test_judgements_follow_the_interval():
    base = Finding("a", "b", 0.0, original=1.0, controls=(0.0, 0.02))
    assert judged(base).judgement == Judgement.AS_RETRAINED
    assert judged(Finding("a", "b", 0.9, original=1.0, controls=(0.0, 0.02))).judgement == Judgement.SEPARATED
    assert judged(Finding("a", "b", -0.9, original=1.0, controls=(0.0, 0.02))).judgement == Judgement.BEYOND
    assert judged(Finding("a", "b", 0.9)).k is None


def test_a_finding_survives_the_way_through_plain_data():
    finding = judged(Finding("a", "b", 0.4, 0.3, 0.5, 7, original=1.0, controls=(0.0, 0.1), note="x"))
    assert Finding.from_dict(finding.to_dict()) == finding


def test_the_lowest_value_expected_of_a_retraining_lies_below_the_controls():
    assert lowest_expected([0.9, 0.92], 0.02) < 0.89 < lowest_expected([0.9, 0.92], 0.0001)


@given(st.integers(1, 60), st.data())
def test_the_exact_interval_of_a_rate_inverts_the_binomial_test(n, data):
    k = data.draw(st.integers(0, n))
    low, high = clopper_pearson(k, n)
    assert low <= k / n <= high
    if k > 0:
        assert stats.binom.sf(k - 1, n, low) == pytest.approx(0.025, rel=1e-3)
    if k < n:
        assert stats.binom.cdf(k, n, high) == pytest.approx(0.025, rel=1e-3)


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=30), st.lists(st.integers(0, 6), min_size=2, max_size=30)
)
def test_the_auc_is_scikit_learns(members, others):
    truth = [1] * len(members) + [0] * len(others)
    assert auc(np.array(members), np.array(others)) == pytest.approx(roc_auc_score(truth, members + others))


def test_delongs_standard_error_is_the_spread_of_the_auc_over_samples():
    random = np.random.default_rng(1)
    draws = [(random.normal(0.5, 1, 60), random.normal(0, 1, 80)) for _ in range(400)]
    spread = np.std([auc(a, b) for a, b in draws])
    error = np.mean([auc_interval(a, b)[0] for a, b in draws])
    assert error == pytest.approx(spread, rel=0.15)


def test_the_bootstrap_interval_of_a_mean_has_the_width_of_the_normal_one():
    values = np.random.default_rng(2).normal(size=400)
    low, high = mean_interval(values, np.random.default_rng(0))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1) and low < values.mean() < high
