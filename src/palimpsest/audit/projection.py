"""Feature space in two dimensions: the plane in which the records spread most, for every model alike."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.core.errors import InvalidAudit

Plane = Float[Tensor, "rows 2"]


def principal_plane(features: Float[Tensor, "rows dim"]) -> tuple[Plane, float]:
    """Features on their first two principal axes, scaled to a mean squared length of 1.

    Returns:
        (coordinates, share of the variance that the plane holds).

    Raises:
        InvalidAudit: For fewer than 3 rows, NaN or Inf, or features that are the same for all records.
    """
    if len(features) < 3 or not torch.isfinite(features).all():
        raise InvalidAudit("A picture of the features needs at least 3 rows, all finite.")
    centred = features.double() - features.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    if s[0] <= 1e-7 * features.abs().max():
        raise InvalidAudit("The features are the same for all records: there is nothing to draw.")
    points = torch.zeros(len(features), 2, dtype=torch.float64)
    points[:, : min(2, len(s))] = u[:, :2] * s[:2]
    explained = float(s[:2].square().sum() / s.square().sum())
    return points / points.square().sum(1).mean().sqrt(), explained


def turned_towards(points: Plane, target: Plane) -> Plane:
    """Points rotated or mirrored so that they lie as close to the target as can be (orthogonal Procrustes).

    The axes of two models are in no common order; distances within a picture do not change.
    """
    u, _, v = torch.linalg.svd(points.T @ target)
    return points @ (u @ v)


def sample_by_group(groups: NDArray[np.object_], most: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Positions of at most so many rows of every group, in order."""
    order = random.permutation(len(groups))
    return np.sort(np.concatenate([order[groups[order] == name][:most] for name in np.unique(groups)]))
