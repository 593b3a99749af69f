from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidLabels,
    MissingNeed,
    ModelMismatch,
    NonFinite,
    NonFiniteLoss,
)
from palimpsest.models import build_model
from palimpsest.parts.reinitialise import check_reinitialised, reinitialised
from palimpsest.parts.training import TrainingRecipe, recipe_of


def test_training_leaves_the_given_model_alone_and_records_its_recipe(class_request, digits_task):
    model = build_model("mlp", (1, 8, 8), 10, seed=0)
    before = copy.deepcopy(model.state_dict())
    trained = pal.train(model, class_request.train, digits_task, epochs=2, lr=1e-2, seed=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert recipe_of(trained) == pal.TrainingRecipe(epochs=2, lr=1e-2) and recipe_of(model) is None
    assert not trained.training


def test_a_retrained_model_never_saw_the_forgotten_class(class_controls, class_request):
    forget, retain = class_request.forget.tensors, class_request.retain.tensors
    for model in class_controls:
        with torch.no_grad():
            assert (model(forget["input"]).argmax(1) == 3).float().mean() == 0
            assert (model(retain["input"]).argmax(1) == retain["label"]).float().mean() > 0.9


def test_retraining_without_a_recipe_says_how_to_give_one(class_request, digits_task):
    model = build_model("mlp", (1, 8, 8), 10)
    with pytest.raises(MissingNeed, match="recipe=TrainingRecipe"):
        pal.forget(model, class_request, "retrain", digits_task)
    recipe = pal.TrainingRecipe(epochs=1)
    assert recipe_of(pal.forget(model, class_request, "retrain", digits_task, recipe=recipe)) == recipe


@pytest.mark.parametrize(
    "name", ["mlp", "small_cnn", "small_resnet", "torchvision:resnet18", "timm:vit_tiny_patch16_224"]
)
def test_every_parameter_of_a_model_is_drawn_anew(name):
    shape = (3, 224, 224) if ":" in name else (1, 8, 8)
    model = build_model(name, shape, 4, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    fresh = reinitialised(model, pal.Runtime(seed=1))
    same = [
        n for (n, a), b in zip(fresh.named_parameters(), model.parameters(), strict=True) if torch.equal(a, b)
    ]
    assert same == []


def test_a_fresh_model_of_the_same_seed_is_not_the_originals_start():
    model = build_model("mlp", (1, 8, 8), 10, seed=3)
    fresh = reinitialised(model, pal.Runtime(seed=3))
    assert not torch.equal(fresh.head.weight, model.head.weight)


def test_a_parameter_that_survives_is_caught():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fresh = copy.deepcopy(model)
    fresh[0].reset_parameters()
    with pytest.raises(ModelMismatch, match=r"1\.weight"):
        check_reinitialised(fresh, model)


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 0}, {"lr": 0.0}, {"batch_size": 0}, {"optimizer": "adamm"}, {"weight_decay": -1.0}],
)
def test_a_recipe_out_of_range_is_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        pal.TrainingRecipe(**settings)


def test_a_diverging_loss_stops_with_the_records_named(class_request, digits_task):
    with pytest.raises(NonFiniteLoss, match="digit-"):
        pal.train(
            build_model("mlp", (1, 8, 8), 10),
            class_request.train,
            digits_task,
            epochs=3,
            lr=1e30,
            optimizer="sgd",
        )


def records(inputs, labels):
    return pal.Records(TensorDataset(torch.as_tensor(inputs, dtype=torch.float32), torch.as_tensor(labels)))


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (
            records(np.zeros((4, 1, 8, 8)), [0, 1, 2, 10]),
            InvalidLabels,
            "0 to 10; the model knows classes 0 to 9",
        ),
        (records(np.zeros((4, 1, 8, 8)), [0, 1, 2, -1]), InvalidLabels, "-1"),
        (records(np.zeros((4, 1, 8, 8)), [0.0, 1.0, 2.0, 1.5]), InvalidLabels, "integers"),
        (records(np.full((4, 1, 8, 8), np.nan), [0, 1, 2, 3]), NonFinite, "id '0'"),
        (records(np.zeros((4, 3)), [0, 1, 2, 3]), ModelMismatch, "fails on a batch of shape"),
    ],
)
def test_records_that_do_not_fit_are_refused_before_any_work(data, error, words, digits_task):
    with pytest.raises(error, match=words):
        pal.train(build_model("mlp", (1, 8, 8), 10), data, digits_task, epochs=1)


def test_weights_that_are_not_finite_are_refused_by_name(class_request, digits_task):
    model = build_model("mlp", (1, 8, 8), 10)
    with torch.no_grad():
        model.head.bias[2] = float("inf")
    with pytest.raises(NonFinite, match=r"head\.bias"):
        pal.train(model, class_request.train, digits_task)


def test_outputs_that_are_no_class_scores_are_refused(class_request, digits_task):
    with pytest.raises(ModelMismatch, match=r"\(8, 1, 8, 8\)"):
        digits_task.check(nn.Identity(), class_request.train)
    with pytest.raises(ModelMismatch, match="5 classes, the model gives 10"):
        pal.tasks.Classification(classes=5).check(build_model("mlp", (1, 8, 8), 10), class_request.train)


def test_the_features_are_the_input_of_the_head_with_their_graph(digits_model, class_request, digits_task):
    batch = class_request.test.batch(range(4), digits_task.collate)
    features = digits_task.features(digits_model, batch)
    assert features.shape == (4, 64) and features.requires_grad
    assert torch.allclose(digits_model.head(features), digits_model(batch["input"]))


def test_a_model_with_batch_norm_trains_though_a_last_batch_holds_one_record(digits, digits_task):
    some = digits.select(np.arange(65))
    trained = pal.train(build_model("small_resnet", (1, 8, 8), 10, width=4), some, digits_task, epochs=1)
    assert recipe_of(trained).epochs == 1


def test_the_learning_rate_rises_over_the_warm_up_and_falls_along_a_cosine():
    weight = torch.nn.Linear(2, 2)
    recipe = TrainingRecipe(lr=0.1, schedule="cosine", warmup=0.2)
    optimizer = recipe.build_optimizer(weight)
    schedule = recipe.build_schedule(optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    falling = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([0.05, 0.1, *falling])
    with pytest.raises(InvalidHyperparameter, match="warmup"):
        TrainingRecipe(warmup=1.0)


def test_grouping_by_length_is_refused_where_records_have_none(class_request, digits_task):
    with pytest.raises(InvalidHyperparameter, match="have none"):
        pal.train(build_model("mlp", (1, 8, 8), 10), class_request.train, digits_task, group_by_length=True)
