"""The privacy leak: orientation, intervals, what is not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from palimpsest.audit.membership import privacy_leak as leak
from palimpsest.core.errors import InvalidAudit

SIGNALS = st.lists(st.integers(0, 12).map(float), min_size=2, max_size=12)


@given(SIGNALS, SIGNALS)
def test_the_area_is_the_chance_that_a_holdout_document_looks_more_like_a_member(forget, holdout):
    wins = [(h < f) + 0.5 * (h == f) for h in holdout for f in forget]
    found = leak.privacy_auc(np.array(forget), np.array(holdout))
    assert found == pytest.approx(np.mean(wins))
    labels = [0] * len(forget) + [1] * len(holdout)
    scores = [*forget, *holdout]
    assert found == pytest.approx(roc_auc_score(labels, [-score for score in scores]))
    other = leak.privacy_auc(np.array(forget), np.array(holdout), "open-unlearning")
    assert other == pytest.approx(roc_auc_score(labels, scores))


def test_the_untouched_target_is_near_minus_100_and_over_unlearning_is_positive():
    random = np.random.default_rng(0)
    holdout = random.normal(3, 0.3, 40)
    retrained = (random.normal(3, 0.3, 40), holdout)
    target = leak.measure_privacy_leak((random.normal(0.1, 0.05, 40), holdout), retrained)
    over = leak.measure_privacy_leak((random.normal(9, 0.3, 40), holdout), retrained)
    itself = leak.measure_privacy_leak(retrained, retrained)
    assert target.percent == pytest.approx(-100)
    assert over.percent > 40
    assert itself.percent == 0 and itself.fair
    assert target.low <= target.auc <= target.high


@given(st.floats(0, 1), st.floats(0.05, 0.95))
def test_both_orientations_give_the_same_figure(value: float, retrained: float):
    one = leak.privacy_leak(value, retrained)
    other = leak.privacy_leak(1 - value, 1 - retrained, "open-unlearning")
    assert one == pytest.approx(other, abs=1e-6)


def test_a_holdout_of_another_kind_is_noticed():
    random = np.random.default_rng(0)
    shifted = (random.normal(2, 0.3, 40), random.normal(3, 0.3, 40))
    assert not leak.measure_privacy_leak(shifted, shifted).fair


def test_what_is_not_defined_is_refused():
    two = np.array([1.0, 2.0])
    with pytest.raises(InvalidAudit, match="without a retrained model"):
        leak.measure_privacy_leak((two, two), None)
    with pytest.raises(InvalidAudit, match="without a retrained model"):
        leak.privacy_leak(0.3, None)
    with pytest.raises(InvalidAudit, match="is 0"):
        leak.privacy_leak(0.3, 0.0)
    with pytest.raises(InvalidAudit, match="is 0"):
        leak.privacy_leak(0.3, 1.0, "open-unlearning")
    with pytest.raises(InvalidAudit, match="2 or more holdout documents"):
        leak.privacy_auc(two, two[:1])
    with pytest.raises(InvalidAudit, match="signals of the forget documents are NaN"):
        leak.privacy_auc(np.array([1.0, math.nan]), two)
    with pytest.raises(InvalidAudit, match="orientation"):
        leak.privacy_auc(two, two, "member")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidAudit, match=r"\[0, 1\]"):
        leak.privacy_leak(50.0, 0.5)


def test_signals_are_low_for_members_and_short_documents_have_one_unless_as_released():
    scores = torch.tensor([[-0.1, -0.2, 0.0], [-3.0, -4.0, -5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert leak.privacy_signals(scores, mask).tolist() == pytest.approx([0.2, 5.0])
    released = leak.privacy_signals(scores, mask, as_released=True)
    assert math.isnan(released[0]) and released[1] == pytest.approx(5.0)
    with pytest.raises(InvalidAudit, match=r"\(0, 1\]"):
        leak.privacy_signals(scores, mask, k=40)
