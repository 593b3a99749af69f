"""Signals of membership: closed forms, brute force, and outputs at the edge."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from palimpsest.audit.membership import signals
from palimpsest.core.errors import InvalidAudit, InvalidLabels

MASKED = torch.tensor([[2.0, -math.inf, 0.5], [-math.inf, 1.0, 1.0], [0.0, 300.0, -math.inf]])
LABELS = torch.tensor([1, 1, 1])


def test_the_loss_signal_is_minus_the_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 7).double() * 3, torch.randint(7, (50,))
    found = signals.member_signals(logits, labels)["loss"]
    torch.testing.assert_close(found, -F.cross_entropy(logits, labels, reduction="none"))


def test_scaled_confidence_of_a_saturated_output_does_not_cancel():
    phi = signals.scaled_confidence(torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([0]))
    assert phi.item() == pytest.approx(50 - math.log(2), rel=1e-9)


def test_the_margin_is_the_lead_over_the_strongest_rival():
    lead = signals.margin(torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, 1.0]]), torch.tensor([0, 2]))
    assert lead.tolist() == pytest.approx([0.5, -3.0])


def test_entropy_counts_impossible_classes_as_nothing():
    assert signals.entropy(torch.tensor([[1.0, 0.0, 0.0]])).item() == 0
    assert signals.entropy(torch.full((1, 4), 0.25)).item() == pytest.approx(math.log(4))


def test_modified_entropy_agrees_with_its_formula_record_by_record():
    torch.manual_seed(1)
    p, labels = torch.rand(20, 5).double().softmax(1), torch.randint(5, (20,))
    for row, label, found in zip(
        p.tolist(), labels.tolist(), signals.modified_entropy(p, labels), strict=True
    ):
        rest = sum(q * math.log(1 - q) for j, q in enumerate(row) if j != label)
        assert found.item() == pytest.approx(-(1 - row[label]) * math.log(row[label]) - rest)


def test_modified_entropy_is_nothing_for_a_sure_right_answer_and_large_for_a_sure_wrong_one():
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    right, wrong = signals.modified_entropy(p, torch.tensor([0, 0])).tolist()
    assert right == pytest.approx(0, abs=1e-12)
    assert wrong > 100


def test_the_released_modified_entropy_mixes_the_batch():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]]).double()
    alone = signals.modified_entropy_as_released(p[:1], torch.tensor([0]))
    together = signals.modified_entropy_as_released(p, torch.tensor([0, 1]))[0]
    expected = -(0.3 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    assert alone.item() == pytest.approx(expected)
    assert together.item() == pytest.approx(
        -(0.3 * math.log(0.7) + 0.8 * math.log(0.2) + 0.1 * math.log(0.1))
    )


@pytest.mark.parametrize("value", [-math.inf, -1e9])
def test_a_masked_class_gives_finite_signals(value: float):
    logits = torch.where(torch.isinf(MASKED), torch.tensor(value), MASKED)
    for name, scores in signals.member_signals(logits, LABELS).items():
        assert torch.isfinite(scores).all(), name


@given(st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=2, max_size=8))
def test_loss_confidence_and_probability_rank_alike(rows: list[list[float]]):
    found = signals.member_signals(torch.tensor(rows), torch.zeros(len(rows), dtype=torch.long))
    order = found["confidence"].argsort(stable=True)
    for name in ("loss", "probability"):
        assert (found[name][order].diff() >= -1e-12).all()


def test_rows_that_are_no_probabilities_are_refused():
    with pytest.raises(InvalidAudit, match=r"off by up to 0\.5"):
        signals.entropy(torch.tensor([[0.5, 1.0]]))
    with pytest.raises(InvalidAudit, match=r"smallest entry is -0\.5"):
        signals.modified_entropy(torch.tensor([[-0.5, 1.5]]), torch.tensor([0]))
    with pytest.raises(InvalidAudit, match="probabilities"):
        signals.entropy(torch.tensor([[math.nan, 0.5]]))
    with pytest.raises(InvalidAudit, match="records, classes"):
        signals.entropy(torch.empty(0, 3))


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused(label: int):
    with pytest.raises(InvalidLabels, match="classes 0 to 2"):
        signals.scaled_confidence(torch.zeros(1, 3), torch.tensor([label]))
    with pytest.raises(InvalidLabels, match="classes 0 to 2"):
        signals.modified_entropy(torch.full((1, 3), 1 / 3), torch.tensor([label]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_say_nothing_are_refused(bad: float):
    with pytest.raises(InvalidAudit, match="NaN, plus infinity"):
        signals.true_probability(torch.tensor([[bad, 0.0]]), torch.tensor([0]))
    with pytest.raises(InvalidAudit, match="rule out every class"):
        signals.true_probability(torch.tensor([[-math.inf, -math.inf]]), torch.tensor([0]))
    with pytest.raises(InvalidAudit, match="need logits"):
        signals.true_probability(torch.empty(0, 3), torch.empty(0, dtype=torch.long))
