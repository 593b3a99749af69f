import copy
import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.forget.measuring import accuracy, changed, fingerprint, kept_and_gone
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    MissingNeed,
    ModelMismatch,
    NonFinite,
    UnreadableCheckpoint,
)
from palimpsest.core.runtime import Runtime
from palimpsest.forget.classifier.ssd import SSD, dampen
from palimpsest.models import build_model
from palimpsest.parts.importance import Measure, measure_importance
from palimpsest.parts.importance_file import save_importance
from palimpsest.parts.training import TrainingRecipe, fit

ALPHAS = (5, 10, 15, 20, 30, 40, 50)
POSITIVE = st.floats(0, 1e3, allow_nan=False, width=32)


def ssd(model, request, task, **settings):
    return pal.forget(model, request, "ssd", task, seed=0, **settings)


def vectors(count):
    return st.lists(st.tuples(*[POSITIVE] * count), min_size=1, max_size=20).map(
        lambda rows: [torch.tensor(column) for column in zip(*rows, strict=True)]
    )


@given(vectors(3), st.floats(0.01, 100), st.floats(0, 100))
def test_dampening_never_lets_a_weight_grow_or_change_sign(columns, alpha, dampening):
    weight, full, forget = columns
    after = dampen({"w": weight}, {"w": full}, {"w": forget}, alpha, dampening)["w"]
    assert (after.abs() <= weight.abs()).all()
    assert (after * weight >= 0).all()
    unselected = forget <= alpha * full
    assert torch.equal(after[unselected], weight[unselected])


@given(vectors(2), st.floats(0.01, 100), st.floats(1, 10))
def test_a_larger_alpha_never_selects_more(columns, alpha, factor):
    full, forget = columns
    weight = torch.ones_like(full)

    def zeroed(value):
        return dampen({"w": weight}, {"w": full}, {"w": forget}, value, 0.0)["w"] == 0

    assert not (zeroed(alpha * factor) & ~zeroed(alpha)).any()


def test_a_weight_that_only_the_forget_set_uses_becomes_zero():
    after = dampen({"w": torch.ones(2)}, {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0.0])}, 10, 1)
    assert after["w"].tolist() == [0.0, 1.0]


def test_some_alpha_removes_the_class_and_keeps_the_rest(digits_model, class_request, digits_task):
    kept_before, gone_before = kept_and_gone(digits_model, class_request)
    assert gone_before > 0.85
    found = [
        kept_and_gone(ssd(digits_model, class_request, digits_task, alpha=a), class_request) for a in ALPHAS
    ]
    assert any(gone <= 0.05 and kept >= kept_before - 0.03 for kept, gone in found)


def test_fewer_weights_change_as_alpha_grows_and_none_at_last(digits_model, class_request, digits_task):
    counts, unlearned = [], digits_model
    for alpha in (*ALPHAS, 1e9):
        unlearned = ssd(digits_model, class_request, digits_task, alpha=alpha)
        counts.append(sum(int(mask.sum()) for mask in changed(digits_model, unlearned).values()))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-2] > 0
    assert fingerprint(unlearned) == fingerprint(digits_model)


def test_without_dampening_constant_exactly_the_selected_weights_become_zero(
    digits_model, class_request, digits_task
):
    runtime = Runtime(seed=0)
    full = measure_importance(digits_model, class_request.train, digits_task, runtime, Measure())
    in_order = Measure(shuffle=False)
    forget = measure_importance(digits_model, class_request.forget, digits_task, runtime, in_order)
    unlearned = ssd(digits_model, class_request, digits_task, alpha=15.0, dampening=0.0)
    for name, parameter in unlearned.named_parameters():
        selected = forget[name] > 15.0 * full[name]
        assert (parameter[selected] == 0).all()
        assert torch.equal(parameter[~selected], dict(digits_model.named_parameters())[name][~selected])


def test_per_sample_importances_select_nothing_at_the_bound(digits_model, class_request, digits_task):
    bound = len(class_request.train) / len(class_request.forget)
    for alpha, unchanged in ((bound, True), (2.5, False)):
        unlearned = ssd(digits_model, class_request, digits_task, alpha=alpha, fisher="per-sample")
        assert (fingerprint(unlearned) == fingerprint(digits_model)) == unchanged


def test_it_costs_one_pass_over_all_and_one_over_the_forget_set(digits_model, class_request, digits_task):
    seen = []
    watched = copy.deepcopy(digits_model)
    watched.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    runtime = Runtime(seed=0)
    start = time.perf_counter()
    SSD().unlearn(watched, class_request, digits_task, runtime)
    mine = time.perf_counter() - start
    assert sum(seen) == len(class_request.train) + len(class_request.forget)
    start = time.perf_counter()
    fresh = build_model("small_cnn", (1, 8, 8), 10, seed=1)
    fit(fresh, class_request.retain, digits_task, runtime, TrainingRecipe(epochs=25))
    assert mine < (time.perf_counter() - start) / 5


def test_a_small_random_request_does_not_collapse_the_model(digits, digits_model, digits_task):
    request = pal.split(digits, pal.by_fraction(0.02, seed=0), test=0.2, holdout=0.2, seed=0)
    before = accuracy(digits_model, request.forget), accuracy(digits_model, request.test)
    for alpha in (30.0, 50.0):
        unlearned = ssd(digits_model, request, digits_task, alpha=alpha)
        assert accuracy(unlearned, request.forget) >= before[0] - 0.1
        assert accuracy(unlearned, request.test) >= before[1] - 0.03


def test_a_tied_weight_is_dampened_once(digits_task):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    torch.manual_seed(0)
    model = Tied()
    x, y = torch.randn(60, 6), torch.arange(60) % 6
    records = pal.Records(torch.utils.data.TensorDataset(x, y))
    request = pal.split(records, pal.by_column("label", 2), test=0, holdout=0)
    full = {name: torch.full_like(p, 1e-9) for name, p in model.named_parameters()}
    unlearned = ssd(model, request, digits_task, alpha=1.0, full_importance=full)
    forget = measure_importance(model, request.forget, digits_task, Runtime(), Measure(shuffle=False))
    expected = dampen({"first.weight": model.first.weight}, full, forget, 1.0, 1.0)["first.weight"]
    first = unlearned.get_parameter("first.weight")
    assert unlearned.get_parameter("second.weight") is first
    torch.testing.assert_close(first, expected)


def test_a_data_parallel_wrapper_changes_nothing(digits_model, class_request, digits_task):
    plain = ssd(digits_model, class_request, digits_task, alpha=20.0)
    wrapped = ssd(nn.DataParallel(digits_model), class_request, digits_task, alpha=20.0)
    assert isinstance(wrapped, nn.DataParallel)
    assert fingerprint(wrapped.module) == fingerprint(plain)


def test_running_statistics_stay(class_request, digits_task):
    model = build_model("small_resnet", (1, 8, 8), 10, seed=0).train()
    unlearned = ssd(model, class_request, digits_task, alpha=2.0)
    assert model.training
    assert any(mask.any() for mask in changed(model, unlearned).values())
    for (name, before), after in zip(model.named_buffers(), unlearned.buffers(), strict=True):
        assert torch.equal(before, after), name


def test_stored_importances_answer_a_request_without_retained_records(
    digits_model, class_request, digits_task, tmp_path
):
    expected = ssd(digits_model, class_request, digits_task, alpha=20.0)
    runtime = Runtime(seed=0)
    stored = measure_importance(digits_model, class_request.train, digits_task, runtime, Measure())
    path = save_importance(tmp_path / "full.safetensors", stored, Measure())
    bare = replace(class_request, retain=None)
    for given_importance in (stored, path, str(path)):
        found = ssd(digits_model, bare, digits_task, alpha=20.0, full_importance=given_importance)
        assert fingerprint(found) == fingerprint(expected)
    with pytest.raises(MissingNeed, match="retain-data"):
        ssd(digits_model, bare, digits_task, alpha=20.0)


def test_importances_of_a_class_stored_at_training_time_answer_without_reading_a_record(
    digits_model, class_request, digits_task, tmp_path
):
    expected = ssd(digits_model, class_request, digits_task, alpha=20.0)
    runtime, train = Runtime(seed=0), class_request.train
    paths = {}
    for name, records, measure in (
        ("full_importance", train, Measure()),
        ("forget_importance", train.select(train.column("label") == 3), Measure(shuffle=False)),
    ):
        stored = measure_importance(digits_model, records, digits_task, runtime, measure)
        paths[name] = save_importance(tmp_path / f"{name}.safetensors", stored, measure)
    noise = pal.Records(TensorDataset(torch.rand(4, 1, 8, 8), torch.full((4,), 3)))
    found = ssd(digits_model, pal.ForgetSplit(noise), digits_task, alpha=20.0, **paths)
    assert fingerprint(found) == fingerprint(expected)
    with pytest.raises(ModelMismatch, match="measured as"):
        ssd(digits_model, class_request, digits_task, forget_importance=paths["full_importance"])


def test_importances_measured_otherwise_are_refused(digits_model, class_request, digits_task, tmp_path):
    measure = Measure("loss", "per-sample")
    stored = measure_importance(digits_model, class_request.forget, digits_task, Runtime(), measure)
    path = save_importance(tmp_path / "full.safetensors", stored, measure)
    with pytest.raises(ModelMismatch, match="measured as"):
        ssd(digits_model, class_request, digits_task, full_importance=path)
    ssd(digits_model, class_request, digits_task, full_importance=path, fisher="per-sample")
    with pytest.raises(UnreadableCheckpoint):
        ssd(digits_model, class_request, digits_task, full_importance=tmp_path / "absent.safetensors")


def test_stored_importances_that_do_not_fit_are_refused(digits_model, class_request, digits_task):
    full = {name: torch.ones_like(p) for name, p in digits_model.named_parameters()}
    lacking = {name: value for name, value in full.items() if name != "fc.bias"}
    with pytest.raises(ModelMismatch, match=r"fc\.bias"):
        ssd(digits_model, class_request, digits_task, full_importance=lacking)
    with pytest.raises(ModelMismatch, match="shape"):
        ssd(digits_model, class_request, digits_task, full_importance={**full, "fc.bias": torch.ones(2)})
    damaged = {**full, "fc.bias": torch.full((64,), math.inf)}
    with pytest.raises(NonFinite, match=r"fc\.bias"):
        ssd(digits_model, class_request, digits_task, full_importance=damaged)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"alpha": math.nan},
        {"dampening": -0.1},
        {"fisher": "batch"},
        {"batch_size": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter):
        ssd(digits_model, class_request, digits_task, **settings)


def test_labels_outside_the_classes_are_refused(digits_model, digits_task):
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 5 + 6
    records = pal.Records(torch.utils.data.TensorDataset(x, y))
    request = pal.split(records, pal.by_column("label", 10), test=0, holdout=0)
    with pytest.raises(InvalidLabels, match="10"):
        ssd(digits_model, request, digits_task)


def test_a_model_without_trainable_parameters_is_refused(digits_model, class_request, digits_task):
    frozen = copy.deepcopy(digits_model).requires_grad_(False)
    with pytest.raises(ModelMismatch, match="no trainable parameters"):
        ssd(frozen, class_request, digits_task)


def test_frozen_parameters_are_not_dampened(digits_model, class_request, digits_task):
    partly = copy.deepcopy(digits_model)
    partly.conv1.requires_grad_(False)
    unlearned = ssd(partly, class_request, digits_task, alpha=5.0)
    moved = {name for name, mask in changed(partly, unlearned).items() if mask.any()}
    assert moved and not any(name.startswith("conv1") for name in moved)
    assert not unlearned.get_parameter("conv1.weight").requires_grad
    assert unlearned.get_parameter("head.weight").requires_grad
