"""Amnesiac unlearning: train on, with one wrong label drawn for every record to forget."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, unlearner
from palimpsest.forget.classifier.random_label import false_labels, relabelled
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step


@unlearner(
    "amnesiac",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("classification",),
    paper=Paper("Amnesiac Machine Learning", "AAAI 2021", "2010.10981"),
    search={"lr": Span(1e-4, 3e-3, log=True), "epochs": Span(1, 8, integer=True)},
)
@dataclass(frozen=True)
class Amnesiac:
    """Relabel every forget record once, at random, and train on it and all retained records together.

    What classifier papers compare with under this name: each forget record gets one label, uniform over
    the classes that are not its own, for the whole run, and one shuffled mixture with all retained records
    makes an epoch. It differs from `random-label` as SalUn's code has it, where labels are drawn anew in
    every epoch among all classes, the true one included, and the forget records come first: a label that
    stays can be learned by heart, one that changes cannot, so that in the end, after many epochs or with few
    records, forgotten ones are confidently wrong here rather than undecided, which a membership attack can see.

    The other half of the paper, taking back the updates of batches that held a forget record, must be
    prepared during training and is not this method.

    The defaults suit small data (the digits). Published (in the code of SSD): Adam 1e-4, 3 epochs, batches
    of 128. Deviation: where several whole classes go, no record is relabelled into any of them.

    Attributes:
        lr: Learning rate; keep to 1e-4 on pre-trained networks.
        epochs: Passes over all records.
        batch_size: Records per step.
        optimizer: "adam" as published; "adamw" or "sgd".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
        mode: "train" as published, or "eval" to leave batch-norm statistics and dropout alone.
    """

    lr: float = 1e-3
    epochs: int = 3
    batch_size: int = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        _ = self.recipe
        if self.mode not in ("train", "eval"):
            raise InvalidHyperparameter(f"mode must be 'train' or 'eval', not {self.mode!r}.")

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model, trained on the relabelled forget records and the retained ones.

        Raises:
            MissingNeed: If the retained records are not at hand.
            InvalidHyperparameter: If a record has no other class.
            NonFiniteLoss: If training diverges.
        """
        if split.retain is None:
            raise MissingNeed("Amnesiac unlearning needs the retained records.")
        student = runtime.place(copy.deepcopy(model))
        trainable(student)  # a model that cannot move is an error before any work
        draw = false_labels(student, split, task, runtime, "others")
        optimizer = self.recipe.build_optimizer(student)
        order = runtime.generator("amnesiac order")
        student.train(self.mode == "train")
        with runtime.seeded("amnesiac"):
            for _ in runtime.track(range(self.epochs), "amnesiac"):
                for batch in relabelled(split, task, runtime, draw, "mixed", self.batch_size, order):
                    step(student, optimizer, task.loss_per_example(student, batch).mean(), batch)
        return student.eval()
