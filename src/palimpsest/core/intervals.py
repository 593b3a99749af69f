"""Confidence intervals: exact for rates, bootstrap for means, DeLong for areas under the curve."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from palimpsest.core.errors import InvalidAudit


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a rate.

    Example:
        >>> low, high = clopper_pearson(0, 20)
        >>> low, round(high, 3)
        (0.0, 0.168)
    """
    if n < 1 or not 0 <= successes <= n:
        raise InvalidAudit(f"A rate of {successes} out of {n} is not defined.")
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, successes, n - successes + 1)) if successes else 0.0
    high = float(stats.beta.ppf(1 - tail, successes + 1, n - successes)) if successes < n else 1.0
    return low, high


def mean_interval(
    values: NDArray[Any], random: np.random.Generator, draws: int = 1000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, over records."""
    values = np.asarray(values, np.float64)
    if len(values) == 0:
        raise InvalidAudit("The mean of no values has no interval.")
    means = values[random.integers(0, len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def auc(members: NDArray[Any], others: NDArray[Any]) -> float:
    """Area under the ROC curve: the chance that a member scores above a non-member (ties half)."""
    ranks = stats.rankdata(np.concatenate([members, others]))
    m, n = len(members), len(others)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def auc_interval(
    members: NDArray[Any], others: NDArray[Any], confidence: float = 0.95
) -> tuple[float, float, float]:
    """AUC with DeLong's standard error and interval.

    Returns:
        (standard error, low, high); the interval is cut to [0, 1].
    """
    m, n = len(members), len(others)
    if m < 2 or n < 2:
        raise InvalidAudit(f"An interval of the AUC needs 2 scores a side, got {m} and {n}.")
    together = stats.rankdata(np.concatenate([members, others]))
    above = (together[:m] - stats.rankdata(members)) / n
    below = 1 - (together[m:] - stats.rankdata(others)) / m
    error = math.sqrt(float(np.var(above, ddof=1)) / m + float(np.var(below, ddof=1)) / n)
    value, half = auc(members, others), float(stats.norm.ppf(0.5 + confidence / 2)) * error
    return error, max(0.0, value - half), min(1.0, value + half)


def standard_error(values: NDArray[Any]) -> float:
    """Standard error of a mean."""
    values = np.asarray(values, np.float64)
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf
