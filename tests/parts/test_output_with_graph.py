from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from palimpsest.core.errors import ModelMismatch, UnknownName
from palimpsest.parts.activations import output_with_graph


class Net(nn.Module):
    """A convolution whose output an inplace ReLU overwrites, and a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.Linear(8, 3)
        self.spare, self.total = nn.Linear(1, 1), Total()

    def forward(self, x):
        logits = self.head(self.act(self.conv(x)).flatten(1))
        self.total(logits)
        return logits


class Total(nn.Module):
    def forward(self, x):
        return x.sum()


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net(), torch.randn(5, 1, 2, 2)


def test_the_output_is_that_of_the_layer_before_what_follows_changes_it(net):
    model, x = net
    found = output_with_graph(model, lambda: model(x), "conv")
    expected = F.conv2d(x, model.conv.weight, model.conv.bias).flatten(1)
    assert (expected < 0).any()
    torch.testing.assert_close(found, expected)


def test_it_has_its_graph_and_leaves_no_hook(net):
    model, x = net
    gradients = torch.autograd.grad(output_with_graph(model, lambda: model(x), "conv").sum(), model.conv.bias)
    torch.testing.assert_close(gradients[0], torch.tensor([20.0, 20.0]))  # five records of four pixels
    assert not model.conv._forward_hooks


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        ("convv", UnknownName, "Did you mean 'conv'"),
        ("spare", ModelMismatch, "does not run"),
        ("total", ModelMismatch, "no vector per record"),
    ],
)
def test_a_layer_without_an_output_per_record_is_refused(net, layer, error, words):
    model, x = net
    with pytest.raises(error, match=words):
        output_with_graph(model, lambda: model(x), layer)
