"""Fine-tuning copies of all models alike, and watching what comes back.

The copies stay in evaluation mode: batch-norm statistics of a handful of records would wreck any model,
and dropout would make the comparison noisy. Weights move, running statistics do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from palimpsest.audit.attacks.curves import Curve
from palimpsest.audit.attacks.knowledge import Watched
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter, UnknownName
from palimpsest.core.evidence import Evidence
from palimpsest.core.records import Batch, Records
from palimpsest.core.task import Task
from palimpsest.parts.activations import head_name, module_of
from palimpsest.tasks.regression import Regression

LOGIT_BOUND = 1e4
"""Logits beyond this are cut in the attack's loss, so that a mask of -inf gives no infinite loss."""
LEARNING_RATES = {"adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
"""The grids from which a learning rate is chosen on a control."""


@dataclass(frozen=True)
class Budget:
    """How an attacker trains.

    Attributes:
        steps: Descent steps.
        every: Measure after every so many steps.
        optimizer: "adam", or "sgd" with momentum 0.9.
    """

    steps: int = 40
    every: int = 2
    optimizer: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        if self.steps < 1 or not 1 <= self.every <= self.steps:
            raise InvalidHyperparameter(
                f"steps must be at least 1 and every between 1 and steps, not {self.steps} and {self.every}."
            )
        if self.optimizer not in LEARNING_RATES:
            raise InvalidHyperparameter(f"optimizer must be 'adam' or 'sgd', not {self.optimizer!r}.")

    @property
    def measured_at(self) -> list[int]:
        """Steps after which is measured: 0 (before the first), every so many, and the last."""
        return sorted({0, *range(self.every, self.steps + 1, self.every), self.steps})

    def optimizer_of(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer over all parameters that require a gradient."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise InvalidAudit("it has no parameters that could be tuned")
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr, fused=True)
        return torch.optim.SGD(parameters, lr, momentum=0.9)


def tune(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    watched: Watched,
    task: Task,
    budget: Budget,
) -> Curve:
    """Tune a model in place (the caller owns it), measuring as it goes.

    Args:
        model: A copy that may be changed, in evaluation mode.
        optimizer: Over its parameters.
        batches: One per step; fewer are used in turn.
        watched: What to measure on.
        task: Whose loss is descended.
        budget: Steps, and when to measure.

    Raises:
        InvalidAudit: If the model's outputs do not depend on its parameters.
    """
    seen = [watched.measure(model)]
    diverged = False
    measured_at = budget.measured_at
    for step in range(1, budget.steps + 1):
        diverged = diverged or not _descend(model, batches[(step - 1) % len(batches)], task, optimizer)
        if step in measured_at:
            seen.append(seen[-1] if diverged else watched.measure(model))
    right, confidence = (np.stack(values) for values in zip(*seen, strict=True))
    return Curve(measured_at, right, confidence, diverged)


def _descend(model: nn.Module, batch: Batch, task: Task, optimizer: torch.optim.Optimizer) -> bool:
    """One step; False if the loss is not finite, and then nothing is applied."""
    logits = task.logits(model, batch)
    if not isinstance(task, Regression):  # numbers may be large
        logits = logits.clamp(-LOGIT_BOUND, LOGIT_BOUND)
    loss = task.loss_of_logits(logits, batch).mean()
    if not loss.requires_grad:
        raise InvalidAudit("no gradient reaches its parameters from its outputs")
    if not torch.isfinite(loss):
        return False
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return True


def step_batches(
    evidence: Evidence, records: Records, steps: int, batch_size: int, random: np.random.Generator
) -> list[Batch]:
    """The batches of an attack, the same for every model: all records at once if they fit, else shuffled."""
    runtime, task = evidence.runtime, evidence.task
    if len(records) <= batch_size:
        return list(runtime.batches(records, task, batch_size))
    batches: list[Batch] = []
    while len(batches) < steps:
        order = random.permutation(len(records))[: (steps - len(batches)) * batch_size]
        batches.extend(runtime.batches(records.select(order), task, batch_size, drop_last=True))
    return batches[:steps]


def choose_learning_rate(run: Callable[[float], bool], grid: Sequence[float]) -> float:
    """The smallest learning rate of an ascending grid for which `run` succeeds, the largest if none does.

    Success is taken to stay once it came, so that few runs are needed: the search starts in the middle.

    Example:
        >>> choose_learning_rate(lambda rate: rate > 0.005, (1e-4, 1e-3, 1e-2, 1e-1))
        0.01
    """
    low, high = 0, len(grid) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if run(grid[middle]) else (middle + 1, high)
    return grid[low]


def level_head(model: nn.Module, labels: Sequence[int], task: Task, fresh: bool = False) -> None:
    """Bring the head's biases of the given labels into the range of the other labels' biases, in place.

    A bias is one number that an attacker can set: a class that is silenced by it alone (-20, or -1e9) is
    not gone, and no learning rate that suits weights would bring such a number back within a budget. In a
    retrained model the bias lies near the others already. A head that is not a linear layer with a bias
    is left as it is.

    Args:
        model: A copy that may be changed.
        labels: Of the classes that were forgotten as a whole.
        task: Knows the head, if the user named one.
        fresh: Also set the labels' rows of weights to zero, so that they are learned anew from the
            features, however far the outputs were pushed away.
    """
    try:
        head = module_of(model, getattr(task, "head", None) or head_name(model))
    except UnknownName:
        return
    if not isinstance(head, nn.Linear) or head.bias is None:
        return
    own = [label for label in labels if label < len(head.bias)]
    others = [label for label in range(len(head.bias)) if label not in own]
    if own and others:
        with torch.no_grad():
            head.bias[own] = head.bias[own].clamp(head.bias[others].min(), head.bias[others].max())
            if fresh:
                head.weight[own] = 0.0
