"""Rates over facts that are asked several times, against closed forms and simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from palimpsest.audit import hit_rates
from palimpsest.core.errors import InvalidAudit


@given(st.integers(1, 60), st.data())
def test_wilsons_interval_is_scipys(n: int, data: st.DataObject):
    hits = data.draw(st.integers(0, n))
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert hit_rates.wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_prompts_of_one_fact_that_always_agree_are_worth_one():
    facts = np.random.default_rng(0).random(40) < 0.4
    together = np.repeat(facts[:, None], 8, axis=1)
    apart = np.random.default_rng(1).random((40, 8)) < 0.4
    one, other = hit_rates.success_rate(together), hit_rates.success_rate(apart)
    assert one.n == other.n == 320 and one.facts == 40
    assert (one.low, one.high) == pytest.approx(hit_rates.wilson(facts.sum(), 40), abs=0.01)
    assert one.high - one.low > 2 * (other.high - other.low)


def test_the_interval_covers_the_rate_of_facts_that_differ():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        chances = random.beta(1, 2, size=30)
        hits = random.random((30, 6)) < chances[:, None]
        rate = hit_rates.success_rate(hits)
        covered += rate.low <= 1 / 3 <= rate.high
    assert covered >= 0.91 * 300


def test_no_hit_at_all_leaves_an_interval_of_the_facts():
    rate = hit_rates.success_rate(np.zeros((10, 5), bool))
    assert (rate.low, rate.high) == hit_rates.wilson(0, 10)


def test_a_fact_is_recovered_by_any_of_its_prompts():
    hits = np.array([[False, True, False], [False] * 3])
    assert hit_rates.success_rate(hits).value == pytest.approx(1 / 6)
    assert hit_rates.recovery_rate(hits).value == 0.5
    assert hit_rates.known_before(hits).tolist() == [True, False]


def test_the_gain_is_paired_by_fact():
    plain = np.array([True, True, False, False, False, False, False, False])
    chained = np.array([True, True, True, True, True, True, True, True])
    found = hit_rates.gain(plain, chained)
    assert found.value == 0.75
    assert found.p == pytest.approx(2 * 0.5**6)
    assert hit_rates.gain(plain, plain).p == 1


def test_the_control_leaks_nothing_and_the_original_everything():
    assert hit_rates.adjusted_leak(0.1, original=0.9, control=0.1) == 0
    assert hit_rates.adjusted_leak(0.9, original=0.9, control=0.1) == 1
    with pytest.raises(InvalidAudit, match="measure nothing"):
        hit_rates.adjusted_leak(0.5, original=0.1, control=0.1)


def test_unfair_suppression_counts_prompts_that_only_the_original_answers():
    original = np.array([[True, True], [True, False]])
    unlearned = np.array([[True, False], [False, True]])
    found = hit_rates.unfair_suppression(original, unlearned)
    assert found.value == pytest.approx(2 / 3) and found.n == 3
    assert hit_rates.unfair_suppression(original, original).value == 0
    with pytest.raises(InvalidAudit, match="nothing could be suppressed"):
        hit_rates.unfair_suppression(~np.ones((2, 2), bool), unlearned)


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.data())
def test_leak_at_n_is_the_mean_over_all_choices_of_samples(samples: list[bool], data: st.DataObject):
    n = data.draw(st.integers(1, len(samples)))
    choices = [any(choice) for choice in combinations(samples, n)]
    assert hit_rates.leak_at(np.array([samples]), n)[0] == pytest.approx(np.mean(choices))


def test_no_hit_in_twenty_samples_bounds_the_rate():
    assert hit_rates.upper_bound(0, 20) == pytest.approx(1 - 0.05 ** (1 / 20))
    rate = hit_rates.sample_rate(np.zeros((2, 10), bool))
    assert rate.value == 0 and rate.n == 20 and rate.high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_bad_tables_are_refused():
    with pytest.raises(InvalidAudit, match="N of 1 or more"):
        hit_rates.success_rate(np.zeros((3, 0), bool))
    with pytest.raises(InvalidAudit, match="0 or 1"):
        hit_rates.success_rate(np.full((2, 2), 0.5))
    with pytest.raises(InvalidAudit, match="nothing can be recovered"):
        hit_rates.known_before(np.zeros((2, 2), bool))
    with pytest.raises(InvalidAudit, match="n from 1 to the 2"):
        hit_rates.leak_at(np.ones((1, 2), bool), 3)
    with pytest.raises(InvalidAudit, match="not defined"):
        hit_rates.wilson(3, 2)
    with pytest.raises(InvalidAudit, match="no such pairs"):
        hit_rates.gain(np.ones(2, bool), np.ones(3, bool))
