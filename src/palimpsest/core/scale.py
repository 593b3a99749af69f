"""The one scale for everything: K, control-normalised, judged by the spread between controls.

For a measurement m in which more means more knowledge, taken alike on all models,
K = (m_unlearned - m_control) / (m_original - m_control) (card `sok`): 0 as if never trained on,
1 untouched, below 0 over-forgotten.

How far a model that really was retrained may lie from the mean of n controls is a prediction interval.
The spread between so few controls is itself uncertain, so it is combined with a prior spread that counts
as much as `PRIOR_WEIGHT` further controls (a scaled inverse chi-squared prior on the variance). With one
control the prior is all there is; every further control replaces some of it by what was measured. A
measurement states its own prior where seeds are known to spread it; else it is a share of the range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from palimpsest.core.finding import Finding, Judgement

PRIOR_SPREAD = 0.15
"""Prior deviation of a retrained model from the control, as a share of the original-control range."""
PRIOR_WEIGHT = 4.0
"""Degrees of freedom of the prior."""
VALID_RANGE = 3.0
"""A probe is valid if the range is at least this many standard deviations of a retrained model."""
CONFIDENCE = 0.95
SEED_SPREAD = 0.02
"""Prior deviation of an accuracy (or mean probability) between retrainings of different seeds."""


@dataclass(frozen=True)
class Scaled:
    """A measurement on the scale K.

    Attributes:
        k: 0 as never trained on, 1 untouched.
        low: Lower end of the 95 % interval.
        high: Upper end.
        valid: Whether original and controls are clearly apart.
        spread: Standard deviation of a retrained model, in units of the measurement.
        reason: Why it is invalid, or empty.
    """

    k: float
    low: float
    high: float
    valid: bool
    spread: float
    reason: str


def deviation(controls: Sequence[float], prior: float) -> tuple[float, float]:
    """Standard deviation of a measurement between retrainings, from controls and a prior.

    Returns:
        (deviation, degrees of freedom); the prior counts as `PRIOR_WEIGHT` further controls.
    """
    n = len(controls)
    measured = float(np.var(controls, ddof=1)) if n > 1 else 0.0
    freedom = PRIOR_WEIGHT + n - 1
    return math.sqrt((PRIOR_WEIGHT * prior**2 + (n - 1) * measured) / freedom), freedom


def lowest_expected(controls: Sequence[float], prior: float) -> float:
    """Value that a further retraining stays above with 97.5 % confidence."""
    spread, freedom = deviation(controls, prior)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * spread * math.sqrt(1 + 1 / len(controls))
    return float(np.mean(controls)) - half


def scale(
    value: float,
    original: float,
    controls: Sequence[float],
    sampling: float = 0.0,
    floor: float = 0.0,
    prior: float | None = None,
) -> Scaled:
    """A measurement on the scale K.

    Args:
        value: Measured on the unlearned model.
        original: On the original model.
        controls: On each retrained control, at least one.
        sampling: Standard error of the range (original - control) from the finite number of records.
        floor: Smallest spread that the measurement can resolve (its grid), such as 1/n for an accuracy.
        prior: Deviation of the measurement between retrainings, as known before; None takes
            `PRIOR_SPREAD` of the range.
    """
    n = len(controls)
    center = float(np.mean(controls))
    span = original - center
    if not math.isfinite(span) or not math.isfinite(value):
        return Scaled(0.0, -math.inf, math.inf, False, math.inf, "a value is infinite")
    expected, freedom = deviation(controls, PRIOR_SPREAD * abs(span) if prior is None else prior)
    spread = math.hypot(expected, floor)
    measured = float(np.std(controls, ddof=1)) if n > 1 else 0.0
    between = measured if prior is None else expected
    noise = math.hypot(between, sampling, floor)
    k = (value - center) / span if span else 0.0
    if span == 0 or abs(span) < VALID_RANGE * noise:
        reason = f"original and control differ by {span:.3g}, less than {VALID_RANGE:g} times the noise of {noise:.2g}"
        return Scaled(k, -math.inf, math.inf, False, spread, reason)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * spread * math.sqrt(1 + 1 / n) / abs(span)
    return Scaled(k, k - half, k + half, True, spread, "")


def judged(
    finding: Finding, sampling: float = 0.0, floor: float = 0.0, prior: float | None = None
) -> Finding:
    """The finding with K, its interval, validity and judgement filled in from its own values.

    Without original or controls the finding is returned as it is: only absolute values are known.
    The arguments are those of `scale`.
    """
    if finding.value is None or finding.original is None or not finding.controls:
        return finding
    scaled = scale(finding.value, finding.original, finding.controls, sampling, floor, prior)
    if not scaled.valid:
        note = "; ".join(part for part in (finding.note, scaled.reason) if part)
        return replace(finding, valid=False, judgement=Judgement.INVALID, note=note)
    if scaled.low > 0:
        judgement = Judgement.SEPARATED
    elif scaled.high < 0:
        judgement = Judgement.BEYOND
    else:
        judgement = Judgement.AS_RETRAINED
    return replace(finding, k=scaled.k, k_low=scaled.low, k_high=scaled.high, valid=True, judgement=judgement)
