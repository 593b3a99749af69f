"""Worst-case privacy score: can an unlearned model be told from a retrained one on the forget records?

After Unlearning Comparator (arXiv 2508.12730): the best threshold on entropy or on confidence, in either
direction, turned from its error rates into an epsilon and into a score between 0 and 1. One path serves
all: the same records on both sides, raw values, the number of thresholds in the record.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.audit.membership.signals import class_probabilities, entropy, scaled_confidence
from palimpsest.core.errors import InvalidAudit

DELTA = 1e-5
CLIP = 1e-10
RANGES = {"entropy": (0.0, 2.5), "confidence": (-2.5, 10.0)}
THRESHOLDS = 51

Values = Float[np.ndarray, " records"]
Rates = Float[np.ndarray, "*any thresholds"]
Direction = Literal["unlearn", "retrain"]
DIRECTIONS: tuple[Direction, ...] = ("unlearn", "retrain")


class ScanRow(NamedTuple):
    """What one threshold achieves."""

    threshold: float
    fpr: float
    fnr: float
    attack_score: float


def privacy_features(
    logits: Float[Tensor, "records classes"],
    entropy_temperature: float = 2.0,
    confidence_temperature: float = 1.0,
) -> dict[str, Values]:
    """What the attacker looks at: entropy of a softened softmax, and top-1 confidence.

    Confidence is log p_max - log(1 - p_max), with 1 - p_max summed over the other classes.
    """
    return {
        "entropy": entropy(class_probabilities(logits, entropy_temperature)).numpy(),
        "confidence": scaled_confidence(logits / confidence_temperature, logits.argmax(1)).numpy(),
    }


def attack_scores(fpr: Rates, fnr: Rates, delta: float = DELTA) -> Rates:
    """Score 1 - 2^-epsilon of an attack from its error rates.

    epsilon = max(0, min(ln(1 - delta - FPR) - ln FNR, ln(1 - delta - FNR) - ln FPR)); no error at all gives
    1, an error rate of 1 - delta or more gives 0.
    """
    a, b = (np.clip(rate, CLIP, 1 - delta - CLIP) for rate in (fpr, fnr))
    bounds = np.minimum(np.log(1 - delta - a) - np.log(b), np.log(1 - delta - b) - np.log(a))
    score = 1 - np.exp2(-np.maximum(bounds, 0.0))
    score = np.where((fpr >= 1 - delta) | (fnr >= 1 - delta), 0.0, score)
    return np.where((fpr == 0) & (fnr == 0), 1.0, score)


def exceedance(
    values: Values, bounds: tuple[float, float], thresholds: int = THRESHOLDS
) -> Float[np.ndarray, "records thresholds"]:
    """1 where a record's value, clipped into the range, is at or above a threshold of the even grid."""
    if thresholds < 2 or not bounds[0] < bounds[1]:
        raise InvalidAudit(
            f"A scan needs 2 or more thresholds on a rising range, got {thresholds} on {bounds}."
        )
    if len(values) == 0 or not np.isfinite(values).all():
        raise InvalidAudit("A threshold scan needs finite values of at least one record.")
    return (np.clip(values, *bounds)[:, None] >= np.linspace(*bounds, thresholds)).astype(np.float64)


def threshold_scan(
    unlearned: Values,
    retrained: Values,
    thresholds: int = THRESHOLDS,
    bounds: tuple[float, float] = RANGES["entropy"],
    direction: Direction = "unlearn",
    decimals: int | None = None,
) -> list[ScanRow]:
    """Error rates and score of every threshold.

    Args:
        unlearned: A feature of the forget records under the unlearned model.
        retrained: The same under the retrained model.
        thresholds: Number of even steps, both ends included.
        bounds: First and last threshold; values are clipped into them.
        direction: Which model is positive, that is, expected at or above the threshold.
        decimals: Round rates and scores, as the published tool stores them.
    """
    if direction not in DIRECTIONS:
        raise InvalidAudit(f"The direction must be one of {', '.join(DIRECTIONS)}, not '{direction}'.")
    sides = [exceedance(values, bounds, thresholds).mean(0) for values in (unlearned, retrained)]
    positive, negative = sides if direction == "unlearn" else sides[::-1]
    grid = np.linspace(*bounds, thresholds)
    columns = [grid, negative, 1 - positive, attack_scores(negative, 1 - positive)]
    if decimals is not None:
        columns = [np.round(column, decimals) for column in columns]
    return [ScanRow(*(float(value) for value in row)) for row in zip(*columns, strict=True)]


def worst_case_privacy_score(
    unlearned: Float[Tensor, "records classes"],
    retrained: Float[Tensor, "records classes"],
    thresholds: int = THRESHOLDS,
    decimals: int | None = None,
) -> float:
    """1 - the best attack over both features, both directions and all thresholds.

    Args:
        unlearned: Logits of the forget records under the unlearned model.
        retrained: Logits of the same records under a retrained model.
        thresholds: Per feature and direction.
        decimals: Round attack scores first, as the published tool does.

    Returns:
        1: not to be told apart, 0: perfectly separable.

    Raises:
        InvalidAudit: If the records are not the same number on both sides.
    """
    if unlearned.shape != retrained.shape:
        raise InvalidAudit(
            f"Both models must be seen on the same records, got logits {tuple(unlearned.shape)} and "
            f"{tuple(retrained.shape)}."
        )
    mine, theirs = privacy_features(unlearned), privacy_features(retrained)
    best = max(
        row.attack_score
        for name, bounds in RANGES.items()
        for direction in DIRECTIONS
        for row in threshold_scan(mine[name], theirs[name], thresholds, bounds, direction, decimals)
    )
    return 1 - best


def bootstrap_privacy_scores(
    unlearned: Float[Tensor, "records classes"],
    retrained: Float[Tensor, "records classes"],
    random: np.random.Generator,
    draws: int = 200,
    thresholds: int = THRESHOLDS,
) -> Float[np.ndarray, " draws"]:
    """Privacy scores of resampled forget records, the same draw on both sides.

    The best of many thresholds on a resample is better than on the records themselves, so these scores
    lie too low; their spread is what they are for.
    """
    n = len(unlearned)
    weights = random.multinomial(n, np.full(n, 1 / n), size=draws) / n
    mine, theirs = privacy_features(unlearned), privacy_features(retrained)
    best = np.zeros(draws)
    for name, bounds in RANGES.items():
        a, b = (weights @ exceedance(side[name], bounds, thresholds) for side in (mine, theirs))
        for positive, negative in ((a, b), (b, a)):
            best = np.maximum(best, attack_scores(negative, 1 - positive).max(1))
    return 1 - best


def class_forgetting_accuracies(
    train: Float[Tensor, " classes"], test: Float[Tensor, " classes"], forgotten: int
) -> dict[str, float]:
    """UA and RA on training data, TUA and TRA on test data, from accuracies per class.

    Args:
        train: Accuracy of each class on training records.
        test: The same on test records.
        forgotten: The class that was to be forgotten.

    Returns:
        UA, TUA: accuracy of the forgotten class. RA, TRA: unweighted mean of the others.
    """
    classes = len(train)
    if len(test) != classes or classes < 2 or not 0 <= forgotten < classes:
        raise InvalidAudit(
            f"Accuracies of {classes} and {len(test)} classes with class {forgotten} forgotten do not fit."
        )
    kept = torch.arange(classes) != forgotten
    return {
        "UA": float(train[forgotten]),
        "RA": float(train[kept].mean()),
        "TUA": float(test[forgotten]),
        "TRA": float(test[kept].mean()),
    }
