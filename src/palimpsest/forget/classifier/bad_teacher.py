"""Bad teacher: learn from a random network on the forget set and from the original model on the rest."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.distillation import kl_divergence
from palimpsest.parts.pairing import mixed, paired
from palimpsest.parts.parameters import trainable
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.parts.training import TrainingRecipe, step


@unlearner(
    "bad-teacher",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("classification",),
    paper=Paper(
        "Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks Using an Incompetent Teacher",
        "AAAI 2023",
        "2205.08096",
    ),
    search={"lr": Span(1e-4, 3e-3, log=True), "epochs": Span(1, 5, integer=True)},
)
@dataclass(frozen=True)
class BadTeacher:
    """Copy a randomly initialised network on forget records, the original model on retained ones.

    The student starts from the original weights and learns on a shuffled mixture of the forget set and a
    random subset of the retained set; no labels are used. The incompetent teacher is the same
    architecture with every parameter drawn anew and every running statistic reset; it and the original
    are in evaluation mode. The result answers forgotten records at random, which is more than forgetting
    where a retrained model would still classify them (random forgetting), so audit for over-forgetting.

    The defaults suit small data (the digits), on which the published settings make two steps: those are
    lr 1e-4, epochs 1, batch_size 256 (vision transformers 128), retain_fraction 0.3, temperature 1 and
    reduction "mean", which divides the divergence by the number of classes as well. With Adam the
    reduction hardly matters; with SGD it scales the learning rate.

    The version in the code of SCRUB is another loss: `order="paired"` adds the two divergences over pairs of
    batches, the retained records defining the epoch, each times T squared and its own weight. It is run there
    with lr 1e-3, temperature 4 and both weights 1.

    Attributes:
        epochs: Passes over the mixture.
        lr: Learning rate.
        batch_size: Records per step.
        retain_fraction: Share of the retained records in the mixture, in (0, 1], drawn once.
        temperature: T of both teachers and the student; no factor T squared with "mixed".
        reduction: "batchmean", or "mean" over records and classes.
        order: "mixed" or "paired", see above.
        retain_weight: Of the divergence from the original ("paired" only), at least 0.
        forget_weight: Of the divergence from the bad teacher ("paired" only), at least 0.
        optimizer: "adam", "adamw" or "sgd".
        weight_decay: Of the optimizer.
    """

    epochs: int = 3
    lr: float = 1e-3
    batch_size: int = 64
    retain_fraction: float = 0.3
    temperature: float = 1.0
    reduction: Literal["batchmean", "mean"] = "batchmean"
    order: Literal["mixed", "paired"] = "mixed"
    retain_weight: float = 1.0
    forget_weight: float = 1.0
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range("retain_fraction", self.retain_fraction, 0, 1, open_low=True)
        check_range("temperature", self.temperature, 0, float("inf"), open_low=True)
        if self.reduction not in ("batchmean", "mean"):
            raise InvalidHyperparameter(f"reduction must be 'batchmean' or 'mean', not {self.reduction!r}.")
        if self.order not in ("mixed", "paired"):
            raise InvalidHyperparameter(f"order must be 'mixed' or 'paired', not {self.order!r}.")
        check_range("retain_weight", self.retain_weight, 0, float("inf"))
        check_range("forget_weight", self.forget_weight, 0, float("inf"))
        self._recipe()

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """The student after the last epoch."""
        if split.retain is None:
            raise MissingNeed("The bad teacher needs the retained records, or a sample of them.")
        trainable(model)  # a model that cannot move is an error before any work
        sample = self._sample(split.retain, runtime)
        student = runtime.place(copy.deepcopy(model)).train()
        full_teacher = runtime.place(copy.deepcopy(model)).eval()
        # A stream of its own: a retraining under the same seed must not start from this teacher's weights.
        own = runtime.with_seed(runtime.derive("bad teacher"))
        bad_teacher = runtime.place(reinitialised(model, own)).eval()
        optimizer = self._recipe().build_optimizer(student)
        order = runtime.generator("bad teacher order")

        def logits(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                full, bad = task.logits(full_teacher, batch), task.logits(bad_teacher, batch)
            return task.logits(student, batch), full, bad

        with runtime.seeded("bad teacher"):
            for _ in runtime.track(range(self.epochs), "bad teacher"):
                if self.order == "mixed":
                    mixture = split.forget.union(sample)
                    for batch, is_forget in mixed(
                        mixture, split.forget, task, runtime, self.batch_size, order
                    ):
                        loss = bad_teacher_loss(*logits(batch), is_forget, self.temperature, self.reduction)
                        step(student, optimizer, loss, batch)
                    continue
                for kept, gone in paired(sample, split.forget, task, runtime, self.batch_size, order):
                    (kept_logits, full, _), (gone_logits, _, bad) = logits(kept), logits(gone)
                    loss = self.retain_weight * self._squared(kept_logits, full)
                    loss = loss + self.forget_weight * self._squared(gone_logits, bad)
                    step(student, optimizer, loss, gone)
        return student.eval()

    def _squared(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The divergence with the factor T squared."""
        return kl_divergence(student_logits, teacher_logits, self.temperature, self.reduction, True)

    def _sample(self, retain: Records, runtime: Runtime) -> Records:
        count = max(1, int(self.retain_fraction * len(retain)))
        chosen = torch.randperm(len(retain), generator=runtime.generator("bad teacher sample"))[:count]
        return retain.select(chosen.sort().values.numpy())

    def _recipe(self) -> TrainingRecipe:
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, weight_decay=self.weight_decay
        )


def bad_teacher_loss(
    student_logits: Float[Tensor, "batch classes"],
    full_teacher_logits: Float[Tensor, "batch classes"],
    bad_teacher_logits: Float[Tensor, "batch classes"],
    is_forget: Bool[Tensor, " batch"],
    temperature: float = 1.0,
    reduction: Literal["batchmean", "mean"] = "mean",
) -> Float[Tensor, ""]:
    """KL(teacher || student), the teacher being the bad one on forget rows and the original elsewhere.

    Args:
        student_logits: Of the model that unlearns.
        full_teacher_logits: Of the original model.
        bad_teacher_logits: Of the randomly initialised model.
        is_forget: Rows that are to be forgotten.
        temperature: Above 0; the loss has no factor T squared.
        reduction: "mean" divides by batch x classes (published code), "batchmean" by batch.
    """
    teacher_logits = torch.where(is_forget[:, None], bad_teacher_logits, full_teacher_logits)
    return kl_divergence(student_logits, teacher_logits, temperature, reduction)
