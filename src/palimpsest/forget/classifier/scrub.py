"""SCRUB: move away from the original model on the forget set, stay with it on the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.distillation import kl_divergence
from palimpsest.parts.pairing import shuffled
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step
from palimpsest.tasks.classification import Classification

PAPER = Paper("Towards Unbounded Machine Unlearning", "NeurIPS 2023", "2302.09880")
INFINITY = float("inf")


@unlearner(
    "scrub",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("classification",),
    paper=PAPER,
    search={
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 8, integer=True),
        "msteps": Span(1, 3, integer=True),
    },
)
@dataclass(frozen=True)
class SCRUB:
    """Disobey the original model on the forget set, obey it on the retained records.

    The original model is the teacher. Every one of the first `msteps` epochs begins with a max pass over
    the forget set (ascend the divergence from the teacher); every epoch ends with a min pass over the
    retained set (descend gamma * cross-entropy + alpha * divergence). One optimizer serves both passes;
    the student is in training mode, the teacher in evaluation mode. Use it to remove classes or to unlearn
    confusion; where privacy counts it forgets too much, then use `scrub-r`.

    What counts is the number of max steps: on small forget sets take a small `forget_batch_size` or a
    larger `msteps`. Other public versions named SCRUB differ in the order of the passes.

    The defaults suit small data (the digits). Published settings: small scale Adam lr 5e-4, weight_decay
    0.1, temperature 2, gamma 1, alpha 0.5, msteps 3, epochs 10, decay_epochs (5, 8, 9), batches 32 (retain)
    and 64 (forget); large scale gamma 0.99, alpha 0.001, msteps 2, epochs 3; against membership attacks SGD
    5e-4, weight_decay 5e-4, temperature 4, epochs 5, forget batch 16; confusion of classes gamma 99, alpha
    0.01.

    Attributes:
        epochs: Passes over the retained set (E), at least 1.
        msteps: Epochs that begin with a max pass, between 0 and `epochs`.
        lr: Learning rate of both passes.
        alpha: Weight of the divergence in the min pass.
        gamma: Weight of the cross-entropy in the min pass.
        temperature: T of the divergence, which carries the factor T squared in both passes.
        forget_batch_size: Records per max step.
        retain_batch_size: Records per min step.
        decay_epochs: After each of these epochs the learning rate is multiplied by `decay_rate`.
        decay_rate: In (0, 1].
        optimizer: "adam", "adamw" or "sgd".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
    """

    epochs: int = 5
    msteps: int = 3
    lr: float = 1e-3
    alpha: float = 0.5
    gamma: float = 1.0
    temperature: float = 2.0
    forget_batch_size: int = 16
    retain_batch_size: int = 32
    decay_epochs: tuple[int, ...] = ()
    decay_rate: float = 0.1
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0, INFINITY, open_low=True)
        check_range("alpha", self.alpha, 0, INFINITY)
        check_range("gamma", self.gamma, 0, INFINITY)
        check_range("decay_rate", self.decay_rate, 0, 1, open_low=True)
        check_range("forget_batch_size", self.forget_batch_size, 1, INFINITY)
        check_range("epochs", self.epochs, 1, INFINITY)
        check_range("msteps", self.msteps, 0, self.epochs)
        self._recipe()
        if self.alpha == self.gamma == 0:
            raise InvalidHyperparameter("alpha and gamma are both 0: the min pass would learn nothing.")

    def unlearn(
        self, model: nn.Module, split: ForgetSplit, task: Classification, runtime: Runtime
    ) -> nn.Module:
        """The student after the last epoch."""
        *_, student = students(self, model, split, task, runtime)
        return student

    def _recipe(self) -> TrainingRecipe:
        return TrainingRecipe(
            self.epochs, self.lr, self.retain_batch_size, self.optimizer, self.momentum, self.weight_decay
        )


def max_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Minus the divergence from the teacher on forget records, to be minimised in the max pass."""
    return -_divergence(student_logits, teacher_logits, temperature)


def min_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    cross_entropy: Float[Tensor, ""],
    alpha: float,
    gamma: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """What the min pass descends on retained records: gamma * cross-entropy + alpha * divergence."""
    return gamma * cross_entropy + alpha * _divergence(student_logits, teacher_logits, temperature)


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return kl_divergence(student, teacher, temperature, "batchmean", square_temperature=True)


def students(
    settings: SCRUB, model: nn.Module, split: ForgetSplit, task: Classification, runtime: Runtime
) -> Iterator[nn.Module]:
    """The student after each epoch; one object, which goes on learning."""
    if split.retain is None:
        raise MissingNeed("SCRUB needs the retained records.")
    trainable(model)  # a model that cannot move is an error before any work
    teacher = runtime.place(copy.deepcopy(model)).eval()
    student = runtime.place(copy.deepcopy(model))
    optimizer = settings._recipe().build_optimizer(student)
    forget_order, retain_order = runtime.generator("scrub forget"), runtime.generator("scrub retain")

    def run(records: Records, batch_size: int, order: torch.Generator, maximise: bool) -> None:
        for batch in shuffled(records, task, runtime, batch_size, order):
            with torch.no_grad():
                taught = task.logits(teacher, batch)
            logits = task.logits(student, batch)
            if maximise:
                loss = max_loss(logits, taught, settings.temperature)
            else:
                right = task.loss_of_logits(logits, batch).mean()
                loss = min_loss(logits, taught, right, settings.alpha, settings.gamma, settings.temperature)
            step(student, optimizer, loss, batch)

    for epoch in runtime.track(range(1, settings.epochs + 1), "scrub"):
        for group in optimizer.param_groups:
            passed = sum(epoch > decay for decay in settings.decay_epochs)
            group["lr"] = settings.lr * settings.decay_rate**passed
        student.train()
        with runtime.seeded("scrub", epoch):
            if epoch <= settings.msteps:
                run(split.forget, settings.forget_batch_size, forget_order, maximise=True)
            run(split.retain, settings.retain_batch_size, retain_order, maximise=False)
        yield student
