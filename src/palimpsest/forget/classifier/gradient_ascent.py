"""Gradient ascent: raise the loss on the forget records until they are no longer known."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import check_range, unlearner
from palimpsest.parts.pairing import shuffled
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step

SPARED = 0.97
"""Share of its accuracy on the forget records that a model keeps where other records of their classes stay."""


@unlearner(
    "gradient-ascent",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS},
    tasks=("classification",),
    search={"lr": Span(1e-5, 3e-3, log=True), "epochs": Span(1, 10, integer=True)},
)
@dataclass(frozen=True)
class GradientAscent:
    """Ascend on the loss of the forget records; needs nothing else, and knows no end by itself.

    The loss has no upper bound, so ascent ruins the model sooner or later. It therefore stops by itself
    before the first step whose batch is known no better than a bound, and at the latest after `epochs`.

    Deviations: published code has no early stop, and runs in training mode, where batch norm takes its
    statistics from forget records alone; here "eval" is the default. Published: SGD with momentum 0.9,
    weight decay 5e-4 and learning rates of 1e-5 to 1e-3, 5 to 10 epochs. How far that goes depends on
    how small the gradients of well-learned records are; Adam, the default, leaves the start at the same
    pace for any of them. For large pre-trained networks take 1e-5 to 1e-4.

    Attributes:
        lr: Learning rate.
        epochs: At most this many passes over the forget records.
        batch_size: Records per step.
        optimizer: "adam", "adamw", or "sgd" as in the published code.
        momentum: Of SGD.
        weight_decay: Of the optimizer.
        clip: Largest gradient norm; None does not clip.
        stop_accuracy: Stop before the first step whose batch is classified no better than this. "auto" is
            chance (1 / classes) where whole classes go, and 0.97 of the original accuracy on the forget
            records where others of their classes stay, because a model that never saw such records still
            knows most of them. None: no bound.
        stop_loss: Stop before the first step whose batch has at least this mean loss, in nats.
        mode: "eval" leaves batch-norm statistics and dropout alone; or "train".
    """

    lr: float = 3e-4
    epochs: int = 10
    batch_size: int = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = 1.0
    stop_accuracy: float | Literal["auto"] | None = "auto"
    stop_loss: float | None = None
    mode: Literal["train", "eval"] = "eval"

    def __post_init__(self) -> None:
        _ = self.recipe
        if isinstance(self.stop_accuracy, str):
            if self.stop_accuracy != "auto":
                raise InvalidHyperparameter(
                    f"stop_accuracy must be a number, None or 'auto', not {self.stop_accuracy!r}."
                )
        elif self.stop_accuracy is not None:
            check_range("stop_accuracy", self.stop_accuracy, 0, 1)
        for name, value in (("clip", self.clip), ("stop_loss", self.stop_loss)):
            if value is not None:
                check_range(name, value, 0, float("inf"), open_low=True)
        if self.mode not in ("train", "eval"):
            raise InvalidHyperparameter(f"mode must be 'train' or 'eval', not {self.mode!r}.")

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model, driven away from the forget records.

        Raises:
            NonFiniteLoss: If the ascent diverges.
        """
        student = runtime.place(copy.deepcopy(model))
        trainable(student)
        optimizer = self.recipe.build_optimizer(student)
        student.train(self.mode == "train")
        bound = self._accuracy_bound(student, split, task, runtime)
        with runtime.seeded("gradient-ascent"):
            for batch in self._batches(split, task, runtime):
                logits = task.logits(student, batch)
                loss = task.loss_of_logits(logits, batch).mean()
                known = accurate(logits, batch, task)
                if (bound is not None and known <= bound) or (
                    self.stop_loss is not None and loss.item() >= self.stop_loss
                ):
                    break
                step(student, optimizer, -loss, batch, self.clip)
        return student.eval()

    def _batches(self, split: ForgetSplit, task: Task, runtime: Runtime) -> Iterator[Batch]:
        order = runtime.generator("gradient-ascent order")
        for _ in runtime.track(range(self.epochs), "gradient-ascent"):
            yield from shuffled(split.forget, task, runtime, self.batch_size, order)

    def _accuracy_bound(
        self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime
    ) -> float | None:
        """Accuracy on a batch at which to stop."""
        if not isinstance(self.stop_accuracy, str):
            return self.stop_accuracy
        right, classes = 0.0, 1
        with torch.no_grad(), evaluating(model):
            for batch in runtime.batches(split.forget, task):
                logits = task.logits(model, batch)
                right, classes = right + accurate(logits, batch, task) * len(logits), logits.shape[1]
        return 1 / classes if whole_classes(split) else SPARED * right / len(split.forget)


def accurate(logits: Float[Tensor, "batch classes"], batch: Batch, task: Task) -> float:
    """Share of a batch that is classified rightly."""
    labels = batch[getattr(task, "label", "label")]
    return (logits.argmax(1) == labels).float().mean().item()


def whole_classes(split: ForgetSplit) -> bool:
    """Whether the request takes whole classes: no retained record has a label of the forget records.

    Without retained records at hand, a request whose records all have one label counts as such.
    """
    if not split.forget.has_column("label"):
        return False
    labels = set(split.forget.column("label").tolist())
    return len(labels) == 1 if split.retain is None else labels == set(split.forgotten_labels)
