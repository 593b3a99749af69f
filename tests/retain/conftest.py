from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.runtime import Runtime
from palimpsest.models import build_model
from palimpsest.retain import LEARNERS, Keeps
from palimpsest.retain.transforms import relabelled


@pytest.fixture(scope="session")
def few_digits(digits):
    """Thirty records of each of six digits."""
    labels = digits.column("label")
    return digits.select(np.concatenate([np.flatnonzero(labels == label)[:30] for label in range(6)]))


@pytest.fixture
def small_mlp():
    return lambda classes, seed=0: build_model("mlp", (1, 8, 8), classes, seed=seed, width=24)


@pytest.fixture
def small_network(small_mlp, request):
    """A network that a learner can work with: a small MLP, or for learners that prompt a pretrained tiny ViT."""

    def made(name, classes, seed=0):
        prompted = Keeps.PRETRAINED in LEARNERS.get(name).card.keeps
        return (request.getfixturevalue("tiny_vit") if prompted else small_mlp)(classes, seed)

    return made


@pytest.fixture
def cpu():
    return lambda seed=0: Runtime(seed=seed, device="cpu")


@pytest.fixture
def weights():
    return lambda learner: torch.cat([p.detach().flatten() for p in learner.student.model.parameters()])


@pytest.fixture(scope="session")
def tiny_vit(digits):
    """A tiny vision transformer that has learned digits 6 to 9, with a new head of some classes."""
    from palimpsest.retain import Training
    from palimpsest.retain.pretraining import pretrain, with_encoder

    labels = digits.column("label")
    records = relabelled(digits.select(labels >= 6), {6: 0, 7: 1, 8: 2, 9: 3})

    def made(classes, seed=0):
        return build_model("small_vit", (1, 8, 8), classes, seed=seed, width=16, layers=2, heads=2, patch=2)

    training = Training(epochs=10, lr=0.005, batch_size=32, optimizer="adam", augmentation="jitter")
    encoder = pretrain(made(4), records, training, Runtime(seed=0, device="cpu"))
    return lambda classes, seed=0: with_encoder(made(classes, seed), encoder.weights)
