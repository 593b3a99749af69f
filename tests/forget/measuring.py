"""What the tests of methods measure."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from palimpsest.core.records import Records
from palimpsest.core.split import ForgetSplit


def tensors_of(records: Records | None) -> dict[str, torch.Tensor]:
    """The stacked fields of records that lie in memory."""
    assert records is not None
    tensors = records.tensors
    assert tensors is not None
    return tensors


@torch.no_grad()
def accuracy(model: nn.Module, records: Records | None) -> float:
    """Share of records in memory that a model classifies rightly."""
    tensors = tensors_of(records)
    return float((model(tensors["input"]).argmax(1) == tensors["label"]).float().mean())


def kept_and_gone(model: nn.Module, request: ForgetSplit) -> tuple[float, float]:
    """Accuracy on test records of kept classes and of classes forgotten as a whole."""
    assert request.test is not None
    gone = request.like_forgotten(request.test)
    return accuracy(model, request.test.select(~gone)), accuracy(model, request.test.select(gone))


def fingerprint(model: nn.Module) -> str:
    """Hash of all weights and buffers, with their names, bit for bit."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def changed(before: nn.Module, after: nn.Module) -> dict[str, torch.Tensor]:
    """Which entries of each parameter differ in any bit of their value."""
    old = dict(before.named_parameters())
    return {name: parameter.detach() != old[name].detach() for name, parameter in after.named_parameters()}
