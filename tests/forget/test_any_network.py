"""Every classifier method on networks that we did not write: a residual network with batch norm, and a transformer."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.forget.every_classifier_method import CLASSES_ONLY, METHODS, forget_quickly
from tests.forget.measuring import changed, fingerprint
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import MissingNeed
from palimpsest.models import build_model

NETWORKS = {
    "torchvision:resnet18": {},
    "timm:vit_tiny_patch16_224": {"img_size": 16, "patch_size": 8, "depth": 3},
}
SHAPE, CLASSES, COUNT = (3, 16, 16), 3, 12
REQUESTS = {
    "class": pal.by_column("label", 1),
    "sub-class": pal.by_column("label", 1) & pal.by_fraction(0.5, seed=0),
    "random": pal.by_fraction(0.25, seed=0),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    source, library = request.param, request.param.partition(":")[0]
    pytest.importorskip(library)
    return build_model(source, SHAPE, CLASSES, seed=0, **NETWORKS[source]).eval()


@pytest.fixture(scope="module")
def images():
    """Colour images of noise, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    return pal.Records(
        TensorDataset(torch.rand(COUNT, *SHAPE, generator=generator), torch.arange(COUNT) % CLASSES)
    )


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_step_on_any_network_and_leaves_the_given_one_alone(name, kind, network, images):
    request = pal.split(images, REQUESTS[kind], test=0.0, holdout=CLASSES / COUNT, seed=0)
    before = fingerprint(network)
    if name in CLASSES_ONLY and kind != "class":
        with pytest.raises(MissingNeed, match="whole classes"):
            forget_quickly(network, request, name)
        return
    unlearned = forget_quickly(network, request, name)
    assert fingerprint(network) == before and unlearned is not network
    assert all(parameter.grad is None for parameter in network.parameters())
    assert type(unlearned) is type(network)
    assert not any(module.training for module in unlearned.modules())
    assert all(parameter.requires_grad for parameter in unlearned.parameters())
    assert any(moved.any() for moved in changed(network, unlearned).values())
    with torch.no_grad():
        logits = unlearned(torch.rand(2, *SHAPE))
    assert logits.shape == (2, CLASSES) and torch.isfinite(logits).all()


@pytest.mark.parametrize("name", METHODS)
def test_frozen_parameters_of_any_network_stay_frozen(name, network, images):
    partly = copy.deepcopy(network)
    first = next(name for name, parameter in partly.named_parameters() if parameter.dim() == 4)
    partly.get_parameter(first).requires_grad_(False)
    request = pal.split(images, REQUESTS["class"], test=0.0, holdout=CLASSES / COUNT, seed=0)
    unlearned = forget_quickly(partly, request, name)
    assert not unlearned.get_parameter(first).requires_grad
    if name not in ("retrain", "sign-retrain"):  # which start every weight afresh
        assert torch.equal(unlearned.get_parameter(first), partly.get_parameter(first))
