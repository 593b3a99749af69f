"""Diagonal Fisher information (parameter importances), batch-mean or per sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch
from palimpsest.core.task import Task

Importance = dict[str, Tensor]
"""Importance by parameter name, each of its parameter's shape."""


def squared_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    fisher: Literal["batch-mean", "per-sample"] = "batch-mean",
    chunk: int = 32,
) -> Importance:
    """Mean squared gradient of the loss for every trainable parameter.

    Evaluation mode is used, so that running statistics stay; the model is left untouched.

    Args:
        model: The network.
        batches: One pass over the data.
        task: Whose `loss_per_example` is differentiated.
        fisher: "batch-mean" squares the gradient of the mean loss of a batch and averages over batches
            (a short last batch counts as one), as the published SSD code does; "per-sample" squares
            every example's gradient and averages over examples, the diagonal empirical Fisher.
        chunk: Examples whose gradients are held at once ("per-sample").
    """
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = 0
    with evaluating(model):
        for batch in batches:
            if fisher == "batch-mean":
                loss = task.loss_per_example(model, batch).mean()
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        total[name] += gradient.detach() ** 2
                count += 1
            else:
                for name, squares in _per_sample_squares(model, batch, task, chunk).items():
                    total[name] += squares
                count += len(batch["id"])
    return {name: value / max(count, 1) for name, value in total.items()}


def _per_sample_squares(model: nn.Module, batch: Batch, task: Task, chunk: int) -> Importance:
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    rest |= dict(model.named_buffers())
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    class Bound(nn.Module):
        """Calls the model with given parameters, under the model's own name for tasks."""

        def __init__(self, given: dict[str, Tensor]):
            super().__init__()
            self.given = given

        def forward(self, *args: Tensor) -> Tensor:
            return functional_call(model, (self.given, rest), args)

    def loss_of_one(given: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        single = {key: value.unsqueeze(0) for key, value in example.items()}
        return task.loss_per_example(Bound(given), single).squeeze(0)

    per_sample = vmap(grad(loss_of_one), in_dims=(None, 0), chunk_size=chunk)(parameters, tensors)
    return {name: (value**2).sum(0) for name, value in per_sample.items()}
