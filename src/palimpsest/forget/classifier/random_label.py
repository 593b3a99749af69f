"""Random labels: train the forget records on wrong labels beside the retained ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, unlearner
from palimpsest.parts.pairing import forget_then_retain, mixed
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step

LabelSet = Literal["others", "all"]
Order = Literal["sequential", "mixed"]
FalseLabels = Callable[[Batch], Int[Tensor, " batch"]]


@unlearner(
    "random-label",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("classification",),
    paper=Paper(
        "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks",
        "CVPR 2020",
        "1911.04933",
    ),
    search={"lr": Span(1e-4, 3e-3, log=True), "epochs": Span(1, 8, integer=True)},
)
@dataclass(frozen=True)
class RandomLabel:
    """Train the forget records on wrong labels drawn at random, and the retained ones on their own.

    Forgetting by confusion: cheap and strong on whole classes. On single records of classes that stay it
    makes the model surer of its ignorance than retraining would, which a membership attack can see.

    Two published readings differ: "others" draws once among the classes that are not the record's own
    (and here, where whole classes go, not among those that no retained record has either, so that nothing is
    relabelled into a class that must disappear or did so before); "all" draws among all classes in every epoch, the true one included, as the code
    of SalUn does. Published: Adam 1e-4, 3 epochs, batches of 128, mixed, "others" (also under the name
    "amnesiac", which is a method of its own here without these choices); and SGD 0.013 with momentum 0.9, 10
    epochs, batches of 256, "all", sequential (the code of SalUn on CIFAR-10 and SVHN) or mixed (on CIFAR-100 and
    Tiny ImageNet). The defaults are the first with a learning rate and a batch size for small networks; keep
    to 1e-4 on pre-trained ones.

    Attributes:
        label_set: "others" or "all", see above.
        order: "mixed" makes one shuffled pass over forget and retain records together; "sequential" first
            all forget records, then all retained ones, in every epoch.
        lr: Learning rate.
        epochs: Passes over all records.
        batch_size: Records per step.
        optimizer: "adam", "adamw" or "sgd".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
        mode: "train" as published, or "eval" to leave batch-norm statistics and dropout alone.
    """

    label_set: LabelSet = "others"
    order: Order = "mixed"
    lr: float = 1e-3
    epochs: int = 3
    batch_size: int = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        _ = self.recipe
        check_relabelling(self.label_set, self.order, self.mode)

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model, trained on wrong labels for the forget records.

        Raises:
            MissingNeed: If the retained records are not at hand.
            InvalidHyperparameter: If no wrong label is left to draw.
            NonFiniteLoss: If training diverges.
        """
        student = runtime.place(copy.deepcopy(model))
        trainable(student)
        draw = false_labels(student, split, task, runtime, self.label_set)
        optimizer = self.recipe.build_optimizer(student)
        order = runtime.generator("random-label order")
        student.train(self.mode == "train")
        with runtime.seeded("random-label"):
            for _ in runtime.track(range(self.epochs), "random-label"):
                for batch in relabelled(split, task, runtime, draw, self.order, self.batch_size, order):
                    step(student, optimizer, task.loss_per_example(student, batch).mean(), batch)
        return student.eval()


def check_relabelling(label_set: str, order: str, mode: str) -> None:
    """Check the three choices.

    Raises:
        InvalidHyperparameter: For a value that is none of its names.
    """
    for name, value, known in (
        ("label_set", label_set, ("others", "all")),
        ("order", order, ("sequential", "mixed")),
        ("mode", mode, ("train", "eval")),
    ):
        if value not in known:
            raise InvalidHyperparameter(f"{name} must be one of {', '.join(known)}, not {value!r}.")


def relabelled(
    split: ForgetSplit,
    task: Task,
    runtime: Runtime,
    draw: FalseLabels,
    order: Order,
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """One epoch of batches in which the forget records carry false labels.

    Raises:
        MissingNeed: If the retained records are not at hand.
    """
    if split.retain is None:
        raise MissingNeed("Training on random labels needs the retained records.")
    field = label_field(task)
    if order == "mixed":
        for batch, gone in mixed(split.train, split.forget, task, runtime, batch_size, generator):
            yield {**batch, field: torch.where(gone, draw(batch), batch[field])}
        return
    sides = forget_then_retain(split.retain, split.forget, task, runtime, batch_size, generator)
    for side, batch in sides:
        yield {**batch, field: draw(batch)} if side == "forget" else batch


def false_labels(
    model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime, label_set: LabelSet
) -> FalseLabels:
    """A function that gives a batch's false labels, [batch]; only those of forget records mean anything.

    Raises:
        ModelMismatch: If the model has fewer than two classes.
        InvalidHyperparameter: If "others" leaves a record no class.
    """
    random = runtime.generator("false labels")
    first = next(iter(runtime.batches(split.forget, task, 1)))
    with torch.no_grad(), evaluating(model):
        classes = task.logits(model, first).shape[1]
    if classes < 2:
        raise ModelMismatch(f"Random labels need at least 2 classes; the model has {classes}.")
    device = runtime.torch_device
    if label_set == "all":
        return lambda batch: torch.randint(classes, (len(batch["id"]),), generator=random).to(device)
    field = label_field(task)
    drawn: dict[str, int] = {}
    gone = classes_that_go(split, classes)
    for batch in runtime.batches(split.forget, task):
        wrong = other_labels(batch[field].cpu().long(), classes, gone, random)
        drawn.update(zip(batch["id"], wrong.tolist(), strict=True))
    return lambda batch: torch.tensor([drawn.get(name, 0) for name in batch["id"]], device=device)


def classes_that_go(split: ForgetSplit, classes: int) -> list[int]:
    """Classes that no retained record has: forgotten as a whole now, or by an earlier request."""
    if split.retain is None or not split.forgotten_labels:
        return []
    return sorted(set(range(classes)) - {int(label) for label in split.retain.column("label")})


def other_labels(
    labels: Int[Tensor, " records"],
    classes: int,
    forgotten: Sequence[int],
    generator: torch.Generator,
) -> Int[Tensor, " records"]:
    """One label per record, uniform over the classes that are neither its own nor forgotten as a whole.

    Raises:
        InvalidHyperparameter: If a record has no such class.
    """
    allowed = torch.ones(len(labels), classes)
    allowed[torch.arange(len(labels)), labels] = 0
    allowed[:, [int(label) for label in forgotten]] = 0
    if (allowed.sum(1) == 0).any():
        raise InvalidHyperparameter(
            "label_set='others' leaves some records no class to be relabelled into: use label_set='all'."
        )
    return torch.multinomial(allowed, 1, generator=generator)[:, 0]


def label_field(task: Task) -> str:
    """Name of the field with the label."""
    return getattr(task, "label", "label")
