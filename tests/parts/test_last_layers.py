from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFinite, UnknownName
from palimpsest.models import build_model
from palimpsest.parts.last_layers import draw_anew, last_parameters, parameters_to_train, put_back, train_only


def network():
    """Convolution, batch norm, convolution, batch norm, linear."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(),
        nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


def modules_of(names):
    return sorted({int(name.partition(".")[0]) for name in names})


@pytest.mark.parametrize(("k", "expected"), [(1, [6]), (2, [3, 4, 6]), (3, [0, 1, 3, 4, 6])])
def test_layers_are_counted_from_the_end_and_norms_on_the_way_come_along(k, expected):
    assert modules_of(last_parameters(network(), k)) == expected


def test_attention_counts_as_the_linear_layers_that_it_is():
    block = nn.TransformerEncoderLayer(8, 2, 16)
    order = ["linear2", "linear1", "self_attn.out_proj", "self_attn.in_proj"]
    for k, newest in enumerate(order, start=1):
        found = last_parameters(block, k)
        assert any(name.startswith(newest) for name in found)
        assert not any(name.startswith(later) for name in found for later in order[k:])


def test_a_layer_that_is_the_whole_model_is_found():
    assert last_parameters(nn.Linear(2, 2), 1) == ["weight", "bias"]


@pytest.mark.parametrize("k", [0, 4])
def test_more_layers_than_there_are_cannot_be_asked_for(k):
    with pytest.raises(InvalidHyperparameter, match="the 3 convolutional and linear layers"):
        last_parameters(network(), k)


def test_named_layers_stand_for_the_count_and_frozen_parameters_stay_frozen():
    model = network()
    assert parameters_to_train(model, 1, ("3", "4.bias")) == ["3.weight", "3.bias", "4.bias"]
    model[6].weight.requires_grad_(False)
    assert parameters_to_train(model, 1) == ["6.bias"]
    model[6].requires_grad_(False)
    with pytest.raises(ModelMismatch, match="trainable"):
        parameters_to_train(model, 1)
    with pytest.raises(UnknownName):
        parameters_to_train(model, 1, ("head",))


def test_running_statistics_of_other_layers_stand_still_in_training():
    model = network()
    before = copy.deepcopy(model.state_dict())
    train_only(model, last_parameters(model, 2))
    model(torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert not torch.equal(model[4].running_mean, before["4.running_mean"])
    assert model[0].training and not model[1].training


def test_fresh_weights_are_kaiming_normal_with_zero_biases_and_norms_keep_theirs():
    model = build_model("small_cnn", (1, 8, 8), 10, width=32, hidden=256)
    names = last_parameters(model, 2)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    draw_anew(model, names)
    assert torch.equal(model.conv2.weight, before["conv2.weight"])
    n = model.fc.weight.numel()
    assert model.fc.weight.std().item() == pytest.approx((2 / model.fc.in_features) ** 0.5, rel=4 / n**0.5)
    assert not model.fc.bias.any() and not model.head.bias.any()
    normed = network()
    with torch.no_grad():
        normed[4].weight.fill_(3.0)
    draw_anew(normed, last_parameters(normed, 2))
    assert (normed[4].weight == 3.0).all()


def test_initial_weights_are_put_back_where_they_fit_and_refused_where_not():
    model, initial = network(), network()
    names = last_parameters(model, 2)
    put_back(model, names, initial.state_dict())
    assert torch.equal(model[3].weight, initial[3].weight) and torch.equal(model[6].bias, initial[6].bias)
    assert not torch.equal(model[0].weight, initial[0].weight)
    with pytest.raises(ModelMismatch, match=r"3\.weight"):
        put_back(model, names, nn.Sequential(nn.Linear(2, 2)).state_dict())
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        initial[6].bias.fill_(float("nan"))
    with pytest.raises(NonFinite):
        put_back(model, names, initial.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
