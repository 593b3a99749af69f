from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

import palimpsest as pal
from palimpsest.audit.side_effects import (
    SideEffects,
    detector_scores,
    mcnemar,
    paired_placements,
    worst_loss,
)
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Judgement
from tests.audit import planted

LABEL = 3


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20))
def test_mcnemar_is_the_exact_test_of_a_fair_coin(lost, won, both):
    before = np.array([True] * lost + [False] * won + [True] * both, bool)
    after = np.array([False] * lost + [True] * won + [True] * both, bool)
    n, least = lost + won, min(lost, won)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    assert mcnemar(before, after) == pytest.approx(min(1.0, 2 * tail) if lost != won else 1.0)


def test_the_worst_class_is_tested_as_one_of_all():
    labels = np.repeat([0, 1, 2], 20)
    before, after = np.ones(60, bool), np.ones(60, bool)
    after[40:48], after[0] = False, False
    worst, change, p = worst_loss(before, after, labels)
    assert (worst, change) == (2, pytest.approx(-0.4)) and p == pytest.approx(3 * 2 * 0.5**8)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40))
def test_placements_of_paired_scores_average_to_the_auc(pairs):
    positive, negative = np.array(pairs, float).T
    truth = np.repeat([1, 0], len(pairs))
    auc = roc_auc_score(truth, np.concatenate([positive, negative]))
    assert paired_placements(positive, negative).mean() == pytest.approx(auc)


def test_the_spread_of_placements_is_the_standard_error_of_the_auc_over_items():
    random = np.random.default_rng(0)

    def draw():
        item = random.normal(size=80)  # what is common to both scores of an item
        return item + random.normal(0.5, 0.5, 80), item + random.normal(0, 0.5, 80)

    found = [paired_placements(*draw()) for _ in range(400)]
    spread = np.std([values.mean() for values in found])
    assert np.mean([values.std(ddof=1) / math.sqrt(80) for values in found]) == pytest.approx(
        spread, rel=0.15
    )


def test_a_detector_tells_shifted_outputs_apart_and_not_the_same_or_like_ones():
    random = np.random.default_rng(1)
    own, folds = random.normal(size=(100, 3)), random.permutation(100) % 5

    def auc(other):
        return paired_placements(*detector_scores(own, other, folds)).mean()

    assert auc(own) == 0.5
    assert auc(own - [5.0, 0, 0]) > 0.98
    assert 0.3 < auc(random.normal(size=(100, 3))) < 0.7


def test_an_item_is_scored_by_a_detector_that_did_not_see_it():
    """With noise in many columns a detector that saw the items would tell all apart."""
    random = np.random.default_rng(2)
    own, other = random.normal(size=(2, 40, 60))
    assert paired_placements(*detector_scores(own, other, np.arange(40) % 5)).mean() < 0.75


@pytest.fixture(scope="module")
def evidence(class_request, digits_task, digits_model, class_controls):
    evidence = Evidence(
        digits_model, class_request, digits_task, pal.Runtime(), digits_model, class_controls[:2]
    )
    SideEffects().run(evidence)
    return evidence


def run(evidence: Evidence, model: nn.Module) -> dict[str, Finding]:
    return measured(evidence.judging(model))


def measured(evidence: Evidence) -> dict[str, Finding]:
    findings = SideEffects().run(evidence).findings
    for finding in findings:
        numbers = (finding.value, finding.low, finding.high, finding.original, *finding.controls)
        assert all(number is None or math.isfinite(number) for number in numbers), finding
        assert finding.value is None or finding.n > 0
        assert finding.bears == ""
    found = {finding.name: finding for finding in findings}
    assert len(found) == len(findings)
    return found


def bad(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.judgement == Judgement.BAD}


def test_the_untouched_model_has_no_side_effects_but_is_told_from_retraining(evidence, digits_model):
    found = run(evidence, digits_model)
    assert found["retain_accuracy_change"].value == found["worst_class_drop"].value == 0
    assert found["retain_membership_auc"].value == found["retain_membership_auc"].original
    assert found["detectability_auc"].value > 0.95
    assert bad(found) <= {"detectability_auc"}


def test_a_retrained_model_has_no_bad_side_effects(evidence, class_controls):
    assert bad(run(evidence, class_controls[2])) == set()


def test_a_broken_model_lost_accuracy_and_classes(evidence, digits_model):
    found = run(evidence, planted.noisy(digits_model, 0.3))
    assert {"retain_accuracy_change", "test_accuracy_change", "worst_class_drop"} <= bad(found)
    assert found["retain_accuracy_against_retrained"].value < -0.3


def test_a_lost_class_is_named(evidence, digits_model):
    found = run(evidence, planted.head_masked(digits_model, 5))
    assert "worst_class_drop" in bad(found) and found["worst_class_drop"].note.startswith("class 5")
    assert found["worst_class_drop"].value < -0.9
    tested = [evidence.split.retain, evidence.split.test]
    assert found["worst_class_drop"].n == sum((part.column("label") == 5).sum() for part in tested)


def test_the_forgotten_class_itself_is_no_side_effect(evidence, digits_model):
    found = run(evidence, planted.head_masked(digits_model, LABEL))
    assert bad(found) <= {"detectability_auc"}
    kept = evidence.split.test.column("label") != LABEL
    assert found["test_accuracy_change"].n == kept.sum()


def test_changes_are_those_of_the_accuracies(evidence, class_controls, digits_model):
    found = run(evidence, class_controls[2])
    records = evidence.split.retain.tensors

    def accuracy(model):
        with torch.no_grad():
            return (model.eval()(records["input"]).argmax(1) == records["label"]).double().mean().item()

    retrained = [accuracy(control) for control in class_controls]
    change = found["retain_accuracy_change"]
    assert change.value == pytest.approx(retrained[2] - accuracy(digits_model))
    assert change.controls == pytest.approx([value - accuracy(digits_model) for value in retrained[:2]])
    assert change.low <= change.value <= change.high
    against = found["retain_accuracy_against_retrained"]
    assert against.value == pytest.approx(retrained[2] - np.mean(retrained[:2]))
    assert against.original == pytest.approx(accuracy(digits_model) - np.mean(retrained[:2]))


class Memory(nn.Module):
    """A model that is surer of the records that it remembers."""

    def __init__(self, model: nn.Module, remembered: torch.Tensor):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.known = {row.tobytes() for row in remembered.flatten(1).numpy()}

    def forward(self, x):
        known = torch.tensor([row.tobytes() in self.known for row in x.flatten(1).numpy()])
        return self.model(x) * torch.where(known, 3.0, 0.5)[:, None]


def test_retained_records_that_became_recognisable_are_harm(evidence, digits_model):
    found = run(evidence, Memory(digits_model, evidence.split.retain.tensors["input"]))
    assert found["retain_membership_auc"].value > 0.8 and "retain_membership_auc" in bad(found)
    assert found["retain_membership_auc"].original < 0.65


def test_membership_is_the_auc_of_the_losses_without_the_forgotten_class(evidence, digits_model):
    def losses(records):
        data = records.select(records.column("label") != LABEL).tensors
        with torch.no_grad():
            return F.cross_entropy(
                digits_model.eval()(data["input"]), data["label"], reduction="none"
            ).numpy()

    member, other = losses(evidence.split.retain), losses(evidence.split.holdout)
    truth = np.repeat([1, 0], [len(member), len(other)])
    expected = roc_auc_score(truth, -np.concatenate([member, other]))
    assert run(evidence, digits_model)["retain_membership_auc"].value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("value", [-1e9, float("-inf")])
def test_masked_outputs_are_detected_and_finite(evidence, digits_model, value):
    found = run(evidence, planted.MaskedOutput(digits_model, LABEL, value))
    assert found["detectability_auc"].value > 0.9


def test_what_is_missing_is_said(class_request, digits_task, digits_model, class_controls):
    alone = measured(Evidence(digits_model, class_request, digits_task))
    assert {name for name, finding in alone.items() if finding.value is not None} == {"retain_membership_auc"}
    assert "original model is not at hand" in alone["worst_class_drop"].note
    assert "no retrained model" in alone["detectability_auc"].note
    bare = measured(
        Evidence(digits_model, pal.ForgetSplit(class_request.forget), digits_task, original=digits_model)
    )
    assert bare["retain_membership_auc"].note == "there are no retain and holdout records to compare"
    assert set(bare) == {"retain_membership_auc", "detectability_auc"}
    single = measured(
        Evidence(digits_model, class_request, digits_task, pal.Runtime(), digits_model, class_controls[:1])
    )
    assert single["detectability_auc"].controls == () and bad(single) == set()


def test_too_few_forget_records_cannot_be_detected(digits, digits_task, digits_model, class_controls):
    parts = pal.split(digits, pal.by_ids(digits.ids[:9]), seed=0)
    found = measured(Evidence(digits_model, parts, digits_task, controls=class_controls[:1]))
    assert "only 9 records" in found["detectability_auc"].note


def test_random_forgetting_is_measured_too(random_request, digits_task, digits_model, random_controls):
    evidence = Evidence(
        random_controls[2], random_request, digits_task, pal.Runtime(), digits_model, random_controls[:2]
    )
    assert bad(measured(evidence)) == set()


def test_the_same_seed_gives_the_same_findings(evidence, class_controls):
    assert run(evidence, class_controls[2]) == run(evidence, class_controls[2])
