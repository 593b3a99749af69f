"""Boundary expand: give the forget records a class of their own, then take that class away."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from palimpsest.core.errors import ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, unlearner
from palimpsest.parts.activations import capture, module_of
from palimpsest.parts.pairing import shuffled
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step
from palimpsest.tasks.classification import Classification


@unlearner(
    "boundary-expand",
    needs={Need.MODEL, Need.FORGET_DATA},
    tasks=("classification",),
    paper=Paper(
        "Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision Boundary",
        "CVPR 2023",
    ),
    search={"lr": Span(1e-5, 3e-3, log=True), "epochs": Span(1, 10, integer=True)},
)
@dataclass(frozen=True)
class BoundaryExpand:
    """Widen the head by one neuron, train the forget records into it, and drop it.

    The space that the forget records held is taken over by an extra class; without its neuron they fall to
    whatever class is next best. No label and no retained record is used, so the rest of the model is not
    held in place: boundary shrink keeps it better, and with records of all classes both damage all classes.

    The defaults suit small data (the digits). Published: SGD lr 1e-5 with momentum 0.9, 10 epochs. A public
    re-implementation keeps the neuron, so that forget records count as wrong whatever the model knows of
    them: `keep_neuron` gives that model, with one logit more than the original; audits that compare logits
    with those of other models do not take it.

    Attributes:
        epochs: Passes over the forget set.
        lr: Learning rate.
        batch_size: Records per step.
        optimizer: "adam", "adamw" or "sgd".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
        keep_neuron: Whether the extra class stays in the model that is returned.
    """

    epochs: int = 5
    lr: float = 1e-3
    batch_size: int = 64
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    keep_neuron: bool = False

    def __post_init__(self) -> None:
        _ = self.recipe

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )

    def unlearn(
        self, model: nn.Module, split: ForgetSplit, task: Classification, runtime: Runtime
    ) -> nn.Module:
        """The fine-tuned copy, with as many logits as the original (or one more, see `keep_neuron`).

        Raises:
            ModelMismatch: If the model does not end in a linear layer that gives the logits.
            NonFiniteLoss: If training diverges.
        """
        trainable(model)  # a model that cannot move is an error before any work
        student = runtime.place(copy.deepcopy(model))
        head = linear_head(student, next(runtime.batches(split.forget, task, 1)), task)
        extra_class = head.out_features
        order = runtime.generator("boundary expand order")
        with runtime.seeded("boundary expand"):
            add_neuron(head)
            optimizer = self.recipe.build_optimizer(student)
            student.train()
            for _ in runtime.track(range(self.epochs), "boundary expand"):
                for batch in shuffled(split.forget, task, runtime, self.batch_size, order):
                    extra = torch.full((len(batch["id"]),), extra_class, device=runtime.torch_device)
                    loss = task.loss_per_example(student, {**batch, task.label: extra}).mean()
                    step(student, optimizer, loss, batch)
        if not self.keep_neuron:
            drop_neuron(head)
        return student.eval()


def linear_head(model: nn.Module, batch: Batch, task: Classification) -> nn.Linear:
    """The linear layer whose outputs are the logits.

    Raises:
        ModelMismatch: If the last layer that runs is no such layer.
    """
    with torch.no_grad(), evaluating(model), capture(model, layers=(), head=task.head) as seen:
        classes = task.logits(model, batch).shape[1]
    head = module_of(model, seen.head) if seen.head is not None else None
    if not isinstance(head, nn.Linear) or head.out_features != classes or "weight" not in head._parameters:
        what = "none" if head is None else f"'{seen.head}', {head}"
        raise ModelMismatch(
            f"Boundary expand widens a last linear layer of {classes} outputs; the model's last layer is {what}. "
            "Name it with Classification(head=...)."
        )
    return head


@torch.no_grad()
def add_neuron(head: nn.Linear) -> None:
    """One more output, in place: the old rows are kept, the new one is drawn as torch draws any linear layer."""
    fresh = nn.Linear(head.in_features, 1, bias=head.bias is not None).to(head.weight)
    _resize(head, torch.cat([head.weight, fresh.weight]), None if head.bias is None else fresh.bias)


@torch.no_grad()
def drop_neuron(head: nn.Linear) -> None:
    """One output less, in place: the last one goes."""
    _resize(head, head.weight[:-1], None)


def _resize(head: nn.Linear, weight: torch.Tensor, extra_bias: torch.Tensor | None) -> None:
    if head.bias is not None:
        bias = head.bias[: len(weight)] if extra_bias is None else torch.cat([head.bias, extra_bias])
        head.bias = nn.Parameter(bias.detach().clone(), head.bias.requires_grad)
    head.weight = nn.Parameter(weight.detach().clone(), head.weight.requires_grad)
    head.out_features = len(weight)
