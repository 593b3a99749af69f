"""Fisher information as continual learners measure it: whose label, which classes, batch or single gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords
from palimpsest.core.records import Batch
from palimpsest.core.task import Task
from palimpsest.parts.importance import Averaging, Importance, squared_gradients
from palimpsest.retain.heads import masked

Labels = Literal["argmax", "true"]


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    labels: Labels = "argmax",
    averaging: Averaging = "batch-mean",
    met: Bool[Tensor, " classes"] | None = None,
) -> Importance:
    """Squared gradients of the cross-entropy, in evaluation mode.

    "batch-mean" is the rule of the repository GT-RIPL/Continual-Learning-Benchmark: the sum over batches of
    (gradient of the batch's mean)^2 * batch size / number of batches. It agrees with "per-sample", the mean over
    records of single squared gradients, for batches of one.

    Args:
        model: The network.
        batches: One pass over the data.
        task: Whose `logits` are taken.
        labels: The model's own answer, or the label.
        averaging: "batch-mean" or "per-sample".
        met: Classes that take part; all by default. The others get no importance.

    Raises:
        InvalidHyperparameter: For an unknown way.
        InvalidRecords: If there is no batch.
    """
    if labels not in ("argmax", "true") or averaging not in ("batch-mean", "per-sample"):
        raise InvalidHyperparameter(
            f"Labels are 'argmax' or 'true', the average 'batch-mean' or 'per-sample'; not {labels!r}, {averaging!r}."
        )
    judged = _Labelled(task, labels, met)
    if averaging == "per-sample":
        return squared_gradients(model, batches, judged, averaging)  # pyright: ignore[reportArgumentType]
    total: Importance = {}
    count = 0
    for batch in batches:
        found = squared_gradients(model, [batch], judged)  # pyright: ignore[reportArgumentType]
        size = len(batch["label"])
        total = {name: total.get(name, 0.0) + size * value for name, value in found.items()}
        count += 1
    if not count:
        raise InvalidRecords("The Fisher information needs at least one record.")
    return {name: value / count for name, value in total.items()}


@dataclass(frozen=True)
class _Labelled:
    """A task whose loss is the cross-entropy of chosen labels among the classes met."""

    task: Task
    labels: Labels
    met: Tensor | None

    def loss_per_example(self, model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        logits = self.task.logits(model, batch)
        if self.met is not None:
            logits = masked(logits, self.met[: logits.shape[1]])
        label = batch["label"].long() if self.labels == "true" else logits.detach().argmax(1)
        return F.cross_entropy(logits, label, reduction="none")


def importance_of_rows(importance: Importance, head: str, rows: Bool[Tensor, " classes"]) -> Importance:
    """Importances with those of other rows of the head set to 0.

    Args:
        importance: By parameter name.
        head: Name of the head.
        rows: Which of its outputs keep theirs.
    """
    kept = dict(importance)
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in kept:
            value = kept[name].clone()
            value[~rows[: len(value)]] = 0.0
            kept[name] = value
    return kept


def even_importance(weights: dict[str, Tensor]) -> Importance:
    """1 for every parameter."""
    return {name: torch.ones_like(value) for name, value in weights.items()}
