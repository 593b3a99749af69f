from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch
from palimpsest.forget.classifier.boundary_shrink import nearest_label
from palimpsest.models import build_model


def accuracy(model, records):
    with torch.no_grad():
        return (model(records.tensors["input"]).argmax(1) == records.tensors["label"]).float().mean().item()


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def two_sided():
    """A linear model of two inputs that answers 0 where x0 > x1 and 1 elsewhere."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -4.0], [-4.0, 4.0]]))
        model.bias.zero_()
    return model


def test_a_record_near_the_boundary_takes_the_label_beyond_it_and_a_far_one_keeps_its_own():
    x = torch.tensor([[0.55, 0.45], [0.9, 0.1], [0.03, 0.98]])
    batch = {"input": x, "label": torch.tensor([0, 0, 1])}
    moved, label = nearest_label(two_sided(), batch, pal.tasks.Classification(), 0.1)
    # The loss of class 0 grows along (-1, 1), that of class 1 along (1, -1); clipped to [0, 1], 1/255 steps.
    expected = torch.tensor([[0.45, 0.55], [0.8, 0.2], [0.13, 0.88]])
    assert torch.allclose(moved, (expected * 255).round() / 255, atol=1 / 255 / 2 + 1e-6)
    assert torch.allclose(moved * 255, (moved * 255).round(), atol=1e-4)
    assert label.tolist() == [1, 0, 1]
    assert torch.equal(x, batch["input"])


def test_moved_records_stay_in_range():
    x = torch.tensor([[0.05, 0.97], [0.0, 1.0]])
    moved, _ = nearest_label(
        two_sided(), {"input": x, "label": torch.tensor([0, 0])}, pal.tasks.Classification(), 0.5
    )
    assert moved.min() == 0 and moved.max() == 1


def test_the_unmoved_records_are_trained_on_the_answers_of_the_original():
    x = torch.tensor([[0.55, 0.45], [0.9, 0.1], [0.52, 0.5], [0.2, 0.7]])
    records = pal.Records(TensorDataset(x, torch.tensor([0, 0, 0, 1])))
    request = pal.ForgetSplit(records.select([0, 1, 2]))
    model = two_sided()
    settings = {"optimizer": "sgd", "lr": 0.5, "momentum": 0.0, "epochs": 4}
    unlearned = pal.forget(model, request, "boundary-shrink", pal.tasks.Classification(), **settings)
    weight, bias = (
        model.weight.detach().clone().requires_grad_(),
        model.bias.detach().clone().requires_grad_(),
    )
    for _ in range(4):
        loss = F.cross_entropy(x[:3] @ weight.T + bias, torch.tensor([1, 0, 1]))
        for parameter, gradient in zip(
            (weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True
        ):
            parameter.data -= 0.5 * gradient
    assert torch.allclose(unlearned.weight, weight, atol=1e-5) and torch.allclose(
        unlearned.bias, bias, atol=1e-5
    )


def test_a_class_loses_most_of_its_accuracy_and_the_rest_keep_most(digits_model, class_request, digits_task):
    for seed in range(3):  # measured: forget 0.136 to 0.173, retain 0.878 to 0.879 in three of three
        unlearned = pal.forget(digits_model, class_request, "boundary-shrink", digits_task, seed=seed)
        assert accuracy(unlearned, class_request.forget) <= 0.4
        assert accuracy(unlearned, class_request.retain) >= 0.8


def test_a_longer_step_forgets_more(digits_model, class_request, digits_task):
    near, far = (
        pal.forget(digits_model, class_request, "boundary-shrink", digits_task, epsilon=epsilon)
        for epsilon in (0.01, 0.2)
    )
    assert accuracy(near, class_request.forget) >= 0.9  # nothing crosses the boundary
    assert accuracy(far, class_request.forget) <= 0.1


def test_part_of_a_class_and_random_records_can_be_forgotten(
    digits, digits_model, random_request, digits_task
):
    part = pal.by_column("label", 3) & pal.by_fraction(0.3, seed=0)
    for request in (pal.split(digits, part, test=0.2, holdout=0.2, seed=0), random_request):
        unlearned = pal.forget(digits_model, request, "boundary-shrink", digits_task)
        assert accuracy(unlearned, request.forget) < accuracy(digits_model, request.forget) - 0.05


def test_retained_records_are_not_needed_and_change_nothing(digits_model, class_request, digits_task):
    alone = pal.ForgetSplit(class_request.forget)
    runs = [
        pal.forget(digits_model, request, "boundary-shrink", digits_task, epochs=1)
        for request in (class_request, alone)
    ]
    assert same(*runs)


def test_the_same_seed_gives_the_same_bytes_and_the_original_stays(digits_model, class_request, digits_task):
    before = copy.deepcopy(digits_model)
    runs = [
        pal.forget(
            digits_model, class_request, "boundary-shrink", digits_task, seed=seed, epochs=1, batch_size=16
        )
        for seed in (0, 0, 1)
    ]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    assert same(digits_model, before) and not digits_model.training


def test_batch_norm_of_the_original_stays(class_request, digits_task):
    model = build_model("small_resnet", (1, 8, 8), 10, seed=0, width=4).train()
    before = copy.deepcopy(model.state_dict())
    pal.forget(model, class_request, "boundary-shrink", digits_task, epochs=1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("change", [lambda x: 2 * x - 1, lambda x: 1.5 * x], ids=["below", "above"])
def test_normalised_inputs_are_refused(change, digits_model, class_request, digits_task):
    tensors = class_request.forget.tensors
    scaled = pal.Records(TensorDataset(change(tensors["input"]), tensors["label"]))
    with pytest.raises(InvalidRecords, match=r"\[0, 1\]"):
        pal.forget(digits_model, pal.ForgetSplit(scaled), "boundary-shrink", digits_task)


def test_integer_inputs_are_refused(digits_task):
    records = pal.Records(TensorDataset(torch.zeros(4, 2, dtype=torch.long), torch.tensor([0, 1, 0, 1])))
    model = nn.Sequential(nn.Embedding(2, 3), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(InvalidRecords, match="floating-point"):
        pal.forget(model, pal.ForgetSplit(records), "boundary-shrink", digits_task)


@pytest.mark.parametrize(
    "setting",
    [{"epsilon": 0.0}, {"epsilon": 1.5}, {"epochs": 0}, {"lr": 0.0}, {"batch_size": 0}, {"optimizer": "x"}],
)
def test_values_out_of_range_are_refused(setting, digits_model, class_request, digits_task):
    with pytest.raises(InvalidHyperparameter):
        pal.forget(digits_model, class_request, "boundary-shrink", digits_task, **setting)


def test_a_frozen_model_is_refused(digits_model, class_request, digits_task):
    frozen = copy.deepcopy(digits_model).requires_grad_(False)
    with pytest.raises(ModelMismatch, match="trainable"):
        pal.forget(frozen, replace(class_request, retain=None), "boundary-shrink", digits_task)
