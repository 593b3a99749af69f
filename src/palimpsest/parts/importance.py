"""Importance of every parameter: squared gradients of the loss (diagonal Fisher) or output sensitivity.

Importances of the full training set can be measured once, at training time, and kept in a file
(`parts.importance_file`); a method that compares with them then answers an erasure request without the
retained data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from palimpsest.core.errors import (
    InvalidHyperparameter,
    InvalidRecords,
    ModelMismatch,
    NonFinite,
    shorten,
)
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.parts.parameters import trainable, unwrapped
from palimpsest.parts.training import differentiable_twice

Importance = dict[str, Tensor]
"""Importance by parameter name (tied parameters once, no wrapper prefixes), each of its parameter's shape."""

Averaging = Literal["batch-mean", "per-sample"]
Objective = Callable[[nn.Module, Batch], Float[Tensor, " batch"]]


@dataclass(frozen=True)
class Measure:
    """How importances were measured; two can only be compared if they agree in this.

    Attributes:
        of: "loss" (squared gradients of the task's loss) or "output" (absolute gradients of the squared
            norm of the outputs).
        averaging: "batch-mean" takes the gradient of a batch's mean and averages over batches;
            "per-sample" takes every example's gradient and averages over examples.
        batch_size: Records per batch; part of the definition with "batch-mean".
        shuffle: Whether the records were read in random order; likewise.
    """

    of: Literal["loss", "output"] = "loss"
    averaging: Averaging = "batch-mean"
    batch_size: int = 64
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.of not in ("loss", "output"):
            raise InvalidHyperparameter(f"Importance is of the 'loss' or the 'output', not {self.of!r}.")
        if self.averaging not in ("batch-mean", "per-sample"):
            raise InvalidHyperparameter(
                f"Importances are averaged 'batch-mean' or 'per-sample', not {self.averaging!r}."
            )
        if self.batch_size < 1:
            raise InvalidHyperparameter(f"batch_size must be at least 1, not {self.batch_size}.")

    def comparable_with(self, other: Measure) -> bool:
        """Whether importances of both may be compared: batches matter only where they are averaged."""
        same = self.of == other.of and self.averaging == other.averaging
        batches = (self.batch_size, self.shuffle) == (other.batch_size, other.shuffle)
        return same and (batches or self.averaging == "per-sample")


def squared_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    fisher: Averaging = "batch-mean",
    chunk: int = 32,
) -> Importance:
    """Mean squared gradient of the loss for every trainable parameter: the diagonal empirical Fisher.

    Evaluation mode is used, so that running statistics stay; the model is left untouched.

    Args:
        model: The network.
        batches: One pass over the data.
        task: Whose `loss_per_example` is differentiated.
        fisher: "batch-mean" squares the gradient of the mean loss of a batch and averages over batches
            (a short last batch counts as one), as the published SSD code does; "per-sample" squares
            every example's gradient and averages over examples.
        chunk: Examples whose gradients are held at once ("per-sample").

    Raises:
        InvalidRecords: If there is no batch.
        ModelMismatch: If the model has no trainable parameters.
    """
    return _mean_gradients(model, batches, task.loss_per_example, torch.square, fisher, chunk)


def output_sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    averaging: Averaging = "batch-mean",
    chunk: int = 32,
) -> Importance:
    """Mean absolute gradient of the squared norm of the outputs; no label is read.

    With outputs f(x), the gradient of the batch mean of ||f(x)||^2 (or of every example's, "per-sample").
    From "Loss-Free Machine Unlearning" (arXiv 2402.19308), after memory-aware synapses.

    Args:
        model: The network.
        batches: One pass over the data.
        task: Whose `logits` are the outputs.
        averaging: "batch-mean" or "per-sample".
        chunk: Examples whose gradients are held at once ("per-sample").

    Raises:
        InvalidRecords: If there is no batch.
        ModelMismatch: If the outputs are no tensor, or the model has no trainable parameters.
    """

    def squared_norm(network: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        outputs = task.logits(network, batch)
        if not isinstance(outputs, Tensor):
            raise ModelMismatch(
                f"Output sensitivity needs outputs that are a tensor; the model gave {type(outputs).__name__}."
            )
        return outputs.flatten(1).square().sum(1)

    return _mean_gradients(model, batches, squared_norm, torch.abs, averaging, chunk)


def measure_importance(
    model: nn.Module, records: Records, task: Task, runtime: Runtime, measure: Measure
) -> Importance:
    """Importances of one set of records under a measure; shuffled ones from the stream "importance"."""
    order = runtime.generator("importance") if measure.shuffle else None
    batches = runtime.batches(records, task, measure.batch_size, shuffle=order)
    model = runtime.place(model)
    if measure.of == "loss":
        return squared_gradients(model, batches, task, measure.averaging)
    return output_sensitivity(model, batches, task, measure.averaging)


def quadratic_anchor(
    model: nn.Module, anchor: Mapping[str, Tensor], importance: Importance | None = None
) -> Float[Tensor, ""]:
    """Half the squared distance to `anchor`, each parameter weighted by its importance if given.

    1/2 sum_i w_i (theta_i - anchor_i)^2 with w_i = 1 or importance, with its graph.
    """
    terms = [
        ((parameter - anchor[name]) ** 2 * (1.0 if importance is None else importance[name])).sum()
        for name, parameter in trainable(model).items()
    ]
    return 0.5 * torch.stack(terms).sum()


def check_importance(importance: Mapping[str, Tensor], model: nn.Module, what: str = "stored") -> None:
    """Check that importances fit a model's trainable parameters.

    Raises:
        ModelMismatch: If names or shapes differ, or a value is negative.
        NonFinite: If a value is NaN or Inf.
    """
    parameters = trainable(model)
    missing = [name for name in parameters if name not in importance]
    if missing:
        raise ModelMismatch(f"The {what} importances lack {len(missing)} parameters: {shorten(missing)}.")
    for name, parameter in parameters.items():
        value = importance[name]
        if value.shape != parameter.shape:
            raise ModelMismatch(
                f"The {what} importances of '{name}' have shape {tuple(value.shape)}, the parameter has "
                f"{tuple(parameter.shape)}."
            )
        if not torch.isfinite(value).all():
            raise NonFinite(f"The {what} importances of '{name}' hold NaN or Inf.")
        if (value < 0).any():
            raise ModelMismatch(f"The {what} importances of '{name}' hold negative values.")


def _mean_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    objective: Objective,
    magnitude: Callable[[Tensor], Tensor],
    averaging: Averaging,
    chunk: int,
) -> Importance:
    """Average over batches, or over examples, of `magnitude` of the objective's gradient."""
    parameters = trainable(model)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    count = 0
    with torch.enable_grad(), evaluating(model):
        for batch in batches:
            if averaging == "batch-mean":
                mean = objective(model, batch).mean()
                found = torch.autograd.grad(mean, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, found, strict=True):
                    if gradient is not None:
                        total[name] += magnitude(gradient.detach())
                count += 1
            else:
                for name, summed in _per_sample(model, batch, objective, magnitude, chunk).items():
                    total[name] += summed
                count += len(batch["id"])
    if count == 0:
        raise InvalidRecords("Importances need at least one record.")
    return {name: value / count for name, value in total.items()}


def _per_sample(
    model: nn.Module,
    batch: Batch,
    objective: Objective,
    magnitude: Callable[[Tensor], Tensor],
    chunk: int,
) -> Importance:
    """Sum over the examples of a batch of `magnitude` of their gradients, `chunk` examples at a time."""
    inner = unwrapped(model)
    moving = {name: p.detach() for name, p in trainable(model).items()}
    fixed = {name: p.detach() for name, p in inner.named_parameters() if not p.requires_grad}
    fixed |= dict(inner.named_buffers())
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    class Bound(nn.Module):
        """The model with given parameters, callable where a task expects a model."""

        def __init__(self, given: dict[str, Tensor]):
            super().__init__()
            self.given = given

        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return functional_call(inner, (self.given, fixed), args, kwargs)

    def of_one(given: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        single = {key: value.unsqueeze(0) for key, value in example.items()}
        return objective(Bound(given), single).squeeze(0)

    total = {name: torch.zeros_like(value) for name, value in moving.items()}
    size = len(batch["id"])
    with differentiable_twice():  # the fused kernels of attention cannot be vectorised over examples either
        for start in range(0, size, chunk):
            part = {key: value[start : start + chunk] for key, value in tensors.items()}
            for name, gradients in vmap(grad(of_one), in_dims=(None, 0))(moving, part).items():
                total[name] += magnitude(gradients).sum(0)
    return total
