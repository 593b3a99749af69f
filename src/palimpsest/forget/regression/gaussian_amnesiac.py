"""Gaussian amnesiac unlearning: teach random targets, drawn once, for the forget records."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.pairing import mixed
from palimpsest.parts.parameters import trainable
from palimpsest.parts.training import TrainingRecipe, step
from palimpsest.tasks.regression import Regression


@unlearner(
    "gaussian-amnesiac",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("regression",),
    paper=Paper("Deep Regression Unlearning", "ICML 2023", "2210.08196"),
    search={"lr": Span(1e-4, 1e-2, log=True), "epochs": Span(1, 5, integer=True)},
)
@dataclass(frozen=True)
class GaussianAmnesiac:
    """Fine-tune on all training records, the forgotten ones with random targets.

    Random relabelling for numbers: targets of the forget records are drawn from a normal distribution with
    the mean and standard deviation (ddof 1) of all training targets, once, and stay the same in every
    epoch: new draws would average out to the mean, which is another method. Several targets are drawn
    independently of each other. Beside blindspot unlearning it is the simple baseline.

    Deviations: the released code keeps the epoch that is best on a validation set of retained records,
    which a request does not have. With more than one epoch a share of the retained records (`validation`)
    is set aside for that and not trained on.

    Attributes:
        lr: Learning rate of Adam.
        epochs: Passes over all training records; 1 (AgeDB) and 5 (STS-B) are published.
        batch_size: Records per step.
        validation: Share of the retained records that chooses the epoch; 0 keeps the last one.
    """

    lr: float = 1e-3
    epochs: int = 1
    batch_size: int = 256
    validation: float = 0.1

    def __post_init__(self) -> None:
        _ = self.recipe
        check_range("validation", self.validation, 0, 0.9)
        if self.batch_size < 2:
            raise InvalidHyperparameter(f"batch_size must be at least 2, not {self.batch_size}.")

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer's settings."""
        return TrainingRecipe(self.epochs, self.lr, self.batch_size)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Regression, runtime: Runtime) -> nn.Module:
        """A copy of the model, trained on random targets for the forget records.

        Raises:
            MissingNeed: If the retained records are not at hand.
            InvalidRecords: If a target is constant, or too few records are there to set some aside.
            NonFiniteLoss: If training diverges.
        """
        if split.retain is None:
            raise MissingNeed("Gaussian amnesiac unlearning needs the retained records.")
        student = runtime.place(copy.deepcopy(model))
        trainable(student)
        drawn = gaussian_targets(
            torch.from_numpy(task.all_targets(split.train)), len(split.forget), runtime.generator("targets")
        )
        places = {name: place for place, name in enumerate(split.forget.ids)}
        kept, judges = self._set_aside(split.retain, runtime)
        optimizer = self.recipe.build_optimizer(student)
        order = runtime.generator("gaussian-amnesiac order")
        best: tuple[float, dict[str, Tensor]] | None = None
        with runtime.seeded("gaussian-amnesiac"):
            for _ in runtime.track(range(self.epochs), "gaussian-amnesiac"):
                student.train()
                everything = split.forget.union(kept)
                for batch, gone in mixed(everything, split.forget, task, runtime, self.batch_size, order):
                    taught = relabelled(batch, gone, drawn, places, task)
                    step(student, optimizer, task.loss_per_example(student, taught).mean(), batch)
                if judges is not None:
                    loss = mean_loss(student, judges, task, runtime)
                    if best is None or loss < best[0]:
                        best = loss, copy.deepcopy(student.state_dict())
        if best is not None:
            student.load_state_dict(best[1])
        return student.eval()

    def _set_aside(self, retain: Records, runtime: Runtime) -> tuple[Records, Records | None]:
        """Retained records to train on, and those that choose the epoch."""
        count = round(self.validation * len(retain)) if self.epochs > 1 else 0
        if not count:
            return retain, None
        if count == len(retain):
            raise InvalidRecords(f"{len(retain)} retained records are too few to set {count} aside.")
        chosen = runtime.numpy("validation").permutation(len(retain))[:count]
        mask = torch.zeros(len(retain), dtype=torch.bool)
        mask[torch.from_numpy(chosen)] = True
        return retain.select(~mask.numpy()), retain.select(mask.numpy())


def gaussian_targets(
    targets: Float[Tensor, "records targets"], count: int, generator: torch.Generator
) -> Float[Tensor, "count targets"]:
    """`count` draws from a normal distribution fitted to each target: mean and deviation (ddof 1).

    Raises:
        InvalidRecords: If a target is constant: then there is nothing to draw from.
    """
    mean = targets.mean(0)
    deviation = targets.std(0) if len(targets) > 1 else torch.zeros_like(mean)
    if not (deviation > 0).all():
        raise InvalidRecords(
            f"The training targets are constant ({targets[0].tolist()}): a normal distribution has no width, and "
            "random targets would be the true ones."
        )
    noise = torch.randn(count, targets.shape[1], generator=generator, dtype=targets.dtype)
    return mean + deviation * noise


def relabelled(
    batch: Batch,
    forgotten: Tensor,
    drawn: Float[Tensor, "records targets"],
    places: dict[str, int],
    task: Regression,
) -> Batch:
    """The batch with the drawn targets in its forget rows, by record id; the others are as they were."""
    targets = task.targets(batch)
    rows = [places[name] for name in batch["id"] if name in places]
    changed = targets.clone()
    changed[forgotten] = drawn[rows].to(targets)
    return {**batch, task.label: changed}


@torch.no_grad()
def mean_loss(model: nn.Module, records: Records, task: Regression, runtime: Runtime) -> float:
    """Mean loss over records, in evaluation mode."""
    with evaluating(model):
        losses = [task.loss_per_example(model, batch) for batch in runtime.batches(records, task)]
    return float(torch.cat(losses).mean())
