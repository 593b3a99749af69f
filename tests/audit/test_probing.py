from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import palimpsest as pal
from palimpsest.audit.probing import RANDOM, Probe, neighbour_accuracy, read_linearly, seed_spread, view
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Judgement
from tests.audit import planted

LABEL = 1
"""Retrained networks see ones as parts of other digits: their features tell them apart least of all."""
PROBES = ("linear", "neighbours", "few_shot_linear", "few_shot_neighbours")


@pytest.fixture(scope="module")
def request_of_ones(digits):
    return pal.split(digits, pal.by_column("label", LABEL), seed=0)


@pytest.fixture(scope="module")
def retrained(digits_model, request_of_ones, digits_task):
    return [pal.forget(digits_model, request_of_ones, "retrain", digits_task, seed=k) for k in (11, 12, 13)]


@pytest.fixture(scope="module")
def evidence(request_of_ones, digits_task, digits_model, retrained):
    """The original was trained on the same records: test and holdout do not depend on the request."""
    evidence = Evidence(
        digits_model, request_of_ones, digits_task, pal.Runtime(), digits_model, retrained[:2]
    )
    Probe().run(evidence)
    return evidence


def run(evidence: Evidence, model: nn.Module, **settings) -> dict[str, Finding]:
    return measured(evidence.judging(model), **settings)


def measured(evidence: Evidence, **settings) -> dict[str, Finding]:
    findings = Probe(**settings).run(evidence).findings
    for finding in findings:
        numbers = (finding.value, finding.low, finding.high, finding.k, finding.original, *finding.controls)
        assert all(number is None or math.isfinite(number) for number in numbers), finding
        assert finding.value is None or finding.n > 0
    found = {finding.name: finding for finding in findings}
    assert len(found) == len(findings)
    return found


def test_a_linear_reader_separates_what_a_plane_separates_and_nothing_else():
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 6))
    y = (x @ [3.0, -2, 0, 0, 0, 1000e-3] > 0).astype(np.int64)
    assert (read_linearly(x[:300], y[:300], x[300:]) == y[300:]).mean() > 0.93
    assert (read_linearly(1000 * x[:300] + 7, y[:300], 1000 * x[300:] + 7) == y[300:]).mean() > 0.93
    noise = random.permutation(y)
    assert 0.3 < (read_linearly(x[:300], noise[:300], x[300:]) == noise[300:]).mean() < 0.7


def test_a_class_that_is_rare_among_the_examples_is_read_all_the_same():
    random = np.random.default_rng(1)
    x = np.concatenate([random.normal(0, 1, (500, 3)), random.normal(2.5, 1, (8, 3))])
    y = np.repeat([0, 1], [500, 8])
    assert (read_linearly(x, y, random.normal(2.5, 1, (200, 3))) == 1).mean() > 0.8


@pytest.mark.parametrize(
    "hide",
    [
        lambda model: planted.head_masked(model, LABEL),
        lambda model: planted.MaskedOutput(model, LABEL, float("-inf")),
        lambda model: planted.OutputFilter(model, LABEL),
    ],
    ids=["head masked", "output masked by a wrapper", "output filtered"],
)
def test_a_class_that_is_only_hidden_is_read_as_in_the_original(evidence, digits_model, hide):
    found = run(evidence, hide(digits_model))
    for name in PROBES:
        assert found[name].value == found[name].original
    for name in ("linear", "few_shot_linear", "few_shot_neighbours"):
        assert found[name].valid and found[name].k == 1 and found[name].bears == "inside"
        assert found[name].judgement == Judgement.SEPARATED


def test_a_retrained_model_reads_as_retrained(evidence, retrained):
    found = run(evidence, retrained[2])
    for name in PROBES:
        assert found[name].judgement in (Judgement.AS_RETRAINED, Judgement.INVALID)
        assert found[name].value < found[name].original - 0.05
    assert found["few_shot_linear"].valid and abs(found["few_shot_linear"].k) < 0.5


def test_the_accuracy_is_that_of_a_reader_fitted_by_hand(evidence, retrained, request_of_ones):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    def features(records):
        seen = []
        handle = retrained[2].head.register_forward_pre_hook(
            lambda _m, inputs: seen.append(inputs[0].double())
        )
        with torch.no_grad():
            retrained[2].eval()(records.tensors["input"])
        handle.remove()
        return seen[0].numpy(), records.tensors["label"].numpy()

    held, labels = features(request_of_ones.holdout)
    x, y = features(request_of_ones.retain)
    x, y = np.concatenate([x, held[labels == LABEL]]), np.concatenate([y, labels[labels == LABEL]])
    scaler = StandardScaler().fit(x)
    reader = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced").fit(scaler.transform(x), y)
    test, truth = features(request_of_ones.forget)
    accuracy = (reader.predict(scaler.transform(test)) == truth).mean()
    found = run(evidence, retrained[2])["linear"]
    assert found.value == pytest.approx(accuracy, abs=0.03) and found.n == len(truth)
    assert (
        found.note
        == f"fitted on {len(request_of_ones.retain)} retain, {(labels == LABEL).sum()} holdout records"
    )


class Lookup(nn.Module):
    """Features that say which record it is and nothing of its class."""

    def __init__(self, width: int = 40):
        super().__init__()
        self.hash, self.head = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(torch.sin(1e4 * self.hash(x.flatten(1))))


def test_readers_are_tested_on_records_that_they_were_not_fitted_on(evidence):
    """A leak would show as high accuracy of nearest neighbours on features that identify records."""
    torch.manual_seed(0)
    found = run(evidence, Lookup())
    for name in PROBES:
        assert found[name].value < 0.35, name
    assert abs(found["selectivity"].value) < 0.25


def test_selectivity_is_what_the_features_hold_beyond_what_a_reader_makes_of_anything(evidence, digits_model):
    found = run(evidence, digits_model)
    assert found["selectivity"].value > 0.5
    assert found["selectivity"].value <= found["linear"].value
    assert found["selectivity"].original == found["selectivity"].value and found["selectivity"].k is None


def test_more_shots_read_more(evidence, retrained):
    one, many = (run(evidence, retrained[2], shots=shots)["few_shot_linear"] for shots in (1, 30))
    assert one.value < many.value - 0.1
    assert one.n == many.n + 29


def test_few_shot_readers_get_so_many_records_of_every_class(evidence, request_of_ones):
    probe = Probe(shots=4, draws=3)
    draws = probe._few(evidence)
    assert len(draws) == 3 and len({tuple(draw["forget"]) for draw in draws}) == 3
    for draw in draws:
        labels = np.concatenate([evidence.labels(part)[where] for part, where in draw.items()])
        assert np.bincount(labels).tolist() == [4] * 10


def test_without_a_holdout_the_full_readers_are_not_run(
    request_of_ones, digits_task, digits_model, retrained
):
    parts = pal.ForgetSplit(request_of_ones.forget, request_of_ones.retain)
    found = measured(Evidence(retrained[2], parts, digits_task, pal.Runtime(), digits_model, retrained[:2]))
    for name in ("linear", "neighbours"):
        assert (
            found[name].judgement == Judgement.NOT_RUN
            and "no holdout with examples of class 1" in found[name].note
        )
    assert "selectivity" not in found and found["few_shot_linear"].value is not None


def test_a_forget_set_that_the_shots_use_up_is_not_run(digits, digits_task, digits_model, request_of_ones):
    forget = request_of_ones.forget.select(np.arange(6))
    parts = pal.ForgetSplit(forget, request_of_ones.retain, holdout=request_of_ones.holdout)
    found = measured(Evidence(digits_model, parts, digits_task))
    assert "Only 1 forget records are left" in found["few_shot_linear"].note
    assert found["linear"].n == 6


@pytest.mark.parametrize("controls", [0, 1])
def test_without_original_or_controls_there_are_plain_values(
    request_of_ones, digits_task, digits_model, retrained, controls
):
    found = measured(Evidence(digits_model, request_of_ones, digits_task, controls=retrained[:controls]))
    for name in PROBES:
        assert found[name].value > 0.7 and found[name].original is None
        assert found[name].k is None and len(found[name].controls) == controls


def test_random_forgetting_is_read_from_retained_records_alone(
    random_request, digits_task, digits_model, random_controls
):
    evidence = Evidence(
        random_controls[2], random_request, digits_task, pal.Runtime(), digits_model, random_controls[:2]
    )
    found = measured(evidence)
    assert found["linear"].value > 0.9 and "forget" not in found["few_shot_linear"].note
    assert found["linear"].n == found["few_shot_linear"].n == len(random_request.forget)
    for name in PROBES:
        assert found[name].judgement in (Judgement.AS_RETRAINED, Judgement.INVALID)


class Bare(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]


class Infinite(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[0, 0] = 1.0

    def forward(self, x):
        features = x.flatten(1).clone()
        features[:, 0] = float("inf")
        return self.head(features).nan_to_num(0.0)


@pytest.mark.parametrize(
    ("model", "reason"), [(Bare(), "no layer before its outputs"), (Infinite(), "NaN or Inf")]
)
def test_a_model_without_readable_features_is_not_run(evidence, model, reason):
    found = run(evidence, model)
    for name in PROBES:
        assert found[name].judgement == Judgement.NOT_RUN and reason in found[name].note


@pytest.mark.parametrize("wrong", [{"shots": 0}, {"draws": 0}, {"neighbours": 0}, {"most": 3}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidHyperparameter):
        Probe(**wrong)


def test_neighbours_of_training_records_are_read_on_features_and_on_outputs(evidence, digits_model):
    features = neighbour_accuracy(evidence, "original")
    outputs = neighbour_accuracy(evidence, "original", on_logits=True)
    assert features["retain"][0] > 0.9 and outputs["retain"][0] > 0.9
    assert features["forget"][1] == round(0.2 * len(evidence.records("forget")))
    fresh = neighbour_accuracy(evidence, RANDOM)
    assert 0.3 < fresh["retain"][0] < features["retain"][0] + 0.02
    masked = evidence.judging(planted.head_masked(digits_model, LABEL))
    assert neighbour_accuracy(masked, "unlearned") == features
    assert neighbour_accuracy(masked, "unlearned", on_logits=True) != outputs


def test_too_few_records_have_no_neighbours(request_of_ones, digits_task, digits_model):
    parts = pal.ForgetSplit(request_of_ones.forget)
    with pytest.raises(InvalidAudit, match="1 classes"):
        neighbour_accuracy(Evidence(digits_model, parts, digits_task), "unlearned")
    mixed = pal.ForgetSplit(request_of_ones.retain.select(np.arange(5)))
    with pytest.raises(InvalidAudit, match="4 records"):
        neighbour_accuracy(Evidence(digits_model, mixed, digits_task), "unlearned")


def test_outputs_at_minus_infinity_are_cut_to_a_number(evidence, digits_model):
    masked = evidence.judging(planted.MaskedOutput(digits_model, LABEL, float("-inf")))
    assert np.isfinite(view(masked, "unlearned", "forget", on_logits=True)).all()


def test_the_prior_spread_is_widest_in_the_middle():
    assert seed_spread([0.5], 0.1) == pytest.approx(0.05)
    assert 0 < seed_spread([1.0]) < seed_spread([0.9, 0.92]) < seed_spread([0.5])


def test_the_same_seed_gives_the_same_findings_and_models_stay_as_they_were(evidence, retrained):
    before = copy.deepcopy(retrained[2].state_dict())
    assert run(evidence, retrained[2]) == run(evidence, retrained[2])
    assert all(torch.equal(value, before[name]) for name, value in retrained[2].state_dict().items())
