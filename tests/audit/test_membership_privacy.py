"""The worst-case privacy score and the audit built on it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import palimpsest as pal
from palimpsest.audit.membership.privacy_audit import PrivacyScore
from palimpsest.audit.membership.privacy_score import (
    bootstrap_privacy_scores,
    class_forgetting_accuracies,
    threshold_scan,
    worst_case_privacy_score,
)
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.finding import Judgement

logits = st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=6, max_size=6).map(
    torch.tensor
)


@given(logits, logits)
def test_the_score_lies_between_0_and_1_and_does_not_mind_the_order(one: torch.Tensor, two: torch.Tensor):
    score = worst_case_privacy_score(one, two)
    assert 0 <= score <= 1
    assert score == pytest.approx(worst_case_privacy_score(two, one))


@given(logits)
def test_a_model_cannot_be_told_from_itself(one: torch.Tensor):
    assert worst_case_privacy_score(one, one) == 1


def test_models_without_a_common_value_are_perfectly_told_apart():
    sure, unsure = torch.tensor([[30.0, 0.0, 0.0]] * 8), torch.zeros(8, 3)
    assert worst_case_privacy_score(sure, unsure) == 0


def test_a_scan_agrees_with_counting():
    random = np.random.default_rng(0)
    mine, theirs = random.uniform(-1, 3, 30), random.uniform(-1, 3, 30)
    for row in threshold_scan(mine, theirs, 11, (0.0, 2.5), "retrain"):
        fpr = (np.clip(mine, 0, 2.5) >= row.threshold).mean()
        fnr = (np.clip(theirs, 0, 2.5) < row.threshold).mean()
        assert (row.fpr, row.fnr) == pytest.approx((fpr, fnr))
        if 0 < fpr < 1 and 0 < fnr < 1:
            gap = min(math.log((1 - 1e-5 - fpr) / fnr), math.log((1 - 1e-5 - fnr) / fpr))
            assert row.attack_score == pytest.approx(1 - 2 ** -max(gap, 0))


def test_masked_and_saturated_outputs_are_scored():
    masked = torch.tensor([[-math.inf, 1.0, 0.0], [0.0, 400.0, -math.inf]])
    assert 0 <= worst_case_privacy_score(masked, torch.zeros(2, 3)) <= 1


def test_resampling_shows_the_spread_of_the_score():
    random = np.random.default_rng(0)
    scores, drawn = [], []
    for seed in range(60):
        torch.manual_seed(seed)
        one, two = torch.randn(80, 4) * 3, torch.randn(80, 4)
        scores.append(worst_case_privacy_score(one, two))
        drawn.append(np.std(bootstrap_privacy_scores(one, two, random, draws=60)))
    assert np.mean(drawn) == pytest.approx(np.std(scores), rel=0.35)


def test_unusable_input_is_refused():
    with pytest.raises(InvalidAudit, match="same records"):
        worst_case_privacy_score(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(InvalidAudit, match="at least one record"):
        threshold_scan(np.array([]), np.array([1.0]))
    with pytest.raises(InvalidAudit, match="finite"):
        threshold_scan(np.array([np.nan]), np.array([1.0]))
    with pytest.raises(InvalidAudit, match="direction"):
        threshold_scan(np.zeros(2), np.zeros(2), direction="sideways")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidAudit, match="2 or more thresholds"):
        threshold_scan(np.zeros(2), np.zeros(2), thresholds=1)
    with pytest.raises(InvalidAudit, match="at least 2"):
        PrivacyScore(thresholds=1)
    with pytest.raises(InvalidAudit, match="do not fit"):
        class_forgetting_accuracies(torch.ones(3), torch.ones(3), 3)


@pytest.fixture(scope="module")
def report(digits_model, class_request, class_controls, digits_task):
    return pal.audit(
        class_controls[0],
        class_request,
        digits_task,
        original=digits_model,
        retrained=class_controls[1:],
        audits=["privacy-score"],
    )


def test_a_second_retraining_is_nearer_to_retraining_than_the_original(report):
    score = report.finding("privacy-score.score")
    assert score.value >= score.original + 0.2
    assert score.original <= 0.65
    assert score.judgement == Judgement.AS_RETRAINED
    assert "51 thresholds" in score.note


def test_even_a_retraining_does_not_reach_1_against_another_seed(report):
    between = report.finding("privacy-score.score").controls
    assert len(between) == 2
    assert all(0.5 < value < 1 for value in between)


def test_the_untouched_model_is_at_k_1_and_detectable(
    digits_model, class_request, class_controls, digits_task
):
    report = pal.audit(
        digits_model,
        class_request,
        digits_task,
        original=digits_model,
        retrained=class_controls,
        audits=["privacy-score"],
    )
    for name in ("score", "detectability"):
        finding = report.finding(f"privacy-score.{name}")
        assert finding.k == 1
        assert finding.value == finding.original
        assert finding.judgement == Judgement.SEPARATED
        assert finding.bears == ""


def test_a_model_that_forgot_too_much_is_told_apart_as_well(
    digits_model, class_request, class_controls, digits_task
):
    # Ascent on the forget records alone, until nothing of the class is left and the rest suffers.
    model = copy.deepcopy(digits_model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batch = class_request.forget.batch(np.arange(len(class_request.forget)), digits_task.collate)
    for _ in range(15):
        optimizer.zero_grad()
        (-digits_task.loss_per_example(model, batch).mean()).backward()
        optimizer.step()
    model.eval()

    def accuracy(part: pal.Records) -> float:
        with torch.no_grad():
            data = part.batch(np.arange(len(part)), digits_task.collate)
            return float((digits_task.logits(model, data).argmax(1) == data["label"]).float().mean())

    assert accuracy(class_request.forget) <= 0.05
    assert accuracy(class_request.retain) < 0.94
    report = pal.audit(
        model,
        class_request,
        digits_task,
        original=digits_model,
        retrained=class_controls,
        audits=["privacy-score"],
    )
    score = report.finding("privacy-score.score")
    assert score.value < min(score.controls)
    assert score.judgement == Judgement.SEPARATED


def test_without_controls_there_is_no_score_and_with_one_no_scale(
    digits_model, class_request, class_controls, digits_task
):
    alone = pal.audit(digits_model, class_request, digits_task, audits=["privacy-score"])
    assert alone.finding("privacy-score.score").judgement == Judgement.NOT_RUN
    one = pal.audit(
        digits_model,
        class_request,
        digits_task,
        original=digits_model,
        retrained=class_controls[0],
        audits=["privacy-score"],
    ).finding("privacy-score.score")
    assert one.k is None and one.controls == ()
    assert "one control only" in one.note
    assert one.value == one.original
