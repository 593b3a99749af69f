"""Gradients of the mean loss over whole sets of records, as directions in the space of parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidRecords, NonFiniteLoss
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch
from palimpsest.core.task import Task
from palimpsest.parts.parameters import trainable

Direction = dict[str, Tensor]
"""A direction in the space of trainable parameters, by name, each of its parameter's shape."""


def mean_gradient(model: nn.Module, batches: Iterable[Batch], task: Task) -> Direction:
    """Gradient of the mean loss over all records, in evaluation mode.

    Gradients of the summed loss are added up over the batches and divided by the number of records, so
    that the size of the batches does not matter and the set need not fit into memory. Batch-norm
    statistics stay, and so do the `grad` fields of the parameters.

    Raises:
        InvalidRecords: If there is no record.
        NonFiniteLoss: If a loss is NaN or Inf, naming records of its batch.
    """
    parameters = trainable(model)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    count = 0
    with torch.enable_grad(), evaluating(model):
        for batch in batches:
            loss = task.loss_per_example(model, batch).sum()
            if not torch.isfinite(loss):
                raise NonFiniteLoss(f"The loss is {loss.item()} on a batch with records {batch['id'][:3]}.")
            for name, part in gradient_of(loss, parameters).items():
                total[name] += part
            count += len(batch["id"])
    if count == 0:
        raise InvalidRecords("A mean gradient needs at least one record.")
    return {name: value / count for name, value in total.items()}


def gradient_of(value: Float[Tensor, ""], parameters: dict[str, nn.Parameter]) -> Direction:
    """Gradient of a scalar; zero for parameters that it does not depend on."""
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, (part.detach() for part in found), strict=True))


def dot(one: Direction, two: Direction) -> float:
    """Inner product of two directions."""
    return sum(float((one[name] * two[name]).sum()) for name in one)


def length(direction: Direction) -> float:
    """Euclidean length of a direction."""
    return dot(direction, direction) ** 0.5
