"""The audit of regressions, and its verdict on models whose truth is known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.svm import SVC
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.audit import examine
from palimpsest.audit.attacks.anamnesis import Anamnesis
from palimpsest.audit.attacks.knowledge import Watched, plain_right
from palimpsest.audit.regression import RegressionErrors, in_forgotten_range, js, wasserstein
from palimpsest.core.auditing import AUDITS
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter, InvalidLabels
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.models import build_model
from palimpsest.tasks.regression import Regression
from tests.audit import planted
from tests.forget.measuring import fingerprint

ALL = ["regression", "anamnesis", "quantization", "pruning", "benign-finetuning", "representation", "cost"]


class Answers(nn.Module):
    """Answers with what is written in a column of its input."""

    def __init__(self, column: int):
        super().__init__()
        self.column, self.unit = column, nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x[:, self.column : self.column + 1] * self.unit


def written(columns, target, parts=(10, 20, 10, 10)):
    """Evidence of models that answer as written: columns original, unlearned and controls, [records, models]."""
    x, y = torch.tensor(columns, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)
    records = pal.Records(TensorDataset(x, y))
    edges = np.cumsum([0, *parts])
    cut = [records.select(range(a, b)) for a, b in pairwise(edges)]
    models = [Answers(column) for column in range(x.shape[1])]
    return Evidence(
        models[1], pal.ForgetSplit(*cut), Regression(loss="mae"), pal.Runtime(), models[0], models[2:]
    )


# Distances


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=20), st.integers(0, 2**16))
def test_the_wasserstein_distance_is_the_mean_gap_of_sorted_values(values, seed):
    one = np.array(values)
    other = np.random.default_rng(seed).normal(size=len(one))
    expected = np.abs(np.sort(one) - np.sort(other)).mean()
    assert wasserstein(one[:, None], other[:, None]) == pytest.approx(expected, abs=1e-9)
    both = wasserstein(np.stack([one, one], 1), np.stack([other, one], 1))
    assert both == pytest.approx(expected / 2, abs=1e-9)


def test_the_divergence_of_histograms_runs_from_zero_to_ln_two():
    a, b = np.linspace(0, 1, 50)[:, None], np.linspace(8, 9, 50)[:, None]
    assert js(a, a, 10) == 0 and js(a, b, 10) == pytest.approx(math.log(2))
    assert 0 < js(a, a + 0.3, 10) < math.log(2) and js(a * 0, a * 0, 10) == 0
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    m = (p + q) / 2
    expected = 0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum()
    assert js(np.array([[0.0], [1]] * 2), np.array([[0.0], [1], [1], [1]]), 2) == pytest.approx(expected)


# Errors and membership, by hand


def test_errors_and_skills_are_what_a_reader_would_compute():
    random = np.random.default_rng(0)
    y = np.concatenate([np.linspace(0, 9, 10), random.uniform(20, 60, 40)])
    off = np.stack([0.1 * np.ones(50), 2 * np.ones(50), 9 * np.ones(50), 11 * np.ones(50)], 1)
    evidence = written(y[:, None] + off, y)
    found = {f.name: f for f in RegressionErrors().run(evidence).findings}
    forget = found["forget_mae"]
    assert forget.value == pytest.approx(2, abs=1e-4) and forget.original == pytest.approx(0.1, abs=1e-4)
    assert forget.controls == pytest.approx((9, 11), abs=1e-4)
    assert forget.k == pytest.approx((2 - 10) / (0.1 - 10), abs=1e-3) and forget.bears == "outputs"
    train = y[:30]
    unit = np.abs(train - np.median(train)).mean()
    assert found["test_skill"].value == pytest.approx(1 - 2 / unit, abs=1e-4)
    assert found["test_skill"].bears == found["retain_skill"].bears == "utility"
    assert found["w1_to_retrained"].value == pytest.approx(8, abs=1e-4)
    assert found["w1_to_retrained"].controls == pytest.approx((2,), abs=1e-4)
    assert found["gap_to_retrained"].original == pytest.approx(9.9, abs=1e-4)
    assert found["to_original"].value == pytest.approx(-1.9, abs=1e-4)
    assert found["max_change"].value == pytest.approx(1.9, abs=1e-4)


def test_test_records_of_a_forgotten_range_count_as_forgetting():
    y = np.concatenate(
        [np.linspace(0, 9, 10), np.linspace(20, 60, 20), [5.0, 8.5, *np.linspace(15, 60, 8)], [3.0] * 10]
    )
    error = np.zeros((50, 4))
    error[30:32, 1] = 4.0
    evidence = written(y[:, None] + error, y)
    assert in_forgotten_range(evidence, "test").tolist() == [True, True, *[False] * 8]
    found = {f.name: f for f in RegressionErrors().run(evidence).findings}
    assert found["forget_test_mae"].value == pytest.approx(4) and found["forget_test_mae"].n == 2
    assert found["test_mae"].value == 0 and found["test_mae"].n == 8
    assert "of the loss" in found["membership_auc"].note and "10 non-members" in found["membership_auc"].note
    y[29] = 4.5  # a retained record within the range: it was not emptied
    whole = written(y[:, None] + error, y)
    assert not in_forgotten_range(whole, "test").any()
    assert "forget_test_mae" not in {f.name for f in RegressionErrors().run(whole).findings}


def test_membership_is_the_published_support_vector_machine_on_the_error():
    random = np.random.default_rng(1)
    y = random.uniform(0, 10, 400)
    error = np.abs(random.normal(0, 2, (400, 3)))
    error[:200, 0] *= 0.05  # the original knows its training records by heart
    evidence = written(y[:, None] + error, y, (50, 150, 150, 50))
    found = {f.name: f for f in RegressionErrors().run(evidence).findings}
    membership = found["membership"]
    order = evidence.runtime.numpy("regression", "membership")
    train, test = order.permutation(200)[:150], order.permutation(150)[:150]
    shares = []
    for column in range(3):
        e = np.abs((y + error[:, column]).astype(np.float32).astype(np.float64) - y.astype(np.float32))[
            :, None
        ]
        machine = SVC(C=3, kernel="rbf", gamma="auto").fit(
            np.concatenate([e[:200][train], e[200:350][test]]), [1] * 150 + [0] * 150
        )
        shares.append(machine.predict(e[:50]).mean())
    assert membership.original == pytest.approx(shares[0], abs=0.03) and membership.original > 0.9
    assert membership.value == pytest.approx(shares[1], abs=0.03)
    assert membership.controls[0] == pytest.approx(shares[2], abs=0.03)
    auc = found["membership_auc"]
    assert auc.original > 0.9 and abs(auc.value - 0.5) < 0.15


def test_several_targets_with_units_of_their_own():
    random = np.random.default_rng(2)
    y = np.stack([random.uniform(0, 10, 50), random.uniform(0, 1000, 50)], 1)

    class Two(nn.Module):
        def __init__(self, off):
            super().__init__()
            self.off = nn.Parameter(torch.tensor(off))

        def forward(self, x):
            return x + self.off

    x = torch.tensor(y, dtype=torch.float32)
    records = pal.Records(TensorDataset(x, x.clone()))
    parts = [records.select(range(a, b)) for a, b in ((0, 10), (10, 30), (30, 40), (40, 50))]
    models = [Two([1.0, 0.0]), Two([0.0, 100.0]), Two([2.0, 200.0])]
    evidence = Evidence(
        models[1], pal.ForgetSplit(*parts), Regression(), pal.Runtime(), models[0], models[2:]
    )
    found = {f.name: f for f in RegressionErrors().run(evidence).findings}
    assert found["forget_mae"].value == pytest.approx(50, abs=1e-3)
    unit = np.abs(y[:30] - np.median(y[:30], 0)).mean(0)
    assert found["retain_skill"].value == pytest.approx(1 - 0.5 * 100 / unit[1], abs=1e-3)
    assert found["w1_to_retrained"].value == pytest.approx((2 + 100) / 2, abs=1e-3)


def test_constant_targets_give_errors_but_no_skill():
    y = np.full(50, 3.0)
    report = examine(written(y[:, None] + np.zeros((50, 4)) + [0.0, 1, 2, 2], y), ["regression"])
    assert report.finding("regression.test_skill").judgement == Judgement.NOT_RUN
    assert report.finding("regression.retain_mae").value == pytest.approx(1)


def test_what_is_missing_is_said():
    y = np.random.default_rng(0).uniform(0, 9, 50)
    full = written(y[:, None] + [[0.0, 1.0, 2.0]], y)
    split = pal.ForgetSplit(full.split.forget)
    found = {f.name: f for f in RegressionErrors().run(Evidence(full.unlearned, split, full.task)).findings}
    for name in ("membership", "membership_auc", "to_original"):
        assert found[name].judgement == Judgement.NOT_RUN and found[name].note
    assert "w1_to_retrained" not in found and found["forget_mae"].k is None
    for settings in ({"published": 1}, {"bins": 1}):
        with pytest.raises(InvalidAudit):
            RegressionErrors(**settings)


# Answers within the tolerance, for attacks


def test_an_answer_is_right_within_the_tolerance_in_units_of_the_scale():
    task = Regression(center=10.0, scale=4.0, tolerance=0.25)
    outputs, wanted = (
        torch.tensor([[0.0], [0.2], [0.3], [math.nan]]),
        torch.tensor([[10.9], [10.0], [10.0], [10.0]]),
    )
    margin = task.margin(outputs, wanted)
    assert (margin >= 0).tolist() == [True, True, False, False]
    assert margin[1].item() == pytest.approx(1 - 0.2 / 0.25, abs=1e-5)
    y = np.linspace(0, 9, 50)
    evidence = written(y[:, None] + [[0.1, 0.6, 0.4]], y)
    evidence.task = Regression()
    watched = Watched.part(evidence, "forget")
    for role, right in (("original", True), ("unlearned", False), ("control 0", True)):
        assert (watched.right(evidence.model(role)) == right).all()
        assert (plain_right(evidence, role) == right).all()
    right, confidence = watched.measure(evidence.unlearned)
    assert not right.any() and confidence == pytest.approx(1 - 0.6 / 0.5, abs=1e-4)


# Models whose truth is known


@pytest.fixture(scope="module", params=[pytest.param("auto-mpg", marks=pytest.mark.slow), "diabetes"])
def tables(request):
    if request.param == "auto-mpg":
        pytest.importorskip("mlxtend")
    records = pal.load_data(request.param)
    parts = pal.split(records, pal.by_column("quarter", 1), seed=0)
    task = Regression(standardise=True).fitted(parts.train)
    network = build_model("mlp", tuple(records[0]["input"].shape), 1, seed=0, width=32)
    model = pal.train(network, parts.train, task, epochs=30, seed=0, batch_size=32, lr=2e-3)
    *controls, further = [pal.forget(model, parts, "retrain", task, seed=100 + k) for k in range(4)]
    return Evidence(model, parts, task, pal.Runtime(threads=1), model, controls), further


class Mean(nn.Module):
    """The mean of the answers of several models."""

    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x):
        return torch.stack([model(x) for model in self.models]).mean(0)


class Beyond(nn.Module):
    """A retrained model that answers the forget records worse than any retrained model would."""

    def __init__(self, inner, inputs, off):
        super().__init__()
        self.inner, self.inputs, self.off = inner, inputs, off

    def forward(self, x):
        known = (torch.cdist(x.flatten(1), self.inputs.flatten(1)) < 1e-6).any(1)
        return self.inner(x) + self.off * known[:, None]


def test_the_verdict_on_models_whose_truth_is_known(tables):
    evidence, retrained = tables
    model, forget = evidence.original, evidence.split.forget
    truth = {
        "removed": retrained,
        "intact": model,
        "damaged": planted.noisy(model, 0.5),
        "over-forgotten": Beyond(retrained, forget.tensors["input"], 4.0),
    }
    for expected, judged in truth.items():
        report = examine(evidence.judging(judged), ALL)
        assert report.verdict == expected, (expected, report.verdict, report.reasons)
    same = examine(evidence.judging(planted.noisy(model, 1e-5)), ALL)
    assert same.verdict == "intact"


@pytest.mark.parametrize("tables", ["diabetes"], indirect=True)
def test_a_change_that_nobody_notices_leaves_the_errors_where_the_original_has_them(tables):
    evidence, _ = tables
    report = examine(evidence.judging(planted.noisy(evidence.original, 1e-5)), ["regression"])
    assert report.finding("regression.forget_mae").k == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("tables", ["diabetes"], indirect=True)
def test_halfway_is_incomplete_and_the_methods_lie_in_between(tables):
    evidence, _ = tables
    halfway = Mean(evidence.original, evidence.controls[0])
    report = examine(evidence.judging(halfway), ["regression"])
    assert report.verdict == "incomplete", report.reasons
    settings = {"epochs": 3, "batch_size": 64}
    blindspot = pal.forget(evidence.original, evidence.split, "blindspot", evidence.task, **settings)
    tuned = pal.forget(evidence.original, evidence.split, "finetune", evidence.task, epochs=1, lr=1e-3)
    mine, other = (examine(evidence.judging(m), ["regression"]) for m in (blindspot, tuned))
    assert mine.finding("regression.forget_mae").k < other.finding("regression.forget_mae").k
    assert other.verdict in ("intact", "incomplete")


def test_a_random_request_is_judged_by_lineage_where_outputs_do_not_tell(tables):
    evidence, _ = tables
    records = evidence.split.train
    parts = pal.split(records, pal.by_fraction(0.15, seed=1), test=0.2, holdout=0.2, seed=1)
    task = evidence.task
    network = build_model("mlp", tuple(records[0]["input"].shape), 1, seed=1, width=32)
    model = pal.train(network, parts.train, task, epochs=20, seed=1, batch_size=32)
    *controls, further = [pal.forget(model, parts, "retrain", task, seed=50 + k) for k in range(4)]
    whole = Evidence(model, parts, task, pal.Runtime(threads=1), model, controls)
    assert examine(whole, ["regression"]).verdict == "intact"
    assert examine(whole.judging(further), ["regression"]).verdict in ("removed", "inconclusive")
    nearly = examine(whole.judging(planted.noisy(model, 1e-4)), ["regression"])
    assert nearly.verdict in ("intact", "inconclusive"), nearly.reasons
    near = nearly.finding("regression.to_original")
    assert abs(near.value) < 0.05 * abs(near.control)


def test_all_default_audits_run_or_say_why_and_the_report_is_written(tables, tmp_path):
    evidence, retrained = tables
    report = examine(evidence.judging(retrained), facts={"label": "retrained again"})
    why = {f.audit: f.note for f in report.findings if f.judgement == Judgement.NOT_RUN and f.name == "audit"}
    ran = {f.audit for f in report.findings if f.value is not None}
    assert set(ALL) | {"relearning", "interpolation", "unwrapping"} <= ran
    undefined = {"utility", "membership", "distance", "probe", "separation", "side-effects", "privacy-score"}
    assert undefined <= {name for name, note in why.items() if note == "not defined for regression"}
    assert ran | set(why) == set(AUDITS.names())
    assert "not classes" in report.finding("representation.forget_neighbours").note
    page = report.save(tmp_path / "report.html").read_text()
    assert "mean absolute error on the forget records" in page and "not defined for regression" in page
    assert report.save(tmp_path / "report.json").stat().st_size > 1000
    again = type(report).from_dict(report.to_dict())
    assert again.verdict == report.verdict == "removed"
    assert report.save(tmp_path / "report.csv").read_text().count("regression.") == 0
    frame = report.to_frame()
    assert {"forget_mae", "w1_to_retrained", "membership"} <= set(
        frame[frame["audit"] == "regression"]["name"]
    )


def test_audits_of_classes_are_not_run_on_numbers_nor_this_one_on_classes(
    digits_model, class_request, digits_task
):
    report = pal.audit(
        digits_model, class_request, digits_task, digits_model, audits=["regression", "anamnesis"]
    )
    assert {f.note for f in report.findings if f.audit in ("regression", "anamnesis")} == {
        "not defined for classification"
    }


def test_targets_given_as_classes_are_refused_before_any_work():
    records = pal.Records(TensorDataset(torch.randn(30, 3), torch.arange(30) % 3))
    parts = pal.split(records, pal.by_column("label", 1), seed=0)
    model = nn.Linear(3, 1)
    with pytest.raises(InvalidLabels, match="Classification"):
        pal.audit(model, parts, Regression(), model)


# Anamnesis


def test_anamnesis_counts_steps_against_the_retrained_models(tables):
    evidence, retrained = tables
    before = {role: fingerprint(evidence.model(role)) for role in evidence.roles}
    audit = Anamnesis(batch_size=16, lr=2e-4)
    outcome = {f.name: f for f in audit.run(evidence.judging(retrained)).findings}
    steps, index = outcome["steps"], outcome["index"]
    assert steps.original == 0 and all(count > 0 for count in steps.controls) and steps.value > 0
    assert index.value == pytest.approx(steps.value / np.mean(steps.controls)) and index.original == 0
    assert steps.k is None or steps.k == pytest.approx(1 - index.value)
    untouched = {f.name: f.value for f in audit.run(evidence.judging(evidence.original)).findings}
    assert untouched == {"steps": 0, "index": 0}
    assert {role: fingerprint(evidence.model(role)) for role in evidence.roles} == before


def test_anamnesis_stops_at_its_budget_and_needs_the_original(tables):
    evidence, retrained = tables
    never = Anamnesis(epochs=1, lr=1e-9, batch_size=32)
    steps, index = never.run(evidence.judging(retrained)).findings
    most = -(-len(evidence.split.train) // 32)
    assert steps.value == most and f"not reached within {most}" in steps.note and index.value == 1
    without = Evidence(retrained, evidence.split, evidence.task, controls=evidence.controls)
    [finding] = never.run(without).findings
    assert finding.judgement == Judgement.NOT_RUN and "original" in finding.note
    for settings in ({"lr": 0.0}, {"batch_size": 1}, {"epochs": 0}, {"margin": -1.0}, {"limit": 0}):
        with pytest.raises(InvalidHyperparameter):
            Anamnesis(**settings)
