"""UNSIR: learn noise that the class hates, impair the model with it, and repair the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import (
    AbsentClass,
    InvalidHyperparameter,
    InvalidRecords,
    MissingNeed,
    NonFiniteLoss,
)
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.labels import labels_of
from palimpsest.parts.pairing import shuffled
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step
from palimpsest.tasks.classification import Classification


@unlearner(
    "unsir",
    needs={Need.MODEL, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("classification",),
    paper=Paper("Fast Yet Effective Machine Unlearning", "IEEE TNNLS 2023", "2111.08947"),
    search={"impair_lr": Span(1e-4, 1e-2, log=True), "repair_lr": Span(1e-4, 1e-2, log=True)},
)
@dataclass(frozen=True)
class UNSIR:
    """Forget whole classes without one of their images: noise stands for them, retained records repair.

    First, for every class to forget, a batch of noise inputs is learned that raises the model's loss for the
    class (`noise_loss`). Then one short pass over copies of that noise, labelled as the class, and a
    sample of the retained records makes the class's label mean noise (impair). Last, the same retained
    records alone bring the rest back (repair). Only the class's number is used: choose it where the
    records of the class no longer exist. It is not defined for part of a class or for single records.

    The defaults suit small data (the digits, about 100 records per class). Published (in the code of SSD):
    Adam 1e-4 for both passes, 80 copies, and otherwise what the defaults are. Where the noise outnumbers the
    retained records, or the impair pass is too gentle, the model learns the noise as the class and still
    knows its images: choose copies so that the noise is the smaller half, and search `impair_lr`.

    Deviations: noise is learned in evaluation mode, so that running statistics stay what images made them.

    Attributes:
        classes: Numbers of the classes to forget; by default those that the request takes as a whole.
        noise_count: Noise inputs per class.
        noise_steps: Steps in which they are learned.
        noise_lr: Learning rate of Adam on the noise.
        noise_penalty: Weight of the noise's squared size.
        copies: Times that every noise input occurs in the impair pass.
        retain_per_class: At most so many retained records of each class, drawn once.
        impair_lr: Learning rate of the impair pass.
        repair_lr: Learning rate of the repair pass.
        impair_epochs: Passes, at least 1.
        repair_epochs: Passes, at least 1.
        impair_batch_size: Records and noise inputs per step.
        repair_batch_size: Records per step.
        optimizer: "adam", "adamw" or "sgd", of both passes.
    """

    classes: tuple[int, ...] | None = None
    noise_count: int = 32
    noise_steps: int = 25
    noise_lr: float = 0.1
    noise_penalty: float = 0.1
    copies: int = 8
    retain_per_class: int = 500
    impair_lr: float = 3e-3
    repair_lr: float = 1e-3
    impair_epochs: int = 1
    repair_epochs: int = 1
    impair_batch_size: int = 32
    repair_batch_size: int = 128
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"

    def __post_init__(self) -> None:
        for name in ("noise_count", "noise_steps", "copies", "retain_per_class"):
            check_range(name, getattr(self, name), 1, float("inf"))
        check_range("noise_lr", self.noise_lr, 0, float("inf"), open_low=True)
        check_range("noise_penalty", self.noise_penalty, 0, float("inf"))
        if self.classes is not None and len(self.classes) == 0:
            raise InvalidHyperparameter("classes is empty: name the classes that UNSIR is to forget.")
        _ = self.impair_recipe, self.repair_recipe

    @property
    def impair_recipe(self) -> TrainingRecipe:
        """The optimizer's settings in the impair pass."""
        return TrainingRecipe(self.impair_epochs, self.impair_lr, self.impair_batch_size, self.optimizer)

    @property
    def repair_recipe(self) -> TrainingRecipe:
        """The optimizer's settings in the repair pass."""
        return TrainingRecipe(self.repair_epochs, self.repair_lr, self.repair_batch_size, self.optimizer)

    def unlearn(
        self, model: nn.Module, split: ForgetSplit, task: Classification, runtime: Runtime
    ) -> nn.Module:
        """A copy of the model, impaired and repaired.

        Raises:
            MissingNeed: If the retained records are not at hand, or no class is named or forgotten as a whole.
            AbsentClass: If a named class is none of the model's.
            InvalidRecords: If inputs are no floating-point numbers, or all retained records are of these classes.
            NonFiniteLoss: If the noise or the training diverges.
        """
        if split.retain is None:
            raise MissingNeed("UNSIR needs retained records.")
        student = runtime.place(copy.deepcopy(model))
        trainable(student)  # a model that cannot move is an error before any work
        with torch.no_grad(), evaluating(student):
            known = task.logits(student, next(runtime.batches(split.retain, task, 1))).shape[1]
        gone = classes_to_forget(self.classes, split, known)
        kept = sample_per_class(split.retain, gone, self.retain_per_class, task, runtime)
        noise = torch.cat([self._learn_noise(student, kept, label, task, runtime) for label in gone])
        labels = torch.tensor(gone, device=noise.device).repeat_interleave(self.noise_count)
        order = runtime.generator("unsir order")
        with runtime.seeded("unsir"):
            optimizer = self.impair_recipe.build_optimizer(student)
            student.train()
            for _ in runtime.track(range(self.impair_epochs), "unsir impair"):
                for batch in self._with_noise(kept, noise, labels, task, runtime, order):
                    step(student, optimizer, task.loss_per_example(student, batch).mean(), batch)
            optimizer = self.repair_recipe.build_optimizer(student)
            for _ in runtime.track(range(self.repair_epochs), "unsir repair"):
                for batch in shuffled(kept, task, runtime, self.repair_batch_size, order):
                    step(student, optimizer, task.loss_per_example(student, batch).mean(), batch)
        return student.eval()

    def _learn_noise(
        self, model: nn.Module, like: Records, label: int, task: Classification, runtime: Runtime
    ) -> Float[Tensor, "noise ..."]:
        """Noise inputs, of the shape of records, for which the model denies the class."""
        example = next(runtime.batches(like, task, 1))
        shape = (self.noise_count, *example[task.input].shape[1:])
        start = torch.randn(shape, generator=runtime.generator("unsir noise", label))
        noise = start.to(example[task.input]).requires_grad_()
        optimizer = torch.optim.Adam([noise], self.noise_lr)
        with evaluating(model):
            for _ in range(self.noise_steps):
                logits = task.logits(model, {**example, task.input: noise})
                loss = noise_loss(logits, noise, label, self.noise_penalty)
                if not torch.isfinite(loss):
                    raise NonFiniteLoss(f"The noise for class {label} diverged: its loss is {loss.item()}.")
                optimizer.zero_grad()
                (noise.grad,) = torch.autograd.grad(loss, noise)
                optimizer.step()
        return noise.detach()

    def _with_noise(
        self,
        kept: Records,
        noise: Float[Tensor, "noise ..."],
        labels: Tensor,
        task: Classification,
        runtime: Runtime,
        order: torch.Generator,
    ) -> Iterator[Batch]:
        """One shuffled pass over the retained records and all copies of the noise, which no record id names."""
        positions = torch.randperm(len(kept) + self.copies * len(noise), generator=order)
        for chunk in positions.split(self.impair_batch_size):
            records, copies = chunk[chunk < len(kept)], chunk[chunk >= len(kept)] - len(kept)
            drawn = (copies % len(noise)).to(noise.device)
            batch: Batch = {task.input: noise[drawn], task.label: labels[drawn], "id": ["noise"] * len(drawn)}
            if len(records):
                real = runtime.to_device(kept.batch(records.numpy(), task.collate))
                batch = {
                    task.input: torch.cat([real[task.input], batch[task.input]]),
                    task.label: torch.cat([real[task.label].long(), batch[task.label]]),
                    "id": [*real["id"], *batch["id"]],
                }
            if len(batch["id"]) > 1 or self.impair_batch_size == 1:
                yield batch


def noise_loss(
    logits: Float[Tensor, "noise classes"], noise: Float[Tensor, "noise ..."], label: int, penalty: float
) -> Float[Tensor, ""]:
    """What the noise descends: minus the cross-entropy for the class, plus penalty * mean squared length."""
    wanted = torch.full((len(logits),), label, device=logits.device)
    return -F.cross_entropy(logits, wanted) + penalty * noise.flatten(1).square().sum(1).mean()


def classes_to_forget(named: Sequence[int] | None, split: ForgetSplit, classes: int) -> list[int]:
    """The named classes, or those that the request takes as a whole, checked against the model's.

    Raises:
        MissingNeed: If none is named and the request is not one of whole classes.
        AbsentClass: If the model has no such class.
    """
    if named is None:
        gone = [int(label) for label in split.forgotten_labels]
        stay = sorted(set(split.forget.column("label").tolist()) - set(gone)) if gone else []
        if not gone or stay:
            raise MissingNeed(
                "UNSIR forgets whole classes, known by their number: the request must take all records of its "
                f"classes (some of {stay or 'them'} are retained), or name classes=(...)."
            )
    else:
        gone = [int(label) for label in dict.fromkeys(named)]
    odd = [label for label in gone if not 0 <= label < classes]
    if odd:
        raise AbsentClass(f"The model knows classes 0 to {classes - 1}; {odd} cannot be forgotten.")
    return gone


def sample_per_class(
    retain: Records, gone: Sequence[int], most: int, task: Classification, runtime: Runtime
) -> Records:
    """At most `most` retained records of every class that stays, drawn at random.

    Raises:
        InvalidRecords: If there is none, or if inputs are no floating-point numbers.
    """
    example = next(runtime.batches(retain, task, 1))[task.input]
    if not isinstance(example, Tensor) or not example.is_floating_point():
        kind = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise InvalidRecords(
            f"UNSIR learns noise inputs: records must be floating-point numbers, not {kind}."
        )
    labels, random = labels_of(retain, task, runtime), runtime.numpy("unsir sample")
    chosen: list[int] = []
    for label in np.unique(labels):
        if label not in gone:
            own = np.flatnonzero(labels == label)
            chosen += random.permutation(own)[:most].tolist()
    if not chosen:
        raise InvalidRecords(f"All retained records are of the classes to forget, {list(gone)}.")
    return retain.select(sorted(chosen))
