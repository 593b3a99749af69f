"""The forgetting score of the NeurIPS 2023 unlearning challenge, from many unlearned and retrained models.

Per forget record, an attacker picks the threshold, or the interval, of logit-scaled confidence that best
tells unlearned from retrained models; its error rates bound an epsilon.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float

from palimpsest.core.errors import InvalidAudit

DELTA = 1e-5
CAP = 50.0
PER_UNIT = 100
"""Thresholds per unit of confidence."""
REACH = 2.0
"""How far beyond the narrower distribution interval ends are tried."""
PEAKED = 0.01
"""Ratio of ranges below which one distribution is a spike that thresholds may miss: the cap is given."""
BUCKET = 0.5

Confidences = Float[np.ndarray, "models records"]
Values = Float[np.ndarray, " models"]


def forgetting_score(unlearned: Confidences, retrained: Confidences, delta: float = DELTA) -> float:
    """Mean over records of 2^-floor(2 epsilon); epsilons beyond ceil(log(models - 1)) count nothing.

    Args:
        unlearned: Logit-scaled confidence of every forget record under each unlearned model.
        retrained: The same under as many retrained models.
        delta: Of differential privacy.
    """
    return float(score_of(record_epsilons(unlearned, retrained, delta), len(unlearned)).mean())


def score_of(epsilons: Float[np.ndarray, " records"], models: int) -> Float[np.ndarray, " records"]:
    """What each record adds to the forgetting score, given the number of models a side."""
    buckets = math.floor(math.ceil(math.log(models - 1)) / BUCKET)
    index = np.floor(epsilons / BUCKET)
    return np.where(index < buckets, 0.5**index, 0.0)


def challenge_score(
    forgetting: float, retain: float, test: float, retrained_retain: float, retrained_test: float
) -> float:
    """The forgetting score times the ratios of retain and test accuracy to the retrained model's."""
    if min(retrained_retain, retrained_test) <= 0:
        raise InvalidAudit("The retrained model's accuracies must be above 0.")
    return forgetting * (retain / retrained_retain) * (test / retrained_test)


def record_epsilons(
    unlearned: Confidences, retrained: Confidences, delta: float = DELTA
) -> Float[np.ndarray, " records"]:
    """The best attack's epsilon per record, between 0 and `CAP`.

    Raises:
        InvalidAudit: If shapes differ, there are fewer than 3 models a side, values are not finite, or no
            threshold of a record can be judged.
    """
    if unlearned.ndim != 2 or unlearned.shape != retrained.shape or len(unlearned) < 3:
        raise InvalidAudit(
            "The challenge score needs as many unlearned as retrained models, at least 3, on the same records; "
            f"got {unlearned.shape} and {retrained.shape}."
        )
    if not (np.isfinite(unlearned).all() and np.isfinite(retrained).all()):
        raise InvalidAudit("Confidences hold NaN or infinity.")
    pairs = zip(unlearned.T, retrained.T, strict=True)
    return np.array([_epsilon(mine, theirs, delta) for mine, theirs in pairs])


def _epsilon(unlearned: Values, retrained: Values, delta: float) -> float:
    swap = np.median(retrained) > np.median(unlearned)
    positive, negative = (retrained, unlearned) if swap else (unlearned, retrained)
    ranges = sorted((np.ptp(positive), np.ptp(negative)))
    if ranges[1] == 0 and positive[0] == negative[0]:
        return 0.0
    if ranges[1] == 0 or ranges[0] / ranges[1] < PEAKED:
        return CAP
    double = _interval_rates(positive, negative)
    single = _threshold_rates(positive, negative)
    fpr, fnr = (np.concatenate(rates) for rates in zip(double, single, strict=True))
    if ((fpr == 0) & (fnr == 0)).any():
        return CAP
    kept = (fpr > 0) & (fnr > 0)
    if not kept.any():
        raise InvalidAudit("No threshold errs on both sides without separating perfectly: too few models.")
    fpr, fnr = fpr[kept], fnr[kept]
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = [np.log(1 - delta - fpr) - np.log(fnr), np.log(1 - delta - fnr) - np.log(fpr)]
    return float(np.clip(np.nanmax(bounds), 0, CAP))


def _threshold_rates(positive: Values, negative: Values) -> tuple[np.ndarray, np.ndarray]:
    """Error rates (false positives, false negatives) of "at least t is positive"."""
    low, high = min(positive.min(), negative.min()), max(positive.max(), negative.max())
    # The published grid is single precision; comparisons with values on the grid depend on it.
    grid = (
        torch.linspace(float(low), float(high), math.ceil((high - low) * PER_UNIT)).numpy().astype(np.float64)
    )
    fpr = 1 - np.searchsorted(np.sort(negative), grid, side="left") / len(negative)
    fnr = np.searchsorted(np.sort(positive), grid, side="left") / len(positive)
    return fpr, fnr


def _interval_rates(positive: Values, negative: Values) -> tuple[np.ndarray, np.ndarray]:
    """Error rates of "between left and right is positive", the narrower distribution being positive."""
    if np.ptp(positive) >= np.ptp(negative):
        positive, negative = negative, positive
    width = np.ptp(positive)
    low, high = positive.min() + width - REACH, positive.max() + REACH
    right = np.linspace(low, high, math.ceil((high - low) * PER_UNIT))
    shift = np.linspace(-width - REACH, -width + REACH, math.ceil(2 * REACH * PER_UNIT))
    ends = (right[:, None] + shift).ravel(), np.repeat(right, len(shift))
    return _share_between(negative, *ends), 1 - _share_between(positive, *ends)


def _share_between(values: Values, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    ordered = np.sort(values)
    upto = np.searchsorted(ordered, right, side="right")
    below = np.searchsorted(ordered, left, side="left")
    return np.maximum(upto - below, 0) / len(values)
