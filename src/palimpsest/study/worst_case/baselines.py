"""Cheaper ways to choose a set: what a search must be compared with.

Every score is per record; the m records (classes, by their mean) with the LOWEST are the set, which is the
part that a coreset leaves out: "easy" or redundant records. Only `moderate` takes both ends of its scores.

- random: what every study forgets by default.
- lowest-loss: the m lowest losses under the ORIGINAL model. It needs no search at all, and on small data it
  is about as hard to forget as what a search finds: report both.
- el2n: length of (softmax - one-hot label), and grand: length of a record's loss gradient, both averaged over
  models early in their training ("Deep Learning on a Data Diet", Paul, Ganguli, Dziugaite, NeurIPS 2021).
- moderate: distance of the features to the median of their class, under the original model; the coreset is
  the middle, the set both ends ("Moderate Coreset", Xia et al., ICLR 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, UnknownName
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.parts.parameters import trainable, unwrapped
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.parts.training import TrainingRecipe, fit, recipe_of
from palimpsest.study.worst_case.items import By, Items, set_size
from palimpsest.study.worst_case.lower_level import record_losses

Scores = Float[np.ndarray, " records"]
EARLY_MODELS = 3
"""Models early in their training that EL2N and GraNd are averaged over."""
EARLY_SHARE = 0.1
"""Share of the epochs of the original that they are trained for, at least one."""


@dataclass(frozen=True)
class Chooser:
    """Chooses baseline sets of one size from one training set.

    Attributes:
        model: The original.
        records: Its training records.
        task: The domain.
        size: As `worst_case` takes it.
        by: "record" or "class".
        runtime: Seed of the early models, device.
        recipe: How the original was trained, if the model does not say.
    """

    model: nn.Module
    records: Records
    task: Task
    size: int | float
    by: By = "record"
    runtime: Runtime = field(default_factory=Runtime)
    recipe: TrainingRecipe | None = None

    def ids(self, name: str, seed: int = 0) -> tuple[str, ...]:
        """The ids of a baseline's records; the seed matters to "random" only.

        Raises:
            UnknownName: If there is no such baseline; suggests the nearest.
        """
        check_baselines([name], self.by, self.recipe or recipe_of(self.model))
        items = self._items
        m = set_size(self.size, items)
        if name == RANDOM:
            order = np.random.default_rng([seed, self.runtime.seed]).permutation(items.count)
        else:
            scores = items.losses(SCORES[name](self), "mean", 1)
            order = np.argsort(scores, kind="stable")
        low = m // 2 if name == "moderate" else m
        chosen = [*order[:low], *order[items.count - (m - low) :]]
        mask = items.records_of(np.asarray(chosen))
        return tuple(np.asarray(self.records.ids, dtype=object)[mask].tolist())

    @cached_property
    def _items(self) -> Items:
        return Items.of(self.records, self.by)

    @cached_property
    def early(self) -> list[nn.Module]:
        """Models early in a training like the original's."""
        recipe = self.recipe or recipe_of(self.model)
        if recipe is None:
            raise MissingNeed("EL2N and GraNd train models early on: say how the original was trained.")
        short = replace(recipe, epochs=max(1, round(EARLY_SHARE * recipe.epochs)), schedule="constant")
        runtimes = [self.runtime.with_seed(self.runtime.derive("early", i)) for i in range(EARLY_MODELS)]
        return [
            fit(reinitialised(self.model, each), self.records, self.task, each, short) for each in runtimes
        ]


def lowest_loss(chooser: Chooser) -> Scores:
    """Loss under the original model."""
    return record_losses(chooser.model, chooser.records, chooser.task, chooser.runtime)


def el2n(chooser: Chooser) -> Scores:
    """Error vectors' lengths, averaged over early models."""
    records, task, runtime = chooser.records, chooser.task, chooser.runtime
    label = getattr(task, "label", "label")

    def of(model: nn.Module) -> Scores:
        with torch.no_grad(), evaluating(model):
            parts = [
                el2n_scores(task.logits(model, batch), batch[label].long()).cpu()
                for batch in runtime.batches(records, task)
            ]
        return torch.cat(parts).double().numpy()

    return np.mean([of(model) for model in chooser.early], axis=0)


def grand(chooser: Chooser) -> Scores:
    """Lengths of single records' loss gradients, averaged over early models."""
    records, task, runtime = chooser.records, chooser.task, chooser.runtime
    return np.mean(
        [gradient_lengths(model, runtime.batches(records, task), task) for model in chooser.early], axis=0
    )


def moderate(chooser: Chooser) -> Scores:
    """Distances of features to the median of their class, under the original model."""
    records, task, runtime = chooser.records, chooser.task, chooser.runtime
    model = runtime.place(chooser.model)
    with torch.no_grad(), evaluating(model):
        features = [task.features(model, batch).cpu() for batch in runtime.batches(records, task)]
    labels = np.unique(records.column("label"), return_inverse=True)[1]
    return moderate_distance(torch.cat(features).double().numpy(), labels)


SCORES: dict[str, Callable[[Chooser], Scores]] = {
    "lowest-loss": lowest_loss, "el2n": el2n, "grand": grand, "moderate": moderate,
}  # fmt: skip
"""Scores of records by name of the baseline."""
RANDOM = "random"
BASELINES = (RANDOM, *SCORES)
NEED_TRAINING = ("el2n", "grand")


def check_baselines(names: Iterable[str], by: By, recipe: TrainingRecipe | None) -> None:
    """Check that baselines exist and can be run.

    Raises:
        UnknownName: For a name that is none; suggests the nearest.
        InvalidHyperparameter: For the moderate coreset by class: its scores compare records of one class.
        MissingNeed: If models must be trained and nobody says how.
    """
    for name in names:
        if name not in BASELINES:
            raise UnknownName("baseline", name, BASELINES)
        if name == "moderate" and by == "class":
            raise InvalidHyperparameter("The baseline 'moderate' chooses records, not classes.")
        if name in NEED_TRAINING and recipe is None:
            raise MissingNeed(
                f"The baseline '{name}' trains models early on: say how the original was trained."
            )


def el2n_scores(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """||softmax(logits) - one-hot(label)||, in [0, sqrt(2)].

    Example:
        >>> round(el2n_scores(torch.zeros(1, 2), torch.tensor([0])).item(), 4)
        0.7071
    """
    errors = logits.softmax(1) - nn.functional.one_hot(labels, logits.shape[1])
    return errors.norm(dim=1)


def gradient_lengths(model: nn.Module, batches: Iterable[Batch], task: Task, chunk: int = 32) -> Scores:
    """Length of every record's own loss gradient over all trainable parameters, in evaluation mode.

    Args:
        model: Left untouched.
        batches: One pass over the records.
        task: Whose `loss_per_example` is differentiated.
        chunk: Records whose gradients are held at once.
    """
    inner = unwrapped(model)
    moving = {name: p.detach() for name, p in trainable(model).items()}
    fixed = {name: p.detach() for name, p in inner.named_parameters() if not p.requires_grad}
    fixed |= dict(inner.named_buffers())

    class Bound(nn.Module):
        """The model with given parameters, callable where a task expects a model."""

        def __init__(self, given: dict[str, Tensor]):
            super().__init__()
            self.given = given

        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return functional_call(inner, (self.given, fixed), args, kwargs)

    def of_one(given: dict[str, Tensor], example: dict[str, Tensor]) -> Tensor:
        single = {key: value.unsqueeze(0) for key, value in example.items()}
        return task.loss_per_example(Bound(given), single).squeeze(0)

    lengths: list[Tensor] = []
    with torch.enable_grad(), evaluating(model):
        for batch in batches:
            tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
            for start in range(0, len(batch["id"]), chunk):
                part = {key: value[start : start + chunk] for key, value in tensors.items()}
                gradients = vmap(grad(of_one), in_dims=(None, 0))(moving, part)
                squares = [value.flatten(1).square().sum(1) for value in gradients.values()]
                lengths.append(torch.stack(squares).sum(0).sqrt().detach().cpu())
    return torch.cat(lengths).double().numpy()


def moderate_distance(
    features: Float[np.ndarray, "records dim"], labels: Sequence[int] | Int[np.ndarray, " records"]
) -> Scores:
    """Euclidean distance of every record's features to the median vector of its class.

    Example:
        >>> moderate_distance(np.array([[0.0], [1.0], [5.0]]), [0, 0, 0]).tolist()
        [1.0, 0.0, 4.0]
    """
    own = np.asarray(labels)
    distance = np.zeros(len(features))
    for label in np.unique(own):
        mine = features[own == label]
        distance[own == label] = np.linalg.norm(mine - np.median(mine, axis=0), axis=1)
    return distance
