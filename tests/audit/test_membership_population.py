"""Population attacks: thresholds, support vectors, logistic regression; and who is compared with whom."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.audit.membership.matching import hardest, match
from palimpsest.audit.membership.population import (
    Labelled,
    class_threshold,
    crossfit,
    member_share,
    svc_attack,
    threshold_attack,
)
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.intervals import auc

values = st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=10).map(np.array)


@given(values, values)
def test_the_threshold_is_the_best_by_brute_force(members: np.ndarray, others: np.ndarray):
    def accuracy(value: float) -> float:
        return 0.5 * ((members >= value).mean() + (others < value).mean())

    best = max(accuracy(value) for value in [*members, *others])
    tied = [value for value in [*members, *others] if accuracy(value) > best - 1e-12]
    threshold = class_threshold(members, others)
    assert accuracy(threshold) == pytest.approx(best)
    assert threshold in tied  # equal rates may differ in the last bit, so that any of them is the first best


def test_each_class_has_its_own_threshold():
    shadow_in = Labelled(np.array([1.0, 1.1, 9.0, 9.1]), np.array([0, 0, 1, 1]))
    shadow_out = Labelled(np.array([0.0, 0.1, 8.0, 8.1]), np.array([0, 0, 1, 1]))
    targets_in = Labelled(np.array([1.05, 9.05]), np.array([0, 1]))
    targets_out = Labelled(np.array([0.05, 8.05]), np.array([0, 1]))
    assert threshold_attack(shadow_in, shadow_out, targets_in, targets_out) == (1.0, 1.0)


def test_a_class_without_shadow_scores_is_refused():
    one, two = Labelled(np.array([1.0]), np.array([0])), Labelled(np.array([1.0]), np.array([1]))
    with pytest.raises(InvalidAudit, match="scores on both sides"):
        threshold_attack(one, one, two, two)


def test_clusters_are_told_apart_by_the_published_attacks():
    random = np.random.default_rng(0)
    members, others = random.normal(2, 0.3, (80, 1)), random.normal(-2, 0.3, (80, 1))
    assert svc_attack(members, others, members) < 0.05
    assert svc_attack(members, others, others) > 0.95
    assert member_share(members, others, members) > 0.95
    assert member_share(members, others, others) < 0.05


def test_no_record_is_scored_by_a_fit_that_saw_it():
    # With more features than records a fit that saw them would reach an AUC of 1.
    found = []
    for seed in range(30):
        random = np.random.default_rng(seed)
        sides = random.normal(size=(40, 100)), random.normal(size=(40, 100))
        found.append(auc(*crossfit(*sides, random)))
    assert abs(np.mean(found) - 0.5) < 0.06


def test_a_signal_in_either_direction_is_found_by_the_logistic_attack():
    for shift in (1.5, -1.5):
        random = np.random.default_rng(0)
        sides = random.normal(shift, 1, (150, 3)), random.normal(0, 1, (60, 3))
        assert auc(*crossfit(*sides, random)) > 0.9


def test_records_of_a_group_share_a_fold():
    # The same record on both sides, told apart only by remembering it: that must not work.
    random = np.random.default_rng(0)
    same = random.normal(size=(60, 80))
    groups = np.arange(60), np.arange(60)
    members, others = crossfit(same, same, random, groups=groups)
    np.testing.assert_allclose(members, others)


def test_constant_features_do_no_harm():
    random = np.random.default_rng(0)
    features = np.column_stack([np.full(60, -103.6), random.normal(size=60)])
    members, others = crossfit(features[:30], features[30:], random)
    assert np.isfinite(members).all() and np.isfinite(others).all()
    flat = np.ones((20, 2))
    assert auc(*crossfit(flat, flat, random)) == 0.5


def test_unusable_features_are_refused():
    random = np.random.default_rng(0)
    good = random.normal(size=(10, 2))
    with pytest.raises(InvalidAudit, match="5 folds need as many records"):
        crossfit(good[:3], good, random)
    with pytest.raises(InvalidAudit, match="NaN or infinity"):
        crossfit(np.full((10, 2), np.nan), good, random)
    with pytest.raises(InvalidAudit, match="alike"):
        svc_attack(good, good[:, :1], good)
    with pytest.raises(InvalidAudit, match="both sides"):
        member_share(good[:0], good, good)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array),
    st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array),
)
def test_non_members_have_the_labels_of_the_members_in_proportion(mine: np.ndarray, theirs: np.ndarray):
    pair = match(mine, theirs, np.random.default_rng(0))
    kept, chosen = mine[pair.members], theirs[pair.others]
    assert set(kept) == set(chosen) == set(mine) & set(theirs)
    assert pair.dropped == (~np.isin(mine, theirs)).sum()
    assert len(set(pair.others.tolist())) == len(pair.others)
    if len(kept):
        ratio = min((theirs == c).sum() / (kept == c).sum() for c in set(kept))
        for label in set(kept):
            wanted = max(1.0, ratio * (kept == label).sum())
            assert wanted - 1 < (chosen == label).sum() <= wanted + 1e-6


def test_the_hardest_records_are_those_with_the_greatest_difficulty():
    assert hardest(np.array([0.1, 5.0, 0.2, 3.0]), 0.5).tolist() == [1, 3]
    assert hardest(np.array([0.1, 5.0]), 0.01).tolist() == [1]
