"""Ten requests, one after the other, each answered by the model that answered the one before."""

from __future__ import annotations

import pytest
import torch
from tests.forget.every_classifier_method import CLASSES_ONLY, METHODS, forget_quickly
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.models import build_model

CLASSES, PER_CLASS, REQUESTS = 12, 5, 10


@pytest.fixture(scope="module")
def records():
    """Twelve classes of noisy images, each around its own pattern."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES * PER_CLASS) % CLASSES
    patterns = torch.rand(CLASSES, 1, 8, 8, generator=generator)
    noise = torch.rand(len(labels), 1, 8, 8, generator=generator)
    return pal.Records(TensorDataset(0.7 * patterns[labels] + 0.3 * noise, labels))


@pytest.fixture(scope="module")
def model(records):
    """With batch norm, whose statistics ten runs could spoil."""
    network = build_model("small_resnet", (1, 8, 8), CLASSES, seed=0, width=4)
    return pal.train(network, records, task=pal.tasks.Classification(), epochs=3, lr=3e-3, seed=0)


def successive(records, kind):
    """Requests that each take from what the last one retained; one record of each class is never trained on."""
    count = len(records) - CLASSES
    train, holdout = records.select(range(count)), records.select(range(count, len(records)))
    for number in range(REQUESTS):
        if kind == "class":
            mask = train.column("label") == number
        else:
            mask = torch.arange(len(train)).numpy() % (len(train) // 3) == 0
        yield pal.ForgetSplit(train.select(mask), train.select(~mask), holdout=holdout)
        train = train.select(~mask)


CASES = [
    (name, kind)
    for name in METHODS
    for kind in ("class", "single records")
    if kind == "class" or name not in CLASSES_ONLY
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_ten_requests_in_a_row_leave_a_model_with_finite_weights(name, kind, model, records):
    current = model
    for number, request in enumerate(successive(records, kind)):
        current = forget_quickly(current, request, name, seed=number)
        assert all(torch.isfinite(value).all() for value in current.state_dict().values())
    with torch.no_grad():
        logits = current(torch.rand(4, 1, 8, 8))
    assert number == REQUESTS - 1 and logits.shape == (4, CLASSES) and torch.isfinite(logits).all()
