"""Which classes to forget, so that unlearning is put to a hard test: lists near a downstream task, and random ones.

Forgetting classes at random hardly moves a representation, since the features of the other classes serve
them too. Classes that are close in meaning to a downstream task are what its features were learned from
("top" class-wise forgetting, arXiv 2503.06991): retraining without them loses transfer, and a method that
only hides them does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import nn

from palimpsest.audit.feature_sets import labels_of, pass_over
from palimpsest.core.errors import AbsentClass, InvalidAudit, InvalidHyperparameter, shorten
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task

Means = Float[np.ndarray, "classes dim"]


@dataclass(frozen=True)
class Ranked:
    """A source class and how near it is to the downstream task.

    Attributes:
        label: Of the source class.
        similarity: Cosine of its mean feature to that of the nearest downstream class.
        nearest: That class.
    """

    label: int
    similarity: float
    nearest: int


def forget_list(
    model: nn.Module,
    source: Records,
    task: Task,
    count: int,
    downstream: Records | None = None,
    kind: Literal["top", "random"] = "top",
    runtime: Runtime | None = None,
    layer: str | None = None,
    among: Sequence[int] | None = None,
) -> list[int]:
    """Classes to forget: `pal.by_column("label", *forget_list(...))` is the request.

    Args:
        model: Whose features say what is near: the original, or an independent model.
        source: Training records, with labels.
        task: The domain.
        count: How many classes.
        downstream: Records of the downstream task, with labels; for "top".
        kind: "top" takes the classes nearest to the downstream task, "random" any, by the runtime's seed.
        runtime: Seed and device.
        layer: Module whose pooled output are the features; the input of the head by default.
        among: Source classes to choose from; all by default.

    Raises:
        InvalidHyperparameter: If `count` is not between 1 and the number of classes less one.
        AbsentClass: If a class of `among` has no record.
        InvalidAudit: If "top" has no downstream records, or features cannot be compared.
    """
    runtime = runtime or Runtime()
    labels = labels_of(source, task, runtime)
    known = np.unique(labels)
    chosen = known if among is None else np.asarray(sorted(set(among)))
    absent = sorted(set(chosen.tolist()) - set(known.tolist()))
    if absent:
        raise AbsentClass(
            f"No source record has label {shorten(absent)}; there are {shorten(known.tolist(), 12)}."
        )
    if kind not in ("top", "random"):
        raise InvalidHyperparameter(f"kind must be 'top' or 'random', not {kind!r}.")
    if not 1 <= count <= min(len(chosen), len(known) - 1):
        raise InvalidHyperparameter(
            f"count must lie between 1 and {min(len(chosen), len(known) - 1)}, so that a class is left; it is {count}."
        )
    if kind == "random":
        drawn = runtime.numpy("forget list").choice(chosen, count, replace=False)
        return sorted(int(label) for label in drawn)
    if downstream is None:
        raise InvalidAudit("A 'top' list needs the records of a downstream task.")
    mask = np.isin(labels, chosen)
    mine = pass_over(model, source.select(mask), task, runtime, layer).features.numpy()
    theirs = pass_over(model, downstream, task, runtime, layer).features.numpy()
    ranked = rank_classes(mine, labels[mask], theirs, labels_of(downstream, task, runtime))
    return [item.label for item in ranked[:count]]


def rank_classes(
    source: Float[np.ndarray, "rows dim"],
    source_labels: NDArray[np.integer],
    downstream: Float[np.ndarray, "others dim"],
    downstream_labels: NDArray[np.integer],
) -> list[Ranked]:
    """Source classes from the nearest to the farthest from the downstream classes.

    Near is the cosine of class-mean features; of several downstream classes the nearest counts.

    Raises:
        InvalidAudit: If widths differ, values are NaN or Inf, or a class mean is zero.

    Example:
        >>> mine = np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> [item.label for item in rank_classes(mine, np.array([4, 7]), np.array([[0.1, 1.0]]), np.array([0]))]
        [7, 4]
    """
    if source.shape[1] != downstream.shape[1]:
        raise InvalidAudit(
            f"Features of width {source.shape[1]} and {downstream.shape[1]} have no common directions."
        )
    classes, means = class_means(source, source_labels)
    others, targets = class_means(downstream, downstream_labels)
    cosine = _directions(means) @ _directions(targets).T
    best = cosine.argmax(1)
    ranked = [
        Ranked(int(label), float(row[place]), int(others[place]))
        for label, row, place in zip(classes, cosine, best, strict=True)
    ]
    return sorted(ranked, key=lambda item: (-item.similarity, item.label))


def class_means(
    features: Float[np.ndarray, "rows dim"], labels: NDArray[np.integer]
) -> tuple[NDArray[np.integer], Means]:
    """The classes in order, and the mean feature of each.

    Raises:
        InvalidAudit: If rows and labels differ in number, or values are NaN or Inf.
    """
    if len(features) != len(labels) or not len(labels):
        raise InvalidAudit(f"There are {len(features)} rows of features and {len(labels)} labels.")
    if not np.isfinite(features).all():
        raise InvalidAudit("The features hold NaN or Inf.")
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(classes), features.shape[1]))
    np.add.at(sums, index, features)
    return classes, sums / counts[:, None]


def _directions(means: Means) -> Means:
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    if (lengths == 0).any():
        raise InvalidAudit("A class has a mean feature of zero, which has no direction.")
    return means / lengths
