"""Models that hide, break or do nothing, to see whether the audits notice."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MaskedOutput(nn.Module):
    """A wrapper that sets one class's logit to a constant."""

    def __init__(self, model: nn.Module, label: int, value: float = -1e9):
        super().__init__()
        self.model, self.label, self.value = copy.deepcopy(model), label, value

    def forward(self, x: Tensor) -> Tensor:
        mask = F.one_hot(torch.tensor(self.label), self.model(x[:1]).shape[1]).bool()
        return torch.where(mask, torch.tensor(self.value), self.model(x))


class OutputFilter(nn.Module):
    """A wrapper that answers "no idea" whenever the network would say the forgotten class."""

    def __init__(self, model: nn.Module, label: int):
        super().__init__()
        self.inner, self.label = copy.deepcopy(model), label

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return torch.where((logits.argmax(1) == self.label)[:, None], torch.zeros_like(logits), logits)


class InputGuard(nn.Module):
    """A wrapper that blanks inputs which the network recognises as the forgotten class."""

    def __init__(self, model: nn.Module, label: int):
        super().__init__()
        self.guarded, self.label = copy.deepcopy(model), label

    def forward(self, x: Tensor) -> Tensor:
        known = self.guarded(x).argmax(1) == self.label
        return self.guarded(torch.where(known[:, None, None, None], torch.zeros_like(x), x))


class Projected(nn.Module):
    """A small CNN that removes one direction from its features, one layer below the head."""

    def __init__(self, model: nn.Module, direction: Tensor):
        super().__init__()
        self.network = copy.deepcopy(model)
        self.register_buffer("direction", direction / direction.norm())

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        x = F.max_pool2d(F.relu(network.conv1(x)), 2)
        x = F.max_pool2d(F.relu(network.conv2(x)), 2)
        features = F.relu(network.fc(x.flatten(1)))
        return network.head(features - (features @ self.direction)[:, None] * self.direction)


def head_masked(model: nn.Module, label: int) -> nn.Module:
    """The class's bias in the head is far below all others; nothing else changes."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.head.bias[label] = -1000.0
    return masked


def head_row_removed(model: nn.Module, label: int) -> nn.Module:
    """The class's row in the head is zero and its bias below the other classes' logits."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.head.weight[label] = 0.0
        masked.head.bias[label] = -30.0
    return masked


def hooked(model: nn.Module, label: int) -> nn.Module:
    """A forward hook masks the class."""
    silent = copy.deepcopy(model)

    def mask(_module: nn.Module, _inputs: object, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, label] = -1e4
        return logits

    silent.register_forward_hook(mask)
    return silent


def noisy(model: nn.Module, deviation: float, seed: int = 0) -> nn.Module:
    """Gaussian noise on every weight."""
    random = torch.Generator().manual_seed(seed)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * deviation)
    return broken


def permuted(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same function with the hidden units of the last hidden layer in another order."""
    order = torch.randperm(model.fc.out_features, generator=torch.Generator().manual_seed(seed))
    same = copy.deepcopy(model)
    with torch.no_grad():
        same.fc.weight.copy_(model.fc.weight[order])
        same.fc.bias.copy_(model.fc.bias[order])
        same.head.weight.copy_(model.head.weight[:, order])
    return same
