"""EU-k: draw the last k layers anew and train them on the retained records."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from palimpsest.core.errors import MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import unlearner
from palimpsest.forget.classifier.cf_k import PAPER, Schedule, check_schedule, descend
from palimpsest.parts.last_layers import draw_anew, parameters_to_train, put_back, train_only
from palimpsest.parts.parameters import only_trainable
from palimpsest.parts.training import TrainingRecipe


@unlearner(
    "eu-k",
    needs={Need.MODEL, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    paper=PAPER,
    search={"k": Span(1, 2, integer=True), "lr": Span(0.01, 0.1, log=True)},
)
@dataclass(frozen=True)
class EUk:
    """Exactly unlearn the last k layers: start them afresh and train them on the retained records.

    The last k convolutional and linear layers get new weights (Kaiming normal, biases zero), once, and
    are trained with everything before them frozen bit by bit, running statistics included. These layers
    never saw the forget records; the frozen ones did, and what they know stays: retrain only the layers
    for which you can show that the rest is harmless, and audit one layer below. With k = 1 a class that is
    gone from the retained records is gone from the outputs, for its row of the head is never trained.

    Normalisation layers between the k layers move but are not drawn anew, as published. The defaults are
    the published optimiser and schedule, see `cf-k`; the paper starts from 0.1 and takes 62 epochs.

    Deviations: one public version draws the layers anew in every epoch; here it happens once. Layer
    normalisation is treated as batch norm is.

    Attributes:
        k: How many convolutional and linear layers move, counted from the end.
        layers: Names of layers, blocks or parameters to start afresh instead ("layer4", "blocks.11.*").
        initial: The model, or its weights by name, that the original's training started from: the layers
            go back to these instead of being drawn anew.
        lr: Learning rate, at the start of every cycle.
        lowest_lr: At the end of a cycle.
        schedule: "warm-restarts", or "constant".
        epochs: Passes over the retained records.
        batch_size: Records per step.
        optimizer: "sgd" as published; "adam" or "adamw".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
    """

    k: int = 1
    layers: tuple[str, ...] = ()
    initial: nn.Module | Mapping[str, Tensor] | None = None
    lr: float = 0.05
    lowest_lr: float = 0.005
    schedule: Schedule = "warm-restarts"
    epochs: int = 15
    batch_size: int = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-5

    def __post_init__(self) -> None:
        _ = self.recipe
        check_schedule(self.k, self.lowest_lr, self.schedule)

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model whose last layers were trained from the start.

        Raises:
            MissingNeed: If the retained records are not at hand.
            InvalidHyperparameter: If the model has fewer than k layers.
            UnknownName: If a named layer does not exist.
            ModelMismatch, NonFinite: If given initial weights do not fit.
            NonFiniteLoss: If training diverges.
        """
        if split.retain is None:
            raise MissingNeed("EU-k needs the retained records.")
        student = runtime.place(copy.deepcopy(model))
        names = parameters_to_train(student, self.k, self.layers)
        train_only(student, names)
        with only_trainable(student, names), runtime.seeded("eu-k"):
            if self.initial is None:
                draw_anew(student, names)
            else:
                put_back(student, names, self._initial_weights(self.initial))
            descend(student, split.retain, task, runtime, self.recipe, self.schedule, self.lowest_lr, "eu-k")
        return student.eval()

    @staticmethod
    def _initial_weights(initial: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return initial.state_dict() if isinstance(initial, nn.Module) else initial
