"""The two lower levels of the search for worst-case forget sets: sign-finetune and sign-retrain."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.forget.measuring import accuracy, fingerprint, tensors_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, NonFiniteLoss
from palimpsest.forget.classifier.sign_finetune import SignFineTune
from palimpsest.forget.classifier.sign_retrain import SignRetrain
from palimpsest.models import build_model

RUNTIME = pal.Runtime(seed=0, device="cpu")


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def weighted_gradient(model, records, keep):
    """Gradient of sum_i keep_i loss_i in one batch, by plain backward."""
    model, tensors = copy.deepcopy(model), tensors_of(records)
    losses = F.cross_entropy(model(tensors["input"]), tensors["label"], reduction="none")
    (torch.as_tensor(keep, dtype=losses.dtype) * losses).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def small():
    """Twenty records, six of them to be forgotten, and an untrained network in double precision."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(20, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (20,), generator=generator)
    model = build_model("small_cnn", (1, 4, 4), 3, seed=0, width=2, hidden=5).double()
    records = pal.Records(TensorDataset(x, y))
    return model, pal.ForgetSplit(records.select(range(6)), records.select(range(6, 20)))


def test_a_step_moves_every_parameter_by_the_rate_against_the_sign_of_its_gradient(small, digits_task):
    model, request = small
    w = np.random.default_rng(0).random(20)
    after = SignFineTune(lr=0.01).unlearn_weighted(model, request.train, w, digits_task, RUNTIME)
    g = weighted_gradient(model, request.train, 1 - w)
    assert (g == 0).any() and (g != 0).any()
    torch.testing.assert_close(flat(after), flat(model) - 0.01 * g.sign())


def test_a_request_is_descent_on_the_retained_records_alone(small, digits_task):
    model, request = small
    after = pal.forget(model, request, "sign-finetune", digits_task, lr=0.01)
    g = weighted_gradient(model, request.retain, np.ones(14))
    torch.testing.assert_close(flat(after), flat(model) - 0.01 * g.sign())


@pytest.mark.parametrize(
    "method", [SignFineTune(epochs=3, batch_size=4), SignRetrain(epochs=3, batch_size=4)]
)
def test_the_result_does_not_depend_on_small_changes_of_the_weights(small, digits_task, method):
    model, request = small
    random = np.random.default_rng(0)
    w = random.uniform(0.1, 0.9, 20)
    first, second = (
        method.unlearn_weighted(model, request.train, weights, digits_task, RUNTIME)
        for weights in (w, w + 1e-4 * random.standard_normal(20))
    )
    far = method.unlearn_weighted(model, request.train, random.random(20), digits_task, RUNTIME)
    assert torch.equal(flat(first), flat(second)) and not torch.equal(flat(first), flat(far))


@pytest.mark.parametrize("batch_size", [3, 64])
def test_weights_belong_to_records_whatever_their_order(small, digits_task, batch_size):
    model, request = small
    gone = (np.arange(20) < 6).astype(float)
    order = np.random.default_rng(1).permutation(20)
    shuffled = request.train.select(order)
    swapped = tensors_of(request.train)
    labels = swapped["label"].clone()
    labels[:6] = (labels[:6] + 1) % 3
    other = pal.Records(TensorDataset(swapped["input"], labels)).select(order)
    method = SignFineTune(lr=0.01, epochs=2, batch_size=batch_size)
    one, two = (
        method.unlearn_weighted(model, records, gone[order], digits_task, RUNTIME)
        for records in (shuffled, other)
    )
    assert torch.equal(flat(one), flat(two)) and not torch.equal(flat(one), flat(model))


def test_a_batch_whose_weights_are_all_one_moves_nothing(small, digits_task):
    model, request = small
    after = SignFineTune(lr=0.5).unlearn_weighted(model, request.train, np.ones(20), digits_task, RUNTIME)
    assert torch.equal(flat(after), flat(model))


def test_retraining_starts_from_fresh_weights_and_so_does_not_know_the_trained_ones(small, digits_task):
    model, request = small
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += torch.rand_like(parameter)
    results = [pal.forget(given, request, "sign-retrain", digits_task) for given in (model, other)]
    assert torch.equal(flat(results[0]), flat(results[1]))
    assert not torch.isclose(flat(results[0]), flat(model), atol=1e-6).any()
    seeded = pal.forget(model, request, "sign-retrain", digits_task, seed=1)
    assert not torch.equal(flat(seeded), flat(results[0]))


def test_sign_retraining_learns_the_kept_classes_and_not_the_forgotten_one(class_request, digits_task):
    start = build_model("mlp", (1, 8, 8), 10, seed=0, width=32)
    after = pal.forget(start, class_request, "sign-retrain", digits_task, lr=3e-3)
    assert accuracy(after, class_request.retain) > 0.85 and accuracy(after, class_request.forget) == 0


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("method", ["sign-finetune", "sign-retrain"])
def test_large_vision_models_take_a_step_and_are_left_as_they_were(name, method, digits_task):
    settings = {"img_size": 32} if name.startswith("timm") else {}
    model = build_model(name, (3, 32, 32), 4, seed=0, **settings)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    data = TensorDataset(torch.rand(9, 3, 32, 32), torch.arange(9) % 4)
    request = pal.split(pal.Records(data), pal.by_fraction(0.2), test=0.0, holdout=0.0)
    before = fingerprint(model)
    lr = 1e-3
    after = pal.forget(model, request, method, digits_task, lr=lr, epochs=1)
    assert fingerprint(model) == before and model.training and not after.training
    assert not next(iter(after.parameters())).requires_grad
    if method == "sign-finetune":
        steps = (flat(after) - flat(model)).abs()
        assert 0.9 * lr < steps.max() < 1.1 * lr
        assert torch.equal(next(iter(after.parameters())), frozen)


def test_evaluation_mode_leaves_the_statistics_of_batch_norm_alone(digits_task):
    model = build_model("small_resnet", (1, 8, 8), 3, seed=0, width=4)
    data = pal.Records(TensorDataset(torch.rand(9, 1, 8, 8), torch.arange(9) % 3))
    request = pal.split(data, pal.by_fraction(0.2), test=0.0, holdout=0.0)
    kept, moved = (
        pal.forget(model, request, "sign-finetune", digits_task, mode=mode) for mode in ("eval", "train")
    )
    name, start = next((n, b.clone()) for n, b in model.named_buffers() if n.endswith("running_mean"))
    assert torch.equal(dict(kept.named_buffers())[name], start)
    assert not torch.equal(dict(moved.named_buffers())[name], start)


@pytest.mark.parametrize("method", ["sign-finetune", "sign-retrain"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": -1e-3},
        {"lr": 2.0},
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch_size": 0},
        {"mode": "off"},
    ],
)
def test_hyperparameters_out_of_range_are_refused(small, digits_task, method, wrong):
    model, request = small
    with pytest.raises(InvalidHyperparameter, match=next(iter(wrong))):
        pal.forget(model, request, method, digits_task, **wrong)


@pytest.mark.parametrize("method", [SignFineTune(), SignRetrain()])
def test_bad_weights_and_missing_records_are_refused(small, digits_task, method):
    model, request = small
    with pytest.raises(InvalidHyperparameter, match="19"):
        method.unlearn_weighted(model, request.train, np.zeros(19), digits_task, RUNTIME)
    with pytest.raises(InvalidHyperparameter, match=r"\[0, 1\]"):
        method.unlearn_weighted(model, request.train, np.full(20, 1.5), digits_task, RUNTIME)
    with pytest.raises(MissingNeed, match="retained"):
        method.unlearn(model, pal.ForgetSplit(request.forget), digits_task, RUNTIME)


def test_a_loss_that_is_no_number_stops_training(digits_task):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x) / x[:, :1]

    broken = pal.Records(TensorDataset(torch.zeros(6, 4), torch.arange(6) % 2))
    with pytest.raises(NonFiniteLoss, match="records"):
        SignFineTune().unlearn_weighted(Broken(), broken, np.zeros(6), digits_task, RUNTIME)
