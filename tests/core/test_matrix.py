from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from palimpsest.core.errors import InvalidAudit
from palimpsest.core.matrix import ScoreMatrix

STREAM = ScoreMatrix(np.array([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.8, 0.5, 0.6]]))


def test_average_is_the_mean_of_the_last_row():
    assert STREAM.average == pytest.approx((0.8 + 0.5 + 0.6) / 3)


def test_backward_transfer_leaves_the_last_item_out():
    assert STREAM.backward_transfer == pytest.approx(((0.8 - 0.9) + (0.5 - 0.8)) / 2)


def test_forward_transfer_reads_the_row_before_an_item_s_own_step():
    untrained = np.array([0.1, 0.1, 0.1])
    assert STREAM.forward_transfer(untrained) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)


def test_forgetting_is_measured_from_the_best_score_not_from_the_own_step():
    stream = ScoreMatrix(np.array([[0.5, 0.0, 0.0], [0.9, 0.8, 0.0], [0.6, 0.8, 0.7]]))
    assert stream.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.8)) / 2)
    assert stream.backward_transfer == pytest.approx(((0.6 - 0.5) + 0.0) / 2)


def test_re_emergence_is_the_largest_rise_since_an_item_s_own_step():
    knowledge = ScoreMatrix(np.array([[0.1, np.nan, np.nan], [np.nan, 0.0, np.nan], [0.4, 0.1, 0.0]]))
    assert knowledge.re_emergence == pytest.approx(0.3)
    assert np.isnan(ScoreMatrix(np.array([[1.0]])).re_emergence)


@given(arrays(float, st.integers(2, 6).map(lambda n: (n, n)), elements=st.floats(0, 1)))
def test_forgetting_is_never_below_the_loss_since_the_own_step(scores):
    stream = ScoreMatrix(scores)
    assert stream.forgetting >= -stream.backward_transfer - 1e-12


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((0, 0)), np.zeros((2, 3))])
def test_what_is_no_matrix_is_refused(scores):
    with pytest.raises(InvalidAudit, match="steps"):
        ScoreMatrix(scores)


def test_one_untrained_score_per_item_is_asked_for():
    with pytest.raises(InvalidAudit, match="3 untrained"):
        STREAM.forward_transfer(np.zeros(2))
