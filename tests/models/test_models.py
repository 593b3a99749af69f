from __future__ import annotations

import pytest
import torch

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, UnknownName
from palimpsest.models import MODELS, build_model
from palimpsest.parts.activations import capture, pool, watched_layers


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "small_resnet"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_a_reference_network_gives_one_logit_per_class(name, shape):
    assert build_model(name, shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_models_of_torchvision_and_timm_come_by_name(name):
    model = build_model(name, (3, 224, 224), 5)
    with torch.no_grad(), capture(model.eval()) as seen:
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 5)
    assert seen.head in ("fc", "head") and seen.head_input.shape == (1, {"fc": 512, "head": 192}[seen.head])
    assert 2 <= len(seen.layers) <= 12 and all(value.dim() == 2 for value in seen.layers.values())


def test_the_users_own_factory_is_imported():
    assert build_model("palimpsest.models.small:MLP", (4,), 3, width=8)(torch.zeros(1, 4)).shape == (1, 3)
    with pytest.raises(ModelMismatch, match="no_such"):
        build_model("palimpsest.models.small:no_such", (4,), 3)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    one, two, other = (build_model("mlp", (4,), 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.head.weight, two.head.weight) and not torch.equal(
        one.head.weight, other.head.weight
    )
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_models_and_settings_are_refused():
    assert {"mlp", "small_cnn", "small_resnet"} <= set(MODELS.names())
    with pytest.raises(UnknownName, match="Did you mean 'small_cnn'"):
        build_model("smal_cnn", (1, 8, 8), 10)
    with pytest.raises(UnknownName, match="resnet18"):
        build_model("torchvision:resnet81", (3, 32, 32), 10)
    with pytest.raises(InvalidHyperparameter, match="depht"):
        build_model("mlp", (4,), 3, depht=2)


def test_large_maps_are_pooled_and_token_sequences_averaged():
    assert pool(torch.ones(2, 3, 8, 8)).shape == (2, 192)
    assert pool(torch.ones(2, 64, 56, 56)).shape[1] <= 2048
    tokens = torch.arange(12.0).reshape(1, 4, 3)
    assert pool(tokens).tolist() == [[4.5, 5.5, 6.5]]


def test_a_deep_network_is_watched_at_evenly_spaced_layers_with_first_and_last():
    names = watched_layers(build_model("torchvision:resnet18", (3, 64, 64), 5))
    assert names[0] == "conv1" and names[-1] == "fc" and len(names) == 12
