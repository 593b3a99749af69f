"""Similarity of representations: CKA with linear and Gaussian kernels, neighbours, matching layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter
from palimpsest.parts.cka import FEWEST_ROWS, Features, alignment, check_rows, linear_cka, rbf_cka

Kernel = Literal["linear", "rbf"]
Short = Literal["merge", "drop"]
"""What becomes of a last batch that is too short: it joins the one before, or is left out."""


def batch_cka(
    x: Features,
    y: Features,
    batch_size: int = 512,
    as_released: bool = False,
    *,
    kernel: Kernel = "linear",
    debiased: bool = False,
    fewest: int = FEWEST_ROWS,
    short: Short = "drop",
) -> list[float]:
    """CKA of consecutive batches; published evaluations report their unweighted mean, times 100.

    Args:
        x: Representations of one model.
        y: Of another, the same records in the same order.
        batch_size: Rows per batch.
        as_released: Biased linear CKA, a short last batch counted fully, whatever it holds: two rows always
            give 1, one row gives NaN.
        kernel: "linear" or "rbf".
        debiased: Use the unbiased estimator.
        fewest: A last batch of fewer rows is too short, unless it is the only one.
        short: What becomes of it.

    Raises:
        InvalidAudit: As `linear_cka`, for any batch.
    """
    check_rows(x, y)
    if as_released:
        return [_as_released(a, b) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)]
    similarity = linear_cka if kernel == "linear" else rbf_cka
    return [
        similarity(x[rows], y[rows], debiased=debiased)
        for rows in batches_of_rows(len(x), batch_size, fewest, short)
    ]


def batches_of_rows(n: int, batch_size: int, fewest: int = FEWEST_ROWS, short: Short = "drop") -> list[slice]:
    """Consecutive batches of n rows, without a last one of fewer than `fewest`.

    Example:
        >>> batches_of_rows(10, 4, fewest=3, short="merge")
        [slice(0, 4, None), slice(4, 10, None)]
    """
    starts = list(range(0, n, batch_size))
    stop = n
    if len(starts) > 1 and n - starts[-1] < fewest:
        last = starts.pop()
        stop = n if short == "merge" else last
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], stop], strict=True)]


def effective_rank(x: Features) -> float:
    """Participation ratio of the variances of centred features, tr(C)^2 / tr(C^2), in [1, dim].

    Biased CKA needs several times as many rows as this, or it reads high whatever is compared.
    """
    centred = x.double() - x.double().mean(0)
    spread = centred.T @ centred if x.shape[1] <= len(x) else centred @ centred.T
    return float(spread.trace().square() / spread.square().sum())


def knn_predictions(
    train: NDArray[np.floating],
    labels: NDArray[np.integer],
    test: NDArray[np.floating],
    k: int = 5,
) -> NDArray[np.int64]:
    """Labels by majority of the k nearest neighbours by cosine distance, [test rows].

    Raises:
        InvalidHyperparameter: If k is larger than the number of training rows.
        InvalidAudit: For NaN or Inf.
    """
    from sklearn.neighbors import KNeighborsClassifier

    if not 1 <= k <= len(train):
        raise InvalidHyperparameter(f"k must lie between 1 and the {len(train)} training rows, not {k}.")
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise InvalidAudit("The features hold NaN or Inf.")
    return KNeighborsClassifier(k, metric="cosine").fit(train, labels).predict(test)


def knn_accuracy(
    train: NDArray[np.floating],
    train_labels: NDArray[np.integer],
    test: NDArray[np.floating],
    test_labels: NDArray[np.integer],
    k: int = 5,
) -> float:
    """Accuracy of `knn_predictions`."""
    return float((knn_predictions(train, train_labels, test, k) == test_labels).mean())


def composite(gaps: Sequence[float], similarities: Sequence[float] = ()) -> float:
    """Our aggregation of AGL and AGR (arXiv 2503.06991 names them): product of 1 - gap and of similarities.

    Args:
        gaps: Absolute differences of accuracies to the retrained model's, in [0, 1].
        similarities: CKA to the retrained model; negative ones (debiased) count as 0.

    Returns:
        In [0, 1]; 1 if nothing differs.

    Example:
        >>> composite([0.0, 0.5], [0.8])
        0.4
    """
    return math.prod(1 - gap for gap in gaps) * math.prod(max(0.0, value) for value in similarities)


def harmonic_mean(one: float, other: float) -> float:
    """2 ab / (a + b); 0 if both are 0."""
    return 2 * one * other / (one + other) if one + other else 0.0


def matched_names(mine: Mapping[str, int], other: Mapping[str, int]) -> list[tuple[str, str]]:
    """Layers (or parameters) of two models that are the same, in the order of the first model.

    Names are compared after what a wrapper puts before them ("model.fc" and "fc"): of all pairs of
    prefixes the one under which most names agree. Where none agrees, the order decides, if both models
    have as many layers, of the same widths.

    Args:
        mine: Widths by name, of one model.
        other: Of another.

    Raises:
        InvalidAudit: If the two have nothing in common.

    Example:
        >>> matched_names({"net.conv1": 8, "net.block.conv1": 4}, {"conv1": 8, "block.conv1": 4})
        [('net.conv1', 'conv1'), ('net.block.conv1', 'block.conv1')]
    """
    if list(mine) == list(other):
        return [(name, name) for name in mine]
    prefixes = {("", ""), *(_prefixes(a, b) for a in mine for b in other)}
    shortest_first = sorted(prefixes, key=lambda pair: (len("".join(pair)), pair))
    matches = [_matches(mine, other, *pair) for pair in shortest_first]
    best = max(matches, key=len)
    if not best and list(mine.values()) == list(other.values()):
        best = list(zip(mine, other, strict=True))
    if not best:
        raise InvalidAudit(
            f"The layers {', '.join(mine) or '(none)'} cannot be matched with "
            f"{', '.join(other) or '(none)'}: "
            "neither names nor widths agree."
        )
    return best


def _prefixes(a: str, b: str) -> tuple[str, str]:
    """What stands before the part of two dotted names that they share at the end."""
    parts, others = a.split("."), b.split(".")
    pairs = zip(reversed(parts), reversed(others), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    rests = (parts[: len(parts) - shared], others[: len(others) - shared])
    first, second = ("".join(f"{part}." for part in rest) for rest in rests)
    return first, second


def _matches(
    mine: Mapping[str, int], other: Mapping[str, int], prefix: str, other_prefix: str
) -> list[tuple[str, str]]:
    pairs = [(name, other_prefix + name.removeprefix(prefix)) for name in mine if name.startswith(prefix)]
    return [(name, partner) for name, partner in pairs if partner in other]


def _as_released(x: Features, y: Features) -> float:
    """Biased linear CKA by its formula alone; what is not defined is NaN."""
    a, b = (features.double() - features.double().mean(0) for features in (x, y))
    return alignment(a @ a.T, b @ b.T)
