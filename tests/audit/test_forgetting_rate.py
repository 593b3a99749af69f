from __future__ import annotations

import numpy as np
import pytest

from palimpsest.audit.membership.forgetting_rate import forgetting_rate
from palimpsest.core.errors import InvalidAudit


def probabilities(confidence, n, seed):
    """Outputs for two classes around a confidence in the first."""
    first = np.clip(np.random.default_rng(seed).normal(confidence, 0.02, n), 0, 1)
    return np.stack([first, 1 - first], 1)


def test_it_runs_from_nothing_forgotten_to_all_forgotten():
    member, nonmember = probabilities(0.95, 60, 0), probabilities(0.7, 40, 1)
    assert forgetting_rate(member, nonmember, member) <= 0.05
    assert forgetting_rate(member, nonmember, probabilities(0.1, 60, 2)) == 1.0
    half = np.concatenate([probabilities(0.95, 30, 3), probabilities(0.2, 30, 4)])
    assert forgetting_rate(member, nonmember, half) == pytest.approx(0.5, abs=0.05)


def test_a_larger_side_does_not_win_by_its_number():
    """Ninety members and ten others that cannot be told apart: the attack is no better than a coin."""
    rate = forgetting_rate(probabilities(0.8, 900, 0), probabilities(0.8, 100, 1), probabilities(0.8, 500, 2))
    assert 0.2 < rate < 0.8


def test_empty_sides_are_refused():
    member = probabilities(0.9, 5, 0)
    with pytest.raises(InvalidAudit, match="needs training and test"):
        forgetting_rate(member, member[:0], member)
