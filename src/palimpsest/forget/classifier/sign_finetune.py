"""Fine-tuning by the sign of the gradient: the lower level of the search for worst-case forget sets."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, NonFiniteLoss
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.gradients import gradient_of
from palimpsest.parts.pairing import shuffled
from palimpsest.parts.parameters import trainable
from palimpsest.parts.record_weights import check_weights, row_finder

PAPER = Paper(
    "Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning",
    "ECCV 2024",
    "2403.07362",
)
Mode = Literal["train", "eval"]


@unlearner(
    "sign-finetune",
    needs={Need.MODEL, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    paper=PAPER,
    search={"lr": Span(1e-5, 1e-3, log=True), "epochs": Span(1, 5, integer=True)},
)
@dataclass(frozen=True)
class SignFineTune:
    """Go on training on the retained records, every step as long as the learning rate in every parameter.

    theta <- theta - lr * sign(gradient of the summed loss): no momentum, no weight decay. As a method of
    its own it is fine-tuning with another optimiser, and as weak. It is here because the derivative of a
    sign is zero: when records carry weights w (1: to be forgotten) and the loss of a batch is
    sum_i (1 - w_i) * loss_i, what it arrives at does not depend on w to first order, and
    `palimpsest worst-case` needs no implicit gradient. A batch whose weights are all 1 moves nothing.

    Published: 10 epochs in batches of 256 at 1e-3 (ResNet-18 on CIFAR-10). The defaults are for small
    networks: one epoch in batches of 64 at 5e-4 suffices to search in.

    With weights, every record runs through the network, as in the published code; in training mode even
    those of weight 1 enter batch norm's statistics. Given a request instead, only retained records do.

    Attributes:
        lr: Length of a step in every parameter.
        epochs: Passes over the records.
        batch_size: Records per step.
        mode: "train" as published, or "eval" to leave batch-norm statistics and dropout alone.
    """

    lr: float = 5e-4
    epochs: int = 1
    batch_size: int = 64
    mode: Mode = "train"

    def __post_init__(self) -> None:
        check_sign_settings(self.lr, self.epochs, self.batch_size, self.mode)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model, trained further on the retained records.

        Raises:
            MissingNeed: If the retained records are not at hand.
            NonFiniteLoss: If training diverges.
        """
        if split.retain is None:
            raise MissingNeed("Sign-gradient fine-tuning needs the retained records.")
        return self.unlearn_weighted(model, split.retain, np.zeros(len(split.retain)), task, runtime)

    def unlearn_weighted(
        self,
        model: nn.Module,
        records: Records,
        weights: Sequence[float] | Float[np.ndarray, " records"],
        task: Task,
        runtime: Runtime,
    ) -> nn.Module:
        """A copy of the model, trained further on all records by 1 minus their weights.

        Args:
            model: To start from; not changed.
            records: All training records.
            weights: One per record, 1 for those to be forgotten, 0 for those to be retained.
            task: The domain.
            runtime: Seed and device.
        """
        student = runtime.place(copy.deepcopy(model))
        return descend_by_sign(
            student, records, weights, task, runtime, self.lr, self.epochs, self.batch_size, self.mode
        )


def descend_by_sign(
    model: nn.Module,
    records: Records,
    weights: Sequence[float] | Float[np.ndarray, " records"],
    task: Task,
    runtime: Runtime,
    lr: float,
    epochs: int,
    batch_size: int,
    mode: Mode,
) -> nn.Module:
    """The loop, in place: descent on sum_i (1 - w_i) * loss_i of every batch by signs."""
    keep = torch.from_numpy(1 - check_weights(weights, len(records))).to(runtime.torch_device, torch.float32)
    rows, parameters = row_finder(records), trainable(model)
    order = runtime.generator("sign-gradient order")
    model.train(mode == "train")
    with runtime.seeded("sign-gradient"), torch.enable_grad():
        for _ in runtime.track(range(epochs), "sign-gradient"):
            for batch in shuffled(records, task, runtime, batch_size, order):
                loss = weighted_loss(task.loss_per_example(model, batch), keep[rows(batch)])
                sign_step(parameters, loss, lr, batch)
    return model.eval()


def weighted_loss(losses: Float[Tensor, " batch"], keep: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """sum_i (1 - w_i) * loss_i with keep = 1 - w: a sum, but signs do not know a sum from a mean."""
    return (keep * losses).sum()


def sign_step(
    parameters: Mapping[str, nn.Parameter], loss: Float[Tensor, ""], lr: float, batch: Batch
) -> None:
    """Step theta <- theta - lr * sign(gradient); a gradient of exactly zero moves nothing.

    Raises:
        NonFiniteLoss: If the loss is NaN or Inf, naming records of the batch; nothing is applied.
    """
    if not torch.isfinite(loss):
        raise NonFiniteLoss(f"The loss became {loss.item()} on a batch with records {batch['id'][:3]}.")
    gradients = gradient_of(loss, dict(parameters))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter -= lr * gradients[name].sign()


def check_sign_settings(lr: float, epochs: int, batch_size: int, mode: str) -> None:
    """Check the hyperparameters.

    Raises:
        InvalidHyperparameter: For a value out of range.
    """
    check_range("lr", lr, 0, 1, open_low=True)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        check_range(name, value, 1, float("inf"))
        if value != int(value):
            raise InvalidHyperparameter(f"{name} must be an integer, not {value!r}.")
    if mode not in ("train", "eval"):
        raise InvalidHyperparameter(f"mode must be 'train' or 'eval', not {mode!r}.")
