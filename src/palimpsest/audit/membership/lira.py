"""LiRA: the likelihood-ratio attack with shadow models (Carlini et al. 2022, arXiv 2112.03570).

For every record, the logit-scaled confidence phi of models trained with it and of models trained without
it are each taken as normally distributed; the score compares the likelihoods of the attacked model's phi.
All functions return scores with high = member.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from palimpsest.core.errors import InvalidAudit, shorten

Variance = Literal["per-record", "global", "pooled"]
Confidences = Float[np.ndarray, "models records augmentations"]
Memberships = Bool[np.ndarray, "models records"]
Scores = Float[np.ndarray, " records"]

SMALLEST = 1e-30
"""Added to every deviation, as published."""


@dataclass(frozen=True)
class Gaussians:
    """A normal distribution of phi per record and augmentation.

    Attributes:
        mean: Median over models, as published.
        deviation: Of the chosen kind.
    """

    mean: Float[np.ndarray, "records augmentations"]
    deviation: Float[np.ndarray, "records augmentations"]

    def log_density(self, phi: Float[np.ndarray, "records augmentations"]) -> np.ndarray:
        """Log density at phi."""
        return stats.norm.logpdf(phi, self.mean, self.deviation)

    def surprise(self, phi: Float[np.ndarray, "records augmentations"]) -> np.ndarray:
        """-log P(phi' > phi): how rare so high a confidence is."""
        return -stats.norm.logsf(phi, self.mean, self.deviation)


def fit_gaussians(shadows: Confidences, chosen: Memberships, variance: Variance = "per-record") -> Gaussians:
    """Gaussians of phi over the chosen models of every record.

    Args:
        shadows: phi of the shadow models.
        chosen: Which models count for which record; of each record the first as many models are taken
            as the record with the fewest has, as published.
        variance: "per-record", each record its own deviation; "global", one deviation of all values
            together, means and all (published as "fixed variance"); "pooled", one deviation of the values
            around the mean of their record, for few models.

    Raises:
        InvalidAudit: If some record has fewer than 2 chosen models.
    """
    counts = chosen.sum(0)
    least = int(counts.min())
    if least < 2:
        few = np.flatnonzero(counts < 2)
        raise InvalidAudit(
            f"Each record needs 2 shadow models that were trained with it and 2 without; too few for records "
            f"{shorten(few.tolist())}. Train more shadow models."
        )
    order = np.argsort(~chosen, axis=0, kind="stable")[:least]
    values = np.take_along_axis(shadows, order[:, :, None], axis=0)
    if variance == "per-record":
        deviation = values.std(0)
    elif variance == "global":
        deviation = np.full(values.shape[1:], values.std())
    else:
        freedom = values.shape[1] * values.shape[2] * (least - 1)
        deviation = np.full(values.shape[1:], np.sqrt(((values - values.mean(0)) ** 2).sum() / freedom))
    return Gaussians(np.median(values, 0), deviation + SMALLEST)


def log_ratio(
    target: Float[np.ndarray, "records augmentations"], trained: Gaussians, untrained: Gaussians
) -> Scores:
    """Log density under `trained` - log density under `untrained`, mean over augmentations."""
    return (trained.log_density(target) - untrained.log_density(target)).mean(1)


def lira_online(
    target: Float[np.ndarray, "records augmentations"],
    shadows: Confidences,
    inside: Memberships,
    variance: Variance = "per-record",
    *,
    as_released: bool = False,
) -> Scores:
    """Log N(phi; with the record) - log N(phi; without it), mean over augmentations (algorithm 1).

    Args:
        target: phi of the attacked model.
        shadows: phi of the shadow models.
        inside: Which shadow model was trained on which record.
        variance: See `fit_gaussians`; fewer than about 64 models call for "pooled" or "global".
        as_released: With "global", take the deviation of models without the record from those with it,
            as the published code does by mistake.

    Raises:
        InvalidAudit: If shapes differ, values are not finite, or a record has fewer than 2 models a side.
    """
    _check(target, shadows, inside)
    trained, untrained = fit_gaussians(shadows, inside, variance), fit_gaussians(shadows, ~inside, variance)
    if as_released and variance == "global":
        untrained = Gaussians(untrained.mean, trained.deviation)
    return log_ratio(target, trained, untrained)


def lira_offline(
    target: Float[np.ndarray, "records augmentations"],
    shadows: Confidences,
    inside: Memberships,
    variance: Variance = "per-record",
    *,
    as_released: bool = False,
) -> Scores:
    """How much more confident the model is than models without the record (section VI-B of the paper).

    The paper's one-sided P(phi' < phi) is returned as -log(1 - P), which ranks alike and does not
    saturate. Only models trained without the record are used.

    Args:
        target: phi of the attacked model.
        shadows: phi of the shadow models.
        inside: Which shadow model was trained on which record.
        variance: See `fit_gaussians`.
        as_released: Minus the log density instead, as in the published code: two-sided, so that a record
            the model is unusually unsure of counts as a member too.
    """
    _check(target, shadows, inside)
    untrained = fit_gaussians(shadows, ~inside, variance)
    score = -untrained.log_density(target) if as_released else untrained.surprise(target)
    return score.mean(1)


def global_threshold(target: Float[np.ndarray, "records augmentations"]) -> Scores:
    """Confidence itself, mean over augmentations: the population attack that LiRA is compared with."""
    return target.mean(1)


def _check(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> None:
    fits = shadows.ndim == 3 and shadows.shape[:2] == inside.shape and target.shape == shadows.shape[1:]
    if not fits:
        raise InvalidAudit(
            "LiRA needs target [records, augmentations], shadows [models, records, augmentations] and "
            f"memberships [models, records]; got {target.shape}, {shadows.shape} and {inside.shape}."
        )
    if inside.dtype != bool:
        raise InvalidAudit(f"Memberships must be true or false, they are {inside.dtype}.")
    if not (np.isfinite(target).all() and np.isfinite(shadows).all()):
        raise InvalidAudit("LiRA scores hold NaN or infinity; compute phi with `signals.scaled_confidence`.")
