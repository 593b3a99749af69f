"""Pseudo-labels: train the forget records on what the original model takes them for among the kept classes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidLabels
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, unlearner
from palimpsest.parts.pairing import shuffled
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step

Masked = Literal["forgotten", "own"]


@unlearner(
    "pseudo-label",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS},
    tasks=("classification",),
    paper=Paper(
        "Are We Truly Forgetting? A Critical Re-examination of Machine Unlearning Evaluation Protocols",
        "Engineering Applications of AI 2026",
        "2503.06991",
    ),
    search={"lr": Span(1e-5, 3e-3, log=True), "epochs": Span(1, 15, integer=True)},
)
@dataclass(frozen=True)
class PseudoLabel:
    """Fine-tune the forget records to the original model's second guess: its best class among those kept.

    The logits of the forgotten classes are set to minus infinity, and the best of the others is the record's
    new label, which is what a model without the classes would tend to say. Gentler than random labels, since
    every record moves to the class that it already resembles, and needs no retained data. Use it for whole
    classes when only the forget set is at hand; the baseline of a paper about judging representations, which
    shows how far relabelling moves them. On random records of classes that stay it takes the others with it.

    The labels come from the original in evaluation mode and are fixed before the first step; training is in
    training mode, as published.

    Deviations: where no class goes as a whole (random records, part of a class) the published rule has no
    class left or takes classes that stay; there each record's own class alone is masked ("own"), an
    extension of ours. Where retained records are not at hand, all classes of the forget records count as
    forgotten. Published: SGD at 0.01 with momentum 0.9, 10 epochs; the defaults are for small networks.

    Attributes:
        masked: Which logits are masked: "forgotten" (classes that go as a whole) or "own" (the record's own
            class, and those that go as a whole); "auto" takes "forgotten" if every forget record is of
            such a class.
        epochs: Passes over the forget records.
        lr: Learning rate.
        batch_size: Records per step.
        optimizer: "adam", "adamw" or "sgd".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
        mode: "train" as published, or "eval" to leave batch-norm statistics and dropout alone: with forget
            records alone they become those of the forgotten classes.
    """

    masked: Masked | Literal["auto"] = "auto"
    epochs: int = 10
    lr: float = 3e-4
    batch_size: int = 64
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    mode: Literal["train", "eval"] = "train"

    def __post_init__(self) -> None:
        _ = self.recipe
        for name, value, known in (
            ("masked", self.masked, ("auto", "forgotten", "own")),
            ("mode", self.mode, ("train", "eval")),
        ):
            if value not in known:
                raise InvalidHyperparameter(f"{name} must be one of {', '.join(known)}, not {value!r}.")

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(
            self.epochs, self.lr, self.batch_size, self.optimizer, self.momentum, self.weight_decay
        )

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model, fine-tuned on the pseudo-labels.

        Raises:
            InvalidHyperparameter: If masking leaves a record no class.
            NonFiniteLoss: If training diverges.
        """
        student = runtime.place(copy.deepcopy(model))
        trainable(student)
        known = pseudo_labels(student, split, task, runtime, self.masked)
        field = getattr(task, "label", "label")
        optimizer = self.recipe.build_optimizer(student)
        order = runtime.generator("pseudo-label order")
        student.train(self.mode == "train")
        with runtime.seeded("pseudo-label"):
            for _ in runtime.track(range(self.epochs), "pseudo-label"):
                for batch in shuffled(split.forget, task, runtime, self.batch_size, order):
                    target = torch.tensor([known[name] for name in batch["id"]], device=runtime.torch_device)
                    loss = task.loss_per_example(student, {**batch, field: target}).mean()
                    step(student, optimizer, loss, batch)
        return student.eval()


@torch.no_grad()
def pseudo_labels(
    model: nn.Module,
    split: ForgetSplit,
    task: Task,
    runtime: Runtime,
    masked: Masked | Literal["auto"] = "auto",
) -> dict[str, int]:
    """The original's best class among the kept ones, by record id.

    Raises:
        InvalidHyperparameter: If masking leaves a record no class, or "forgotten" finds no class that goes.
        InvalidLabels: If a label is no class of the model.
    """
    field, found = getattr(task, "label", "label"), dict[str, int]()
    gone, whole = _classes_gone(split, task, runtime)
    own = masked == "own" or (masked == "auto" and not whole)
    if not own and not gone:
        raise InvalidHyperparameter("No class is forgotten as a whole: use masked='own'.")
    with evaluating(model):
        for batch in runtime.batches(split.forget, task):
            logits, labels = task.logits(model, batch), batch[field].long()
            if int(labels.min()) < 0 or max(int(labels.max()), *gone, 0) >= logits.shape[1]:
                raise InvalidLabels(f"The model has classes 0 to {logits.shape[1] - 1} only.")
            target = best_kept(logits, gone, labels if own else None)
            found.update(zip(batch["id"], target.tolist(), strict=True))
    return found


def best_kept(
    logits: Float[Tensor, "batch classes"],
    forgotten: list[int],
    own: Int[Tensor, " batch"] | None = None,
) -> Int[Tensor, " batch"]:
    """Argmax of the logits with those of the forgotten classes at minus infinity.

    Args:
        logits: Of the original model.
        forgotten: Classes that are masked in every row.
        own: A further class to mask, row by row.

    Raises:
        InvalidHyperparameter: If no class is left.

    Example:
        >>> best_kept(torch.tensor([[5.0, 3.0, 4.0]]), [0]).tolist()
        [2]
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    keep[:, forgotten] = False
    if own is not None:
        keep[torch.arange(len(logits), device=logits.device), own] = False
    if not keep.any(1).all():
        raise InvalidHyperparameter("Masking the forgotten classes leaves some records no class to be given.")
    # A kept logit of minus infinity is still above a masked one.
    finite = logits.double().nan_to_num(neginf=torch.finfo(torch.float64).min)
    return finite.masked_fill(~keep, float("-inf")).argmax(1)


def _classes_gone(split: ForgetSplit, task: Task, runtime: Runtime) -> tuple[list[int], bool]:
    """Classes forgotten as a whole, and whether every forget record is of one."""
    gone, labels = split.forgotten_labels, _labels(split, task, runtime)
    if split.retain is None or not split.forget.has_column("label"):
        return sorted(labels), True
    return [int(label) for label in gone], labels <= {int(label) for label in gone}


def _labels(split: ForgetSplit, task: Task, runtime: Runtime) -> set[int]:
    if split.forget.has_column("label"):
        return {int(label) for label in split.forget.column("label")}
    batches: list[Batch] = list(runtime.batches(split.forget, task))
    field = getattr(task, "label", "label")
    return {int(label) for batch in batches for label in batch[field].tolist()}
