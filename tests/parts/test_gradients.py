from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.errors import InvalidRecords, NonFiniteLoss
from palimpsest.parts.gradients import dot, length, mean_gradient


@pytest.fixture
def normed():
    """A network with batch norm, dropout, a frozen tensor and an unused one, in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4)).double()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    model[0].bias.requires_grad_(False)
    return model.train()


@pytest.fixture
def records():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 3, generator=generator, dtype=torch.float64)
    return pal.Records(TensorDataset(x, torch.arange(11) % 4))


@pytest.mark.parametrize("size", [1, 4, 11])
def test_the_gradient_is_that_of_the_mean_whatever_the_batches(normed, records, size, digits_task):
    runtime = pal.Runtime(device="cpu")
    found = mean_gradient(normed, runtime.batches(records, digits_task, size), digits_task)
    tensors = records.tensors
    normed.eval()
    F.cross_entropy(normed(tensors["input"]), tensors["label"]).backward()
    expected = {name: p.grad for name, p in normed.named_parameters() if p.requires_grad}
    assert set(found) == set(expected) and "0.bias" not in found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], torch.zeros(2).double() if gradient is None else gradient)


def test_the_model_is_left_as_it_was(normed, records, digits_task):
    before = {name: value.clone() for name, value in normed.state_dict().items()}
    with torch.no_grad():
        mean_gradient(normed, pal.Runtime().batches(records, digits_task, 4), digits_task)
    assert normed.training and all(p.grad is None for p in normed.parameters())
    assert all(torch.equal(before[name], value) for name, value in normed.state_dict().items())


def test_a_loss_that_is_not_finite_is_named_with_its_records(records, digits_task):
    model = nn.Linear(3, 4).double()
    with torch.no_grad():
        model.weight.fill_(1e308)
    with pytest.raises(NonFiniteLoss, match="records"):
        mean_gradient(model, pal.Runtime().batches(records, digits_task), digits_task)


def test_no_records_have_no_mean(normed, digits_task):
    with pytest.raises(InvalidRecords, match="at least one"):
        mean_gradient(normed, [], digits_task)


def test_products_and_lengths_run_over_all_tensors():
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    two = {"a": torch.tensor([1.0, 9.0]), "b": torch.tensor([[-2.0]])}
    assert length(one) == 5.0 and dot(one, two) == -5.0
