from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.runtime import Runtime
from palimpsest.models import build_model


@pytest.fixture(scope="session")
def few_digits(digits):
    """Thirty records of each of six digits."""
    labels = digits.column("label")
    return digits.select(np.concatenate([np.flatnonzero(labels == label)[:30] for label in range(6)]))


@pytest.fixture
def small_mlp():
    return lambda classes, seed=0: build_model("mlp", (1, 8, 8), classes, seed=seed, width=24)


@pytest.fixture
def cpu():
    return lambda seed=0: Runtime(seed=seed, device="cpu")


@pytest.fixture
def weights():
    return lambda learner: torch.cat([p.detach().flatten() for p in learner.student.model.parameters()])
