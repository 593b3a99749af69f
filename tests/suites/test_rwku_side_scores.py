"""Side scores of RWKU: exposure of fragments, F1, fluency."""

from __future__ import annotations

import math

import pytest
import torch

from palimpsest.audit.membership import language_signals as signals
from palimpsest.core.errors import InvalidAudit, InvalidRecords
from palimpsest.suites import rwku_side_scores as side


def test_exposure_is_printed_as_minus_100_times_the_log_likelihood():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 14, 6), torch.randint(6, (3, 14))
    scores, mask = signals.label_log_probabilities(logits, labels)
    standard, _ = signals.standardised_label_scores(logits, labels)
    found = side.exposure(scores, standard, mask, ["a", "b", "c"])
    assert found.loss == pytest.approx(float(scores.mean()), rel=1e-5)
    assert found.printed == -100 * found.loss > 0
    with pytest.raises(InvalidAudit, match="fewer than 10"):
        side.exposure(scores[:, :9], standard[:, :9], mask[:, :9], ["a", "b", "c"])
    with pytest.raises(InvalidAudit, match="NaN"):
        side.exposure(scores * math.nan, standard, mask, ["a", "b", "c"])


def test_f1_counts_words_and_takes_the_best_reference():
    assert side.token_f1("It was in Paris, France", ["Paris"]) == pytest.approx(1 / 3)
    assert side.token_f1("paris paris", ["Paris", "paris, Paris!"]) == 1
    assert side.token_f1("", [""]) == 1
    assert side.token_f1("the", ["Paris"]) == 0
    with pytest.raises(InvalidRecords, match="without a reference"):
        side.token_f1("x", [])


def test_fluency_falls_with_repetition():
    varied = "one two three four five six seven eight"
    mean, (high, low) = side.mean_fluency([varied, "go go go go go go go go"])
    assert low == 0 and mean == pytest.approx(high / 2)
    assert high == pytest.approx((2 / 3 * math.log2(7) + 4 / 3 * math.log2(6)) / 2)
    assert side.treebank_words("He didn't, no.") == ["He", "did", "n't", ",", "no", "."]
    with pytest.raises(InvalidRecords, match="no text"):
        side.mean_fluency([])
