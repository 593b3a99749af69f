"""SalUn: random labels, trained through a mask of the weights that are salient for the forget set."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.classifier.random_label import (
    LabelSet,
    Order,
    check_relabelling,
    false_labels,
    relabelled,
)
from palimpsest.parts.parameters import Mask, check_mask, masked_updates, snapshot, trainable
from palimpsest.parts.training import TrainingRecipe, step


@unlearner(
    "salun",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("classification",),
    paper=Paper(
        "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image "
        "Classification and Generation",
        "ICLR 2024",
        "2310.12508",
    ),
    search={"ratio": Span(0.2, 0.8), "lr": Span(1e-3, 0.05, log=True), "epochs": Span(2, 10, integer=True)},
)
@dataclass(frozen=True)
class SalUn:
    """Train on random labels, but move only the weights with the largest forget gradients.

    The mask keeps the share `ratio` of all weights, ranked together by the absolute gradient of the loss
    on the forget set. Weights outside it, and their momentum, are put back after every step, because
    weight decay and momentum would move them too. The soft variant has no mask: after every step the
    change of every weight is shrunk towards zero, by as much as brings the smallest changes to nothing.

    Deviations: false labels exclude the true class, as the paper's equation says; the code draws among all
    (`label_set="all"`). The soft variant shrinks towards the original weights; the published code
    shrinks towards those at the start of each epoch, and counts the steps of mixed epochs as one.
    Batches are smaller than the published 256, for small data.

    Attributes:
        ratio: Share of weights that may move, in (0, 1]. In the soft variant the share that may differ
            from the original after the first step, rising to all of them at the end.
        soft: Whether to shrink changes instead of masking.
        mask: A mask measured before (boolean, by parameter name), instead of measuring one.
        label_set: "others" or "all" classes, see `RandomLabel`.
        order: "sequential" (all forget records, then all retained ones) or "mixed".
        lr: Learning rate; 6e-3 to 1.3e-2 are published.
        epochs: Passes over all records.
        batch_size: Records per step.
        optimizer: "sgd" as published; "adam" or "adamw".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
        mode: "train" as published (batch-norm statistics move, they are not weights), or "eval".
    """

    ratio: float = 0.5
    soft: bool = False
    mask: Mask | None = None
    label_set: LabelSet = "others"
    order: Order = "sequential"
    lr: float = 0.013
    epochs: int = 10
    batch_size: int = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        _ = self.recipe
        check_range("ratio", self.ratio, 0, 1, open_low=True)
        check_relabelling(self.label_set, self.order, self.mode)
        if self.soft and self.mask is not None:
            raise InvalidHyperparameter("The soft variant of SalUn takes no mask: give either of them.")

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model, in which only salient weights have moved.

        Raises:
            MissingNeed: If the retained records are not at hand.
            ModelMismatch: If a given mask does not fit the model.
            InvalidHyperparameter: If the ratio selects no weight, or no wrong label is left to draw.
            NonFiniteLoss: If training diverges.
        """
        student = runtime.place(copy.deepcopy(model))
        trainable(student)
        draw = false_labels(student, split, task, runtime, self.label_set)
        optimizer = self.recipe.build_optimizer(student)
        order = runtime.generator("salun order")
        with self._restraint(student, optimizer, split, task, runtime), runtime.seeded("salun"):
            student.train(self.mode == "train")
            for _ in runtime.track(range(self.epochs), "salun"):
                for batch in relabelled(split, task, runtime, draw, self.order, self.batch_size, order):
                    step(student, optimizer, task.loss_per_example(student, batch).mean(), batch)
        return student.eval()

    def _restraint(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        split: ForgetSplit,
        task: Task,
        runtime: Runtime,
    ) -> AbstractContextManager[None]:
        """What keeps weights where they are: the mask, or the shrinkage."""
        if split.retain is None:
            raise MissingNeed("SalUn needs the retained records.")
        if self.soft:
            sizes = [len(split.train)] if self.order == "mixed" else [len(split.forget), len(split.retain)]
            steps = self.epochs * sum(-(-size // self.batch_size) for size in sizes)
            return proximal_updates(student, optimizer, 1 - self.ratio, steps)
        mask = self.mask
        if mask is None:
            batches = runtime.batches(split.forget, task, self.batch_size)
            mask = saliency_mask(student, batches, task, self.ratio)
        check_mask(mask, student)
        if not any(bool(chosen.any()) for chosen in mask.values()):
            raise InvalidHyperparameter(f"No weight may move: the mask of ratio {self.ratio} is empty.")
        return masked_updates(student, optimizer, mask)


def saliency_mask(
    model: nn.Module, batches: Iterable[Batch], task: Task, ratio: float
) -> dict[str, Bool[Tensor, "*shape"]]:
    """The int(ratio * P) of all P weights with the largest absolute forget gradient, by parameter name.

    The gradient is the sum over batches of that of the (negative) mean loss, in evaluation mode; weights
    of all parameters are ranked together, ties in order of definition.

    Args:
        model: The original model; left untouched.
        batches: One pass over the forget records.
        task: Whose loss is differentiated.
        ratio: Share to select, in (0, 1].

    Raises:
        InvalidHyperparameter: If the ratio is out of range.
        InvalidRecords: If there is no batch.
    """
    check_range("ratio", ratio, 0, 1, open_low=True)
    parameters = trainable(model)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    seen = 0
    with torch.enable_grad(), evaluating(model):
        for batch in batches:
            loss = -task.loss_per_example(model, batch).mean()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
            seen += 1
    if seen == 0:
        raise InvalidRecords("A saliency mask needs at least one forget record.")
    saliency = torch.cat([value.abs().flatten() for value in total.values()])
    chosen = torch.zeros(len(saliency), dtype=torch.bool, device=saliency.device)
    chosen[torch.sort(saliency, descending=True, stable=True).indices[: int(ratio * len(saliency))]] = True
    pieces = torch.split(chosen, [value.numel() for value in total.values()])
    return {name: piece.view_as(total[name]) for name, piece in zip(total, pieces, strict=True)}


def shrink(change: Float[Tensor, " weights"], share: float) -> Float[Tensor, " weights"]:
    """Soft thresholding: move every change towards zero by the int(share * P)-th smallest magnitude.

    At least that many of the P changes become zero; none if the number is zero.
    """
    count = int(share * len(change))
    if count == 0:
        return change
    threshold = change.abs().kthvalue(count).values
    return change.sign() * (change.abs() - threshold).clamp(min=0)


@contextmanager
def proximal_updates(
    model: nn.Module, optimizer: torch.optim.Optimizer, share: float, steps: int
) -> Iterator[None]:
    """After every step, `shrink` the change of all weights; the share falls from `share` to 0 over `steps`."""
    parameters, anchor = trainable(model), snapshot(model)
    taken = 0

    @torch.no_grad()
    def pull_back(*_: Any) -> None:
        nonlocal taken
        changes = [(parameter - anchor[name]).flatten() for name, parameter in parameters.items()]
        shrunk = shrink(torch.cat(changes), share * max(0.0, 1 - taken / steps))
        pieces = torch.split(shrunk, [len(change) for change in changes])
        for (name, parameter), piece in zip(parameters.items(), pieces, strict=True):
            parameter.copy_(anchor[name] + piece.view_as(parameter))
        taken += 1

    hook = optimizer.register_step_post_hook(pull_back)
    try:
        yield
    finally:
        hook.remove()
