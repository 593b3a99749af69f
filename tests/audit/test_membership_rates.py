"""ROC, rates at low false positive rates, and their errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.audit.membership.findings import leak_finding, tpr_finding, widened_interval
from palimpsest.audit.membership.rates import (
    best_accuracy,
    check_scores,
    placements,
    range_error,
    roc,
    thinned,
    tpr_at,
)
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.finding import Judgement
from palimpsest.core.intervals import auc, auc_interval, clopper_pearson

scores = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12).map(np.array)


@given(scores, scores)
def test_exchanging_the_sides_mirrors_the_auc(members: np.ndarray, others: np.ndarray):
    assert auc(members, others) + auc(others, members) == pytest.approx(1)
    assert auc(members, others) == pytest.approx(1 - auc(-members, -others))


@given(scores, scores, st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]))
def test_the_rate_is_the_best_of_all_thresholds(members: np.ndarray, others: np.ndarray, alpha: float):
    thresholds = [*np.concatenate([members, others]), math.inf]
    allowed = [t for t in thresholds if (others >= t).mean() <= alpha + 1e-12]
    found = tpr_at(members, others, alpha, strict=False)
    assert found.rate == pytest.approx(max((members >= t).mean() for t in allowed))
    assert found.false / found.others <= alpha + 1e-12
    assert found.rate == found.hit.mean()


@given(scores, scores)
def test_placements_average_to_the_auc(members: np.ndarray, others: np.ndarray):
    above, below = placements(members, others)
    assert above.mean() == pytest.approx(auc(members, others))
    assert below.mean() == pytest.approx(auc(members, others))


def test_fifty_non_members_do_not_resolve_a_rate_of_a_thousandth():
    random = np.random.default_rng(0)
    with pytest.raises(InvalidAudit, match="not resolvable with 50 non-members; it needs at least 1000"):
        tpr_at(random.normal(size=100), random.normal(size=50), 0.001)
    assert tpr_at(random.normal(size=100), random.normal(size=1000), 0.001).others == 1000


def test_an_unresolvable_rate_becomes_an_invalid_finding_without_a_value():
    random = np.random.default_rng(0)
    sides = {"unlearned": (random.normal(size=100), random.normal(size=50))}
    finding = tpr_finding("membership", "loss_tpr", sides, 0.001)
    assert finding.value is None
    assert finding.judgement == Judgement.INVALID
    assert "not resolvable" in finding.note


def test_a_rate_on_few_non_members_is_called_unstable():
    random = np.random.default_rng(0)
    few = {"unlearned": (random.normal(size=100), random.normal(size=200))}
    many = {"unlearned": (random.normal(size=100), random.normal(size=2000))}
    assert "unstable" in tpr_finding("membership", "x", few, 0.01).note
    assert "unstable" not in tpr_finding("membership", "x", many, 0.01).note


def test_permuted_membership_gives_chance():
    # 200 permutations: the AUC within 3 errors of 0.5 and the rate's interval around its level.
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(1, 1, 500), random.normal(0, 1, 500)])
    auc_inside, rate_inside = 0, 0
    for _ in range(200):
        order = random.permutation(1000)
        members, others = values[order[:500]], values[order[500:]]
        error, _, _ = auc_interval(members, others)
        auc_inside += abs(auc(members, others) - 0.5) < 3 * error
        low, high = clopper_pearson(int(tpr_at(members, others, 0.05).hit.sum()), 500)
        rate_inside += low <= 0.05 <= high
    assert auc_inside >= 198
    # The threshold is drawn from the non-members, so the rate's own interval covers a little too seldom.
    assert rate_inside >= 150


def test_the_error_of_a_range_uses_that_the_records_are_the_same():
    random = np.random.default_rng(0)
    skill = [random.normal(0, 3, 400), random.normal(0, 3, 400)]
    one = tuple(side + random.normal(0, 0.3, 400) for side in skill)
    two = tuple(side + random.normal(0, 0.3, 400) for side in skill)
    draws = []
    for _ in range(400):
        i, j = random.integers(0, 400, 400), random.integers(0, 400, 400)
        draws.append(auc(one[0][i], one[1][j]) - auc(two[0][i], two[1][j]))
    assert range_error(one, [two]) == pytest.approx(np.std(draws), rel=0.15)
    assert range_error(one, [one]) == 0
    assert range_error(one, [two]) < auc_interval(*one)[0] / 3


def test_a_curve_is_thinned_but_keeps_its_low_end():
    random = np.random.default_rng(0)
    fpr, tpr = roc(random.normal(0.5, 1, 3000), random.normal(0, 1, 3000))
    points = thinned(fpr, tpr)
    assert len(points) == 200 < len(fpr)
    assert points[:100] == [(float(x), float(y)) for x, y in zip(fpr[:100], tpr[:100], strict=True)]
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (1.0, 1.0)


def test_separated_scores_have_a_perfect_best_accuracy_and_equal_ones_none():
    assert best_accuracy(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert best_accuracy(np.ones(5), np.ones(5)) == 0.5


def test_a_leak_in_the_other_direction_is_found():
    random = np.random.default_rng(0)
    others = random.normal(0, 1, 300)
    chance = {f"control {i}": (random.normal(0, 1, 300), others) for i in range(3)}
    hidden = leak_finding("membership", "leak", {"unlearned": (random.normal(-1, 1, 300), others), **chance})
    clean = leak_finding("membership", "leak", {"unlearned": (random.normal(0, 1, 300), others), **chance})
    assert hidden.value is not None and hidden.value > 0.2
    assert hidden.judgement == Judgement.SEPARATED
    assert clean.judgement == Judgement.AS_RETRAINED


def test_a_widened_interval_is_wider_by_its_factor_and_stays_in_range():
    random = np.random.default_rng(0)
    sides = random.normal(0.2, 1, 80), random.normal(0, 1, 80)
    low, high = widened_interval(*sides)
    wide_low, wide_high = widened_interval(*sides, 2.0)
    assert wide_high - wide_low == pytest.approx(2 * (high - low))
    assert widened_interval(np.array([5.0, 6.0]), np.array([0.0, 1.0]), 10.0)[1] <= 1


@pytest.mark.parametrize(
    ("members", "others", "message"),
    [
        (np.array([]), np.array([1.0]), "members must be one number per record"),
        (np.array([1.0]), np.array([[1.0]]), "non-members must be one number per record"),
        (np.array([math.nan]), np.array([1.0]), "1 of 1 scores of the members are NaN"),
        (np.array([1.0]), np.array([math.inf, 0.0]), "1 of 2 scores of the non-members"),
    ],
)
def test_unusable_scores_are_refused(members: np.ndarray, others: np.ndarray, message: str):
    with pytest.raises(InvalidAudit, match=message):
        check_scores(members, others)


def test_a_false_positive_rate_outside_its_range_is_refused():
    with pytest.raises(InvalidAudit, match="must lie in"):
        tpr_at(np.zeros(3), np.zeros(3), 1.0)
