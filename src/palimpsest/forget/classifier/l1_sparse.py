"""l1-sparse: fine-tuning on the retained records with a penalty on the size of every weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.pairing import shuffled
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step


@unlearner(
    "l1-sparse",
    needs={Need.MODEL, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    paper=Paper("Model Sparsity Can Simplify Machine Unlearning", "NeurIPS 2023", "2304.04934"),
    search={"alpha": Span(1e-5, 3e-3, log=True), "lr": Span(1e-3, 0.1, log=True)},
)
@dataclass(frozen=True)
class L1Sparse:
    """Fine-tune on the retained records while every weight is pulled towards zero.

    The loss is cross-entropy plus alpha_t times the sum of absolute values of all parameters, biases and
    batch-norm parameters included. The pull is strongest at first, so that weights which the retained
    records do not hold in place (and the forget records did) fade, and falls to nothing over the epochs, so
    that the rest recovers. It is as cheap and as gentle as fine-tuning and forgets somewhat more.

    The defaults are those of the paper's code but for smaller batches (64 instead of 256), for small data.
    The command line of that code shares its alpha with noise methods, and gives 0.2: far too much here.

    Attributes:
        alpha: Weight of the penalty at the start, at least 0; of the order of 1e-4 to 1e-3.
        plain_epochs: Last epochs without penalty, at most `epochs`.
        lr: Learning rate.
        epochs: Passes over the retained records.
        batch_size: Records per step.
        optimizer: "sgd" as published; "adam" or "adamw".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
        mode: "train" as published, or "eval" to leave batch-norm statistics and dropout alone.
    """

    alpha: float = 5e-4
    plain_epochs: int = 0
    lr: float = 0.01
    epochs: int = 10
    batch_size: int = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        _ = self.recipe
        check_range("alpha", self.alpha, 0, float("inf"))
        check_range("plain_epochs", self.plain_epochs, 0, self.epochs)
        if self.mode not in ("train", "eval"):
            raise InvalidHyperparameter(f"mode must be 'train' or 'eval', not {self.mode!r}.")

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model, trained further and made sparser.

        Raises:
            MissingNeed: If the retained records are not at hand.
            NonFiniteLoss: If training diverges.
        """
        if split.retain is None:
            raise MissingNeed("l1-sparse fine-tuning needs the retained records.")
        student = runtime.place(copy.deepcopy(model))
        optimizer = self.recipe.build_optimizer(student)
        order = runtime.generator("l1-sparse order")
        student.train(self.mode == "train")
        with runtime.seeded("l1-sparse"):
            for epoch in runtime.track(range(self.epochs), "l1-sparse"):
                weight = penalty_weight(epoch, self.epochs, self.plain_epochs, self.alpha)
                for batch in shuffled(split.retain, task, runtime, self.batch_size, order):
                    loss = task.loss_per_example(student, batch).mean()
                    if weight:
                        loss = loss + weight * absolute_sum(student)
                    step(student, optimizer, loss, batch)
        return student.eval()


def penalty_weight(epoch: int, epochs: int, plain_epochs: int, alpha: float) -> float:
    """Alpha * (1 - e / (E - E_plain)) in epoch e = 0, 1, ..., and 0 in the last E_plain of E epochs.

    Example:
        >>> [penalty_weight(epoch, 5, 1, 1.0) for epoch in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    sparse_epochs = epochs - plain_epochs
    return alpha * (1 - epoch / sparse_epochs) if epoch < sparse_epochs else 0.0


def absolute_sum(model: nn.Module) -> Float[Tensor, ""]:
    """The l1 norm of all trainable parameters together, with its graph."""
    return torch.stack([parameter.abs().sum() for parameter in trainable(model).values()]).sum()
