import math

import pytest
import torch
from tests.forget.measuring import fingerprint, kept_and_gone
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import UNLEARNERS
from palimpsest.forget.classifier.lfssd import LFSSD
from palimpsest.parts.importance import Measure, measure_importance
from palimpsest.parts.importance_file import save_importance


def lfssd(model, request, task, **settings):
    return pal.forget(model, request, "lfssd", task, seed=0, **settings)


def with_labels(request, labels_of):
    """The same request on the same inputs, with other labels (or none, where `labels_of` gives None)."""

    def replaced(records, prefix):
        x = records.tensors["input"]
        labels = labels_of(records.tensors["label"])
        data = TensorDataset(x) if labels is None else TensorDataset(x, labels)
        return pal.Records(data, ids=[f"{prefix}{i}" for i in range(len(records))])

    return ForgetSplit(replaced(request.forget, "f"), replaced(request.retain, "r"))


@pytest.mark.parametrize(
    ("settings", "alphas"),
    [({"sensitivity": "per-sample"}, (2.0, 2.5, 3.0)), ({}, (9.0, 10.0, 12.0, 15.0))],
)
def test_some_alpha_removes_the_class_and_keeps_the_rest(
    settings, alphas, digits_model, class_request, digits_task
):
    before = kept_and_gone(digits_model, class_request)[0]
    found = [
        kept_and_gone(lfssd(digits_model, class_request, digits_task, alpha=a, **settings), class_request)
        for a in alphas
    ]
    assert any(gone <= 0.1 and kept >= before - 0.06 for kept, gone in found), found


@pytest.mark.parametrize("sensitivity", ["batch-mean", "per-sample"])
def test_labels_make_no_difference(sensitivity, digits_model, class_request, digits_task):
    method = LFSSD(alpha=8.0 if sensitivity == "batch-mean" else 2.0, sensitivity=sensitivity)
    wrong = with_labels(class_request, lambda labels: 9 - labels)
    right = with_labels(class_request, lambda labels: labels)
    garbage = with_labels(class_request, lambda labels: labels * 1000 - 7)
    absent = with_labels(class_request, lambda labels: None)
    found = [
        fingerprint(method.unlearn(digits_model, request, digits_task, Runtime(seed=0)))
        for request in (right, wrong, garbage, absent)
    ]
    assert found[0] != fingerprint(digits_model)
    assert len(set(found)) == 1
    settings = {"alpha": method.alpha, "sensitivity": sensitivity}
    assert fingerprint(lfssd(digits_model, wrong, digits_task, **settings)) == found[0]


def test_it_asks_for_no_labels():
    assert UNLEARNERS.get("lfssd").card.needs == {Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA}


def test_per_sample_sensitivities_select_nothing_at_the_bound(digits_model, class_request, digits_task):
    bound = len(class_request.train) / len(class_request.forget)
    for alpha, unchanged in ((bound, True), (2.0, False)):
        unlearned = lfssd(digits_model, class_request, digits_task, alpha=alpha, sensitivity="per-sample")
        assert (fingerprint(unlearned) == fingerprint(digits_model)) == unchanged


def test_a_file_of_importances_replaces_the_retained_records(
    digits_model, class_request, digits_task, tmp_path
):
    measure = Measure("output")
    full = measure_importance(digits_model, class_request.train, digits_task, Runtime(seed=0), measure)
    path = save_importance(tmp_path / "full.safetensors", full, measure)
    bare = ForgetSplit(class_request.forget)
    found = lfssd(digits_model, bare, digits_task, full_importance=path)
    assert fingerprint(found) == fingerprint(lfssd(digits_model, class_request, digits_task))
    with pytest.raises(MissingNeed):
        lfssd(digits_model, bare, digits_task)
    fisher = save_importance(tmp_path / "fisher.safetensors", full, Measure("loss"))
    with pytest.raises(ModelMismatch, match="measured as"):
        lfssd(digits_model, bare, digits_task, full_importance=fisher)


def test_a_model_whose_output_is_no_tensor_is_refused(digits_model, class_request, digits_task):
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = digits_model

        def forward(self, x):
            return self.inner(x), x

    with pytest.raises(ModelMismatch, match="tuple"):
        lfssd(Pair(), class_request, digits_task)
    with pytest.raises(ModelMismatch, match="tuple"):
        LFSSD().unlearn(Pair(), class_request, digits_task, Runtime())


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.0}, {"dampening": -1.0}, {"alpha": math.nan}, {"sensitivity": "mean"}]
)
def test_settings_out_of_range_are_refused(settings, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter):
        lfssd(digits_model, class_request, digits_task, **settings)
