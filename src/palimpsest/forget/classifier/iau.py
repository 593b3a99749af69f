"""Influence approximation unlearning: one step up the forget loss and down the retained loss."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass
from typing import Literal

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.gradients import Direction, dot, length, mean_gradient
from palimpsest.parts.parameters import snapshot, trainable
from palimpsest.parts.training import TrainingRecipe, recipe_of

log = logging.getLogger("palimpsest")


@unlearner(
    "iau",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    paper=Paper("Efficient Machine Unlearning via Influence Approximation", "arXiv 2025", "2507.23257"),
    search={"lr": Span(5e-4, 1e-2, log=True)},
)
@dataclass(frozen=True)
class IAU:
    """Take one optimiser step along (mean retained gradient - mean forget gradient); no Hessian.

    To first order, deleting a record has the influence of adding one whose gradient is the opposite, and
    adding records is what gradient descent does cheaply. Three parts: ascent on the forget records
    (incremental approximation), descent on the retained records in the same step (gradient correction,
    `correction`), and a penalty at training time that keeps gradients small so that a single step is
    accurate (gradient restriction). The last is a matter of how the original is trained:
    `palimpsest.train(..., gradient_restriction=0.005)`; the step itself runs on any model.

    Costs two passes of gradients, a small fraction of retraining: use it for answers in seconds, and
    search `lr`, for all forgetting lies in that one number. On the digits (small CNN, one class) Adam
    hardly forgets at 1e-3, largely at 3e-3, and wholly at 4e-3 to 5e-3; 1e-2 destroys the model; plain SGD
    needs 0.05 to 0.1. Random records of all classes are not told apart so well: they take test records
    with them from 3e-3 on. At an exact optimum the correction only lengthens the ascent, by 1 + n_f / n_r:
    after a training to the end a single step gains nothing reliable from it; after early stopping it often
    helps, and over several steps it saves a point or two of accuracy.

    The gradients are those of whole sets, summed over mini-batches: the size of the batches does not matter.

    Deviations: evaluation mode throughout (the published script leaves the model in training mode, where
    batch norm would normalise by the whole set and move its statistics). The published script takes a
    fresh Adam, whose first step is lr * g / (|g| + 1e-8), nearly the sign of g; the paper writes a plain
    gradient step: both are here. More than one step (`steps`) is an option of ours: gradients are taken
    anew before each, with the same optimiser, and rates must be smaller in proportion: several SGD steps at a
    rate that suits one diverge. The published originals stop training early by validation accuracy;
    `palimpsest.train` takes the number of epochs that it is told. A further request is the same step from
    the model that the last one gave, with the records still retained.

    Attributes:
        lr: Learning rate of the step, above 0; published is that of training.
        optimizer: "adam" (fresh; the published script) or "sgd" (plain; the paper).
        steps: Number of steps; the method is one.
        correction: Whether the retained gradient is part of the step; without it (an ablation) no
            retained records are read.
    """

    lr: float = 1e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    steps: int = 1
    correction: bool = True

    def __post_init__(self) -> None:
        check_range("lr", self.lr, 0, float("inf"), open_low=True)
        check_range("steps", self.steps, 1, float("inf"))
        if self.optimizer not in ("adam", "sgd"):
            raise InvalidHyperparameter(f"optimizer must be 'adam' or 'sgd', not {self.optimizer!r}.")
        _ = self.recipe

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimiser's settings."""
        return TrainingRecipe(epochs=1, lr=self.lr, optimizer=self.optimizer, momentum=0.0)

    @property
    def supplies(self) -> frozenset[Need]:
        """Without the correction the retained data are not needed."""
        return frozenset() if self.correction else frozenset({Need.RETAIN_DATA, Need.RETAIN_LABELS})

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model after the step.

        Raises:
            MissingNeed: If the correction is on and the retained records are not at hand.
            NonFiniteLoss: If a loss is NaN or Inf before a step.
        """
        student, _ = self.unlearn_and_report(model, split, task, runtime)
        return student

    def unlearn_and_report(
        self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime
    ) -> tuple[nn.Module, tuple[StepReport, ...]]:
        """The same, with an account of every step, which is logged as well."""
        if self.correction and split.retain is None:
            raise MissingNeed("The gradient correction of IAU needs the retained records.")
        kept = split.retain if self.correction else None
        student = runtime.place(copy.deepcopy(model))
        start, optimizer = snapshot(student), self.recipe.build_optimizer(student)
        reports: list[StepReport] = []
        for _ in runtime.track(range(self.steps), "iau"):
            began = time.perf_counter()
            forget = mean_gradient(student, runtime.batches(split.forget, task), task)
            retain = mean_gradient(student, runtime.batches(kept, task), task) if kept is not None else None
            direction = descent_direction(forget, retain)
            sizes = gradient_sizes(forget, retain)
            passed = time.perf_counter()
            for name, parameter in trainable(student).items():
                parameter.grad = direction[name]
            optimizer.step()
            stepped = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            moved = {name: p.detach() - start[name] for name, p in trainable(student).items()}
            trained, distance = recipe_of(model), length(moved)
            report = StepReport(
                forget_records=len(split.forget),
                retain_records=len(kept) if kept is not None else 0,
                optimizer=self.optimizer,
                lr=self.lr,
                gradient_restriction=trained.gradient_restriction if trained else None,
                forget_norm=sizes[0],
                retain_norm=sizes[1],
                cosine=sizes[2],
                distance=distance,
                gradient_seconds=passed - began,
                step_seconds=stepped - passed,
            )
            reports.append(report)
            log.info("iau, step %d of %d: %s", len(reports), self.steps, report)
        return student, tuple(reports)


@dataclass(frozen=True)
class StepReport:
    """What one step was made of.

    Attributes:
        forget_records: Number of forget records.
        retain_records: Number of retained records in the correction; 0 without it.
        optimizer: "adam" or "sgd".
        lr: Learning rate of the step.
        gradient_restriction: Weight of the penalty that the original was trained with, 0 for ordinary
            training; None if the model does not say how it was trained.
        forget_norm: Length of the mean forget gradient before the step.
        retain_norm: Length of the mean retained gradient; None without the correction.
        cosine: Between the two gradients; None without the correction, NaN if one of them is zero.
        distance: Between the parameters after the step and the original's.
        gradient_seconds: Time of the passes over the records.
        step_seconds: Time of the optimiser's step.
    """

    forget_records: int
    retain_records: int
    optimizer: str
    lr: float
    gradient_restriction: float | None
    forget_norm: float
    retain_norm: float | None
    cosine: float | None
    distance: float
    gradient_seconds: float
    step_seconds: float


def descent_direction(forget: Direction, retain: Direction | None) -> Direction:
    """What the optimiser descends: mean retained gradient - mean forget gradient.

    Args:
        forget: Gradient of the mean loss over the forget records.
        retain: Gradient of the mean loss over the retained records; None leaves the ascent alone.
    """
    return {name: -gone if retain is None else retain[name] - gone for name, gone in forget.items()}


def gradient_sizes(forget: Direction, retain: Direction | None) -> tuple[float, float | None, float | None]:
    """Length of the forget gradient, length of the retained gradient, cosine between them."""
    if retain is None:
        return length(forget), None, None
    gone, kept = length(forget), length(retain)
    return gone, kept, dot(forget, retain) / (gone * kept) if gone * kept else float("nan")
