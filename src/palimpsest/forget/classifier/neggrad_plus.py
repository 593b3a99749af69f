"""NegGrad+: descend on retained records and ascend on forget records at once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.importance import quadratic_anchor
from palimpsest.parts.pairing import paired
from palimpsest.parts.parameters import snapshot
from palimpsest.parts.training import TrainingRecipe, step


@unlearner(
    "neggrad-plus",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    paper=Paper("Towards Unbounded Machine Unlearning", "NeurIPS 2023", "2302.09880"),
    search={"beta": Span(0.8, 0.999), "lr": Span(1e-3, 0.1, log=True), "epochs": Span(2, 10, integer=True)},
)
@dataclass(frozen=True)
class NegGradPlus:
    """Minimise beta * retain loss - (1 - beta) * forget loss over pairs of batches.

    The retained records define the epoch; the forget records are cycled beside them. The ascent has no
    bound: a large learning rate or a small beta reaches any forget accuracy at the price of the model.

    Deviations: gradients are clipped to norm 1 by default, because without it the published settings
    (plain SGD at 0.01 for 10 epochs, beta 0.95) leave a small network at chance on everything.

    Attributes:
        beta: Weight of the retained records, in [0, 1]; 0.95 and 0.9999 are published.
        lr: Learning rate.
        epochs: Passes over the retained records.
        batch_size: Retained records per step.
        forget_batch_size: Forget records per step; as many as retained by default.
        optimizer: "sgd" in the published settings; "adam" or "adamw".
        momentum: Of SGD; 0 in the published settings.
        weight_decay: Of the optimizer, towards zero.
        anchor: Weight a of a/2 ||theta - theta_original||^2, added to the retain loss.
        clip: Largest gradient norm; None does not clip.
        mode: "eval" leaves batch-norm statistics and dropout alone, as published; or "train".
    """

    beta: float = 0.95
    lr: float = 0.01
    epochs: int = 10
    batch_size: int = 64
    forget_batch_size: int | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    anchor: float = 5e-4
    clip: float | None = 1.0
    mode: Literal["train", "eval"] = "eval"

    def __post_init__(self) -> None:
        _ = self.recipe
        check_range("beta", self.beta, 0, 1)
        check_range("anchor", self.anchor, 0, float("inf"))
        if self.clip is not None:
            check_range("clip", self.clip, 0, float("inf"), open_low=True)
        if self.forget_batch_size is not None:
            check_range("forget_batch_size", self.forget_batch_size, 1, float("inf"))
        if self.mode not in ("train", "eval"):
            raise InvalidHyperparameter(f"mode must be 'train' or 'eval', not {self.mode!r}.")

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model, trained on the difference of the two losses.

        Raises:
            MissingNeed: If the retained records are not at hand.
            NonFiniteLoss: If the ascent diverges.
        """
        if split.retain is None:
            raise MissingNeed("NegGrad+ needs the retained records.")
        student = runtime.place(copy.deepcopy(model))
        start = snapshot(student)
        optimizer = self.recipe.build_optimizer(student)
        order = runtime.generator("neggrad-plus order")
        student.train(self.mode == "train")
        with runtime.seeded("neggrad-plus"):
            for _ in runtime.track(range(self.epochs), "neggrad-plus"):
                for kept, gone in paired(
                    split.retain, split.forget, task, runtime, self.batch_size, order, self.forget_batch_size
                ):
                    retain_loss = task.loss_per_example(student, kept).mean()
                    if self.anchor:
                        retain_loss = retain_loss + self.anchor * quadratic_anchor(student, start)
                    forget_loss = task.loss_per_example(student, gone).mean()
                    loss = neggrad_plus_loss(retain_loss, forget_loss, self.beta)
                    step(student, optimizer, loss, gone, self.clip)
        return student.eval()


def neggrad_plus_loss(
    retain_loss: Float[Tensor, ""], forget_loss: Float[Tensor, ""], beta: float
) -> Float[Tensor, ""]:
    """The objective: beta * retain - (1 - beta) * forget, of two mean losses in nats."""
    return beta * retain_loss - (1 - beta) * forget_loss
