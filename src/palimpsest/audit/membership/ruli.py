"""RULI's privacy game (Naderloui et al. 2025, arXiv 2506.13009): forgotten against never trained, by kernels.

The question is U-LiRA's; the densities of a record's confidence under models that forgot it and models that
never had it are not normal ones but kernel estimates of bandwidth 1, which suits records whose confidence
after unlearning falls into two groups. Published with thirds of the records trained, forgotten and never
trained; here the halves of U-LiRA's runs serve both games, so that no further models are needed.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import logsumexp

from palimpsest.core.errors import InvalidAudit, shorten

BANDWIDTH = 1.0
Phi = Float[np.ndarray, "runs records"]
Memberships = Bool[np.ndarray, "runs records"]
Scores = Float[np.ndarray, " records"]


def kernel_ratio(target: Scores, shadows: Phi, inside: Memberships, bandwidth: float = BANDWIDTH) -> Scores:
    """Log kernel density of phi under runs that forgot a record, minus that under runs that never had it.

    Args:
        target: phi under the attacked model.
        shadows: phi under the unlearned models of other runs.
        inside: Which runs forgot which record.
        bandwidth: Of the Gaussian kernels, in units of phi.

    Raises:
        InvalidAudit: If a record has fewer than 2 models a side, values are not finite, or the bandwidth
            is not above 0.
    """
    if not bandwidth > 0:
        raise InvalidAudit(f"A kernel needs a bandwidth above 0, not {bandwidth}.")
    if shadows.shape != inside.shape or target.shape != shadows.shape[1:]:
        raise InvalidAudit(f"Shapes do not fit: {target.shape}, {shadows.shape} and {inside.shape}.")
    if not (np.isfinite(target).all() and np.isfinite(shadows).all()):
        raise InvalidAudit("Scores hold NaN or infinity.")
    few = np.flatnonzero(np.minimum(inside.sum(0), (~inside).sum(0)) < 2)
    if len(few):
        raise InvalidAudit(
            f"Each record needs 2 shadow models a side; too few for records {shorten(few.tolist())}."
        )
    return kernel_log_density(target, shadows, inside, bandwidth) - kernel_log_density(
        target, shadows, ~inside, bandwidth
    )


def kernel_log_density(target: Scores, values: Phi, chosen: Memberships, bandwidth: float) -> Scores:
    """Log of the mean of Gaussian kernels around the chosen values of every record, at `target`."""
    distance = (target - values) / bandwidth
    logs = np.where(chosen, -0.5 * distance**2 - 0.5 * np.log(2 * np.pi) - np.log(bandwidth), -np.inf)
    return logsumexp(logs, axis=0) - np.log(chosen.sum(0))
