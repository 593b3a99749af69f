"""ROC curves, true positive rates at fixed false positive rates, and what can be resolved at all.

Scores are high for members throughout. A rate is refused where the non-members are too few for it:
a false positive rate alpha needs 1/alpha of them to exist and 10/alpha to be stable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from palimpsest.core.errors import InvalidAudit
from palimpsest.core.intervals import auc, clopper_pearson

Scores = Float[np.ndarray, " records"]
STABLE = 10.0
"""Non-members per 1/alpha from which a rate is stable."""


@dataclass(frozen=True)
class TruePositives:
    """Members found at a threshold that lets at most a share alpha of the non-members pass.

    Attributes:
        rate: Share of members above the threshold.
        hit: Which members are above it, [members].
        false: Non-members above it.
        others: Number of non-members.
    """

    rate: float
    hit: np.ndarray
    false: int
    others: int


def check_scores(members: Scores, others: Scores) -> None:
    """Check scores of both sides.

    Raises:
        InvalidAudit: If a side is empty, not one number per record, or holds NaN or infinity.
    """
    for side, scores in (("members", members), ("non-members", others)):
        if np.ndim(scores) != 1 or len(scores) == 0:
            raise InvalidAudit(
                f"The scores of the {side} must be one number per record, got shape {np.shape(scores)}."
            )
        if not np.isfinite(scores).all():
            bad = int((~np.isfinite(scores)).sum())
            raise InvalidAudit(f"{bad} of {len(scores)} scores of the {side} are NaN or infinite.")


def resolvable(others: int, alpha: float) -> bool:
    """Whether a false positive rate alpha exists with this many non-members (at least 1/alpha)."""
    return alpha > 0 and others >= 1 / alpha - 1e-9


def tpr_at(members: Scores, others: Scores, alpha: float, *, strict: bool = True) -> TruePositives:
    """Largest true positive rate whose false positive rate is at most alpha.

    Args:
        members: Scores of members.
        others: Scores of non-members.
        alpha: False positive rate allowed.
        strict: Refuse where fewer than 1/alpha non-members exist.

    Raises:
        InvalidAudit: For unusable scores, or a rate that cannot be resolved.
    """
    check_scores(members, others)
    if not 0 <= alpha < 1:
        raise InvalidAudit(f"A false positive rate must lie in [0, 1), not {alpha}.")
    if strict and not resolvable(len(others), alpha):
        raise InvalidAudit(
            f"A false positive rate of {alpha:g} is not resolvable with {len(others)} non-members; "
            f"it needs at least {math.ceil(1 / alpha) if alpha else 'infinitely many'}."
        )
    allowed = math.floor(alpha * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][allowed]
    hit = members > threshold
    return TruePositives(float(hit.mean()), hit, int((others > threshold).sum()), len(others))


def roc(members: Scores, others: Scores) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Corners of the ROC curve from (0, 0) to (1, 1).

    Returns:
        (false positive rates, true positive rates), both rising.
    """
    from sklearn.metrics import roc_curve

    check_scores(members, others)
    truth = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    fpr, tpr, _ = roc_curve(truth, np.concatenate([members, others]))
    return fpr, tpr


def thinned(
    fpr: Float[np.ndarray, " points"], tpr: Float[np.ndarray, " points"], limit: int = 200
) -> list[tuple[float, float]]:
    """At most `limit` points of a curve: the half with the lowest rates, and an even choice of the rest."""
    if len(fpr) > limit:
        first = limit // 2
        rest = np.linspace(first, len(fpr) - 1, limit - first).round().astype(int)
        chosen = np.concatenate([np.arange(first), rest])
        fpr, tpr = fpr[chosen], tpr[chosen]
    return [(float(x), float(y)) for x, y in zip(fpr, tpr, strict=True)]


def best_accuracy(members: Scores, others: Scores) -> float:
    """Balanced accuracy of the best threshold, chosen on the same scores (so an upper end, never an estimate)."""
    fpr, tpr = roc(members, others)
    return float((1 + tpr - fpr).max() / 2)


def accuracy_at(members: Scores, others: Scores, threshold: float) -> tuple[float, float, float]:
    """Balanced accuracy of calling scores at or above a threshold member, with its 95 % interval.

    The threshold must come from elsewhere. The interval joins the exact ones of the two rates (MOVER, Zou
    and Donner 2008), so that it keeps its width where a rate is 0 or 1.

    Returns:
        (value, low, high).

    Example:
        >>> value, low, high = accuracy_at(np.array([2.0, 1.0]), np.array([0.0, -1.0]), 0.5)
        >>> value, low < 0.7, high
        (1.0, True, 1.0)
    """
    check_scores(members, others)
    right = (int((members >= threshold).sum()), len(members)), (int((others < threshold).sum()), len(others))
    rates = [hits / n for hits, n in right]
    ends = [clopper_pearson(hits, n) for hits, n in right]
    value = sum(rates) / 2
    below = math.hypot(*(rate - low for rate, (low, _) in zip(rates, ends, strict=True))) / 2
    above = math.hypot(*(high - rate for rate, (_, high) in zip(rates, ends, strict=True))) / 2
    return value, max(0.0, value - below), min(1.0, value + above)


def placements(members: Scores, others: Scores) -> tuple[Scores, Scores]:
    """For each member the share of non-members below it, for each non-member the share of members above it.

    Ties count half. The mean of either is the AUC; their variances are DeLong's.
    """
    m, n = len(members), len(others)
    together = stats.rankdata(np.concatenate([members, others]))
    above = (together[:m] - stats.rankdata(members)) / n
    below = 1 - (together[m:] - stats.rankdata(others)) / m
    return above, below


def range_error(one: tuple[Scores, Scores], several: Sequence[tuple[Scores, Scores]]) -> float:
    """Standard error of AUC(one) - mean AUC(several), all on the same records.

    The same records under different models are paired: what makes a record easy for all of them cancels.

    Args:
        one: Scores of (members, non-members) under a model.
        several: The same under other models.
    """
    rest = [placements(*scores) for scores in several]
    above, below = placements(*one)
    above = above - np.mean([item[0] for item in rest], axis=0)
    below = below - np.mean([item[1] for item in rest], axis=0)
    if len(above) < 2 or len(below) < 2:
        return math.inf
    return math.sqrt(float(np.var(above, ddof=1)) / len(above) + float(np.var(below, ddof=1)) / len(below))


__all__ = [
    "STABLE",
    "Scores",
    "TruePositives",
    "accuracy_at",
    "auc",
    "best_accuracy",
    "check_scores",
    "placements",
    "range_error",
    "resolvable",
    "roc",
    "thinned",
    "tpr_at",
]
