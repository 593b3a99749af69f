"""Boundary shrink: give forget records the label of the nearest adversarial example."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.pairing import shuffled
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step
from palimpsest.tasks.classification import Classification

GRAY_LEVELS = 255


@unlearner(
    "boundary-shrink",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS},
    tasks=("classification",),
    paper=Paper(
        "Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision Boundary",
        "CVPR 2023",
    ),
    search={
        "epsilon": Span(0.05, 0.5),
        "lr": Span(1e-5, 3e-3, log=True),
        "epochs": Span(1, 10, integer=True),
    },
)
@dataclass(frozen=True)
class BoundaryShrink:
    """Fine-tune forget records to the class that lies just across the decision boundary.

    Every forget record is moved one signed-gradient step against the original model; the original's
    answer to the moved record becomes the record's new label, on which the unmoved record is trained.
    A record whose moved copy is still classified as before keeps its label, so a small `epsilon` forgets
    less. Needs no retained data: use it when only the forget set is at hand, and a whole class or most of one
    is to go; with records of all classes it damages all classes. Inputs must lie in [0, 1] (pixels, not
    normalised ones), because moved records are clipped to that range.

    The defaults suit small data (the digits). Published: SGD lr 1e-5 with momentum 0.9, 10 epochs.

    Attributes:
        epsilon: Largest change of an input value, in (0, 1].
        epochs: Passes over the forget set.
        lr: Learning rate.
        batch_size: Records per step.
        optimizer: "adam", "adamw" or "sgd".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
    """

    epsilon: float = 0.1
    epochs: int = 5
    lr: float = 1e-3
    batch_size: int = 64
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range("epsilon", self.epsilon, 0, 1, open_low=True)
        self._recipe()

    def unlearn(
        self, model: nn.Module, split: ForgetSplit, task: Classification, runtime: Runtime
    ) -> nn.Module:
        """The fine-tuned copy.

        Raises:
            InvalidRecords: If inputs are not numbers in [0, 1].
        """
        trainable(model)  # a model that cannot move is an error before any work
        check_unit_range(split.forget, task, runtime)
        original = runtime.place(copy.deepcopy(model))
        student = runtime.place(copy.deepcopy(model)).train()
        optimizer = self._recipe().build_optimizer(student)
        order = runtime.generator("boundary shrink order")
        with runtime.seeded("boundary shrink"):
            for _ in runtime.track(range(self.epochs), "boundary shrink"):
                for batch in shuffled(split.forget, task, runtime, self.batch_size, order):
                    _, label = nearest_label(original, batch, task, self.epsilon)
                    loss = task.loss_per_example(student, {**batch, task.label: label}).mean()
                    step(student, optimizer, loss, batch)
        return student

    def _recipe(self) -> TrainingRecipe:
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )


def nearest_label(
    original: nn.Module, batch: Batch, task: Classification, epsilon: float
) -> tuple[Float[Tensor, "batch ..."], Int[Tensor, " batch"]]:
    """Inputs after one signed-gradient step, and the original model's answers to them.

    x' = clip(x + epsilon * sign(d CE(f(x), y) / dx), 0, 1), rounded to multiples of 1/255;
    y' = argmax f(x'), which may equal y. Both in evaluation mode.
    """
    with evaluating(original):
        x = batch[task.input].detach().clone().requires_grad_()
        loss = task.loss_per_example(original, {**batch, task.input: x}).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            moved = (x + epsilon * gradient.sign()).clamp(0, 1)
            moved = (moved * GRAY_LEVELS).round() / GRAY_LEVELS
            return moved, task.logits(original, {**batch, task.input: moved}).argmax(1)


def check_unit_range(records: Records, task: Classification, runtime: Runtime) -> None:
    """Check that inputs are floating-point numbers in [0, 1].

    Raises:
        InvalidRecords: If not, with the range that they have.
    """
    low, high = float("inf"), float("-inf")
    for batch in runtime.batches(records, task):
        x = batch[task.input]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise InvalidRecords(f"Boundary shrink needs floating-point inputs in [0, 1], not {kind}.")
        low, high = min(low, float(x.min())), max(high, float(x.max()))
    if low < 0 or high > 1:
        raise InvalidRecords(
            f"Boundary shrink clips inputs to [0, 1], but the forget records lie in [{low:.4g}, {high:.4g}]. "
            "Give it pixels in [0, 1] and normalise inside the model."
        )
