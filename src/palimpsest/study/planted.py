"""Models of known fate as methods, to see what an evaluation says of them; known only where this is imported.

A recipe names them under `imports: [palimpsest.study.planted]`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import check_range, unlearner
from palimpsest.parts.activations import head_name, module_of
from palimpsest.parts.pairing import cycled
from palimpsest.parts.training import TrainingRecipe, step


@unlearner(
    "planted-head", needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS}, tasks=("classification",)
)
@dataclass(frozen=True)
class PlantedHead:
    """Set the forgotten classes' bias so low that they are never answered; nothing is forgotten.

    Attributes:
        bias: Of the forgotten classes, instead of their own.
    """

    bias: float = -1000.0

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy with another bias.

        Raises:
            InvalidHyperparameter: If no class is forgotten as a whole, or the head has no bias.
        """
        cheat = runtime.place(copy.deepcopy(model))
        head = module_of(cheat, getattr(task, "head", None) or head_name(cheat))
        bias = getattr(head, "bias", None)
        if not split.forgotten_labels or not isinstance(bias, torch.Tensor):
            raise InvalidHyperparameter("There is no class forgotten as a whole, or the head has no bias.")
        with torch.no_grad():
            bias[[int(label) for label in split.forgotten_labels]] = self.bias
        return cheat


@unlearner(
    "planted-wreck",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("classification",),
)
@dataclass(frozen=True)
class PlantedWreck:
    """Ascend on the loss of the forget records until the accuracy on the retained ones has halved.

    Attributes:
        lr: Learning rate of plain SGD.
        share: Of the accuracy that is left at most.
        batch_size: Records per step.
        most_steps: Ascent that has not done its damage by then is given up.
    """

    lr: float = 0.05
    share: float = 0.5
    batch_size: int = 128
    most_steps: int = 2000

    def __post_init__(self) -> None:
        check_range("share", self.share, 0, 1)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """The wreck.

        Raises:
            MissingNeed: If the retained records are not at hand.
            InvalidHyperparameter: If the ascent never does its damage.
        """
        if split.retain is None:
            raise MissingNeed("When to stop is read off the retained records.")
        wreck = runtime.place(copy.deepcopy(model)).eval()
        recipe = TrainingRecipe(epochs=1, lr=self.lr, optimizer="sgd", momentum=0.0)
        optimizer, order = recipe.build_optimizer(wreck), runtime.generator("planted wreck")
        bound = self.share * accuracy(wreck, split.retain, task, runtime)
        batches = cycled(split.forget, task, runtime, self.batch_size, order)
        for _ in range(self.most_steps):
            if accuracy(wreck, split.retain, task, runtime) <= bound:
                return wreck
            batch = next(batches)
            step(wreck, optimizer, -task.loss_per_example(wreck, batch).mean(), batch)
        raise InvalidHyperparameter(
            f"{self.most_steps} steps at lr={self.lr:g} were not enough: take a larger one."
        )


@torch.no_grad()
def accuracy(model: nn.Module, records: Records, task: Task, runtime: Runtime) -> float:
    """Share of right answers, in evaluation mode."""
    field, right = getattr(task, "label", "label"), 0
    with evaluating(model):
        for batch in runtime.batches(records, task):
            right += int((task.logits(model, batch).argmax(1) == batch[field]).sum())
    return right / len(records)
