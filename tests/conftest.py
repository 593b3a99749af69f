"""Models and requests on the digits that many tests share, trained once per session."""

from __future__ import annotations

import pytest
import torch

import palimpsest as pal
from palimpsest.models import build_model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums depend on the number of threads in the last bit, and small models run no faster with more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits():
    return pal.load_data("digits")


@pytest.fixture(scope="session")
def digits_task():
    return pal.tasks.Classification()


@pytest.fixture(scope="session")
def class_request(digits):
    return pal.split(digits, forget=pal.by_column("label", 3), test=0.2, holdout=0.2, seed=0)


@pytest.fixture(scope="session")
def random_request(digits):
    return pal.split(digits, forget=pal.by_fraction(0.1, seed=0), test=0.2, holdout=0.2, seed=0)


@pytest.fixture(scope="session")
def digits_model(class_request, digits_task):
    model = build_model("small_cnn", (1, 8, 8), 10, seed=0)
    return pal.train(model, class_request.train, task=digits_task, epochs=20, seed=0)


@pytest.fixture(scope="session")
def class_controls(digits_model, class_request, digits_task):
    return [pal.forget(digits_model, class_request, "retrain", digits_task, seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="session")
def random_controls(digits_model, random_request, digits_task):
    return [pal.forget(digits_model, random_request, "retrain", digits_task, seed=seed) for seed in (1, 2, 3)]
