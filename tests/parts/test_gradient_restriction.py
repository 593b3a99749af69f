"""The penalty on gradients at training time: its value, its derivative, and that every recipe carries it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecipe, ModelMismatch
from palimpsest.models import build_model
from palimpsest.parts.checkpoint import load_model, save_model
from palimpsest.parts.training import gradient_norms, recipe_of, training_loss
from palimpsest.study.recipe import load_recipe

ALPHA = 0.05


@pytest.fixture
def tiny():
    """A smooth network in double precision and one batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = {"input": torch.randn(6, 3).double(), "label": torch.arange(6) % 3, "id": list("abcdef")}
    return model, batch


def penalty(model, batch):
    """The penalty with no graph: one backward pass, then a sum of unsquared norms, tensor by tensor."""
    model = copy.deepcopy(model)
    F.cross_entropy(model(batch["input"]), batch["label"]).backward()
    return sum(p.grad.square().sum().sqrt().item() for p in model.parameters())


def test_the_penalty_is_the_sum_over_tensors_of_unsquared_norms_of_the_mean_gradient(tiny, digits_task):
    model, batch = tiny
    plain, restricted = (training_loss(model, batch, digits_task, alpha).item() for alpha in (0.0, ALPHA))
    assert restricted - plain == pytest.approx(ALPHA * penalty(model, batch), rel=1e-9)
    assert plain == pytest.approx(F.cross_entropy(model(batch["input"]), batch["label"]).item())


def test_the_penalty_is_differentiated_through(tiny, digits_task):
    model, batch = tiny
    loss = training_loss(model, batch, digits_task, 1.0) - training_loss(model, batch, digits_task, 0.0)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        index, h = (0,) * parameter.dim(), 1e-5
        values = []
        for move in (h, -2 * h):
            with torch.no_grad():
                parameter[index] += move
            values.append(penalty(model, batch))
        with torch.no_grad():
            parameter[index] += h
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4, abs=1e-7)


def test_one_step_with_the_penalty_goes_elsewhere(class_request, digits_task):
    model = build_model("mlp", (1, 8, 8), 10, seed=0)
    how = {"epochs": 1, "batch_size": 5000, "optimizer": "sgd", "lr": 0.1, "momentum": 0.0}
    plain, restricted = (
        pal.train(model, class_request.train, digits_task, seed=0, gradient_restriction=alpha, **how)
        for alpha in (0.0, ALPHA)
    )
    batch = class_request.train.batch(range(len(class_request.train)), digits_task.collate)
    for name, parameter in plain.named_parameters():
        assert not torch.equal(parameter, restricted.get_parameter(name)), name
    assert penalty(restricted, batch) < penalty(plain, batch)


def test_dead_layers_unused_and_frozen_tensors_give_no_nan(digits_task):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # no unit ever fires: the first layer's gradient is exactly zero
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    records = pal.Records(TensorDataset(torch.randn(8, 3), torch.arange(8) % 3))
    trained = pal.train(model, records, digits_task, epochs=2, lr=0.1, gradient_restriction=ALPHA)
    after = trained.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert torch.equal(after["unused"], before["unused"]) and torch.equal(
        after["2.weight"], before["2.weight"]
    )
    assert not torch.equal(after["2.bias"], before["2.bias"])


def test_a_loss_of_no_trainable_tensor_is_refused():
    with pytest.raises(ModelMismatch, match="no gradient to restrict"):
        gradient_norms(torch.tensor(1.0), [nn.Parameter(torch.ones(2))])


def test_zero_is_ordinary_training_bit_for_bit(class_request, digits_task):
    model = build_model("mlp", (1, 8, 8), 10, seed=0)
    one = pal.train(model, class_request.train, digits_task, epochs=1)
    two = pal.train(model, class_request.train, digits_task, epochs=1, gradient_restriction=0.0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused(alpha):
    with pytest.raises(InvalidHyperparameter, match="gradient_restriction"):
        pal.TrainingRecipe(gradient_restriction=alpha)


def test_retraining_saved_files_and_studies_carry_it(class_request, digits_task, tmp_path):
    model = build_model("mlp", (1, 8, 8), 10, seed=0)
    trained = pal.train(model, class_request.train, digits_task, epochs=1, gradient_restriction=0.005)
    retrained = pal.forget(trained, class_request, "retrain", digits_task)
    save_model(trained, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", model)
    study = load_recipe(
        {"forget": "label=3", "methods": "iau", "training": {"epochs": 1}},
        ["training.gradient_restriction=5e-3"],
    )
    recipes = [recipe_of(trained), recipe_of(retrained), recipe_of(loaded), study.training.recipe()]
    assert recipes == [pal.TrainingRecipe(epochs=1, gradient_restriction=0.005)] * 4
    with pytest.raises((InvalidRecipe, InvalidHyperparameter), match="gradient_restriction"):
        load_recipe(
            {"forget": "label=3", "methods": "iau", "training": {"gradient_restriction": -1}}
        ).training.recipe()


def test_a_file_written_before_there_was_such_a_field_still_loads(digits_task, class_request, tmp_path):
    model = build_model("mlp", (1, 8, 8), 10, seed=0)
    path = tmp_path / "old.safetensors"
    recipe = pal.TrainingRecipe(epochs=7, lr=0.01).to_dict()
    del recipe["gradient_restriction"]
    save_model(model, path)
    about = {"format": 1, "architecture": "MLP", "recipe": recipe, "notes": {}}
    save_file(load_file(path), path, {"palimpsest": json.dumps(about)})
    assert recipe_of(load_model(path, model)) == pal.TrainingRecipe(epochs=7, lr=0.01)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_large_vision_models_train_with_it(name, digits_task):
    settings = {"img_size": 32} if name.startswith("timm") else {}
    model = build_model(name, (3, 32, 32), 4, seed=0, **settings)
    generator = torch.Generator().manual_seed(0)
    records = pal.Records(TensorDataset(torch.rand(4, 3, 32, 32, generator=generator), torch.arange(4)))
    trained = pal.train(model, records, digits_task, epochs=1, batch_size=4, gradient_restriction=0.005)
    assert all(torch.isfinite(p).all() for p in trained.parameters())
    plain = pal.train(model, records, digits_task, epochs=1, batch_size=4)
    pairs = zip(trained.parameters(), plain.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
