"""Fine-tuning on the retained records: the weakest baseline, which relies on catastrophic forgetting."""

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
from palimpsest.core.unlearner import check_range, unlearner
from palimpsest.parts.importance import quadratic_anchor
from palimpsest.parts.pairing import shuffled
from palimpsest.parts.parameters import snapshot
from palimpsest.parts.training import TrainingRecipe, step


@unlearner(
    "finetune",
    needs={Need.MODEL, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    search={"lr": Span(1e-3, 0.3, log=True), "epochs": Span(1, 10, integer=True)},
)
@dataclass(frozen=True)
class FineTune:
    """Go on training on the retained records alone, and hope that the rest fades.

    Nothing pushes the forget records out, so little is forgotten unless the learning rate is large: the
    baseline that every method must beat on forgetting, and can hardly beat on utility. Learning rates
    from 1e-4 to 1e-1 and 5 to 10 epochs are published; every network wants its own. The defaults are
    the plain SGD of the SCRUB authors' baseline; with 0.02, momentum 0.9 and 5 epochs (the SSD authors')
    a small network that was not trained to the end forgets a class by itself.

    Attributes:
        lr: Learning rate.
        epochs: Passes over the retained records.
        batch_size: Records per step.
        optimizer: "sgd" in the published settings; "adam" or "adamw".
        momentum: Of SGD.
        weight_decay: Of the optimizer, towards zero.
        anchor: Weight a of a/2 ||theta - theta_original||^2; the SCRUB authors' fine-tuning has it instead
            of weight decay, with `mode="eval"`.
        mode: "train", or "eval" to leave batch-norm statistics and dropout alone.
    """

    lr: float = 0.01
    epochs: int = 5
    batch_size: int = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 5e-4
    anchor: float = 0.0
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        _ = self.recipe
        check_range("anchor", self.anchor, 0, float("inf"))
        if self.mode not in ("train", "eval"):
            raise InvalidHyperparameter(f"mode must be 'train' or 'eval', not {self.mode!r}.")

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model, trained further.

        Raises:
            MissingNeed: If the retained records are not at hand.
            NonFiniteLoss: If training diverges.
        """
        if split.retain is None:
            raise MissingNeed("Fine-tuning needs the retained records.")
        student = runtime.place(copy.deepcopy(model))
        start = snapshot(student)
        optimizer = self.recipe.build_optimizer(student)
        order = runtime.generator("finetune order")
        student.train(self.mode == "train")
        with runtime.seeded("finetune"):
            for _ in runtime.track(range(self.epochs), "finetune"):
                for batch in shuffled(split.retain, task, runtime, self.batch_size, order):
                    loss = task.loss_per_example(student, batch).mean()
                    if self.anchor:
                        loss = loss + self.anchor * quadratic_anchor(student, start)
                    step(student, optimizer, loss, batch)
        return student.eval()
