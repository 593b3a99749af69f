"""The step that an optimiser took, moved as little as possible until it does no harm to protected gradients.

Whatever made the step, momentum, adaptive denominators or weight decay, its first-order effect on a retain loss
is the inner product with that loss's gradient. Zhou et al. 2025, arXiv 2511.17100, in the authors' later
correction for AdamW ("stage B").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFinite
from palimpsest.core.unlearner import check_range

Vector = Float[Tensor, " dim"]
Constraints = Float[Tensor, "constraints dim"]

MOST_CONSTRAINTS = 9
"""All 2^9 active sets are tried at most: the current retain gradient and eight older ones."""
_CHUNK = 1 << 16
_EXACT = 1e-11


@dataclass(frozen=True)
class Correction:
    """A corrected step.

    Attributes:
        step: What to add to the parameters before the step. The proposal itself if that did no harm.
        multipliers: One per constraint, for gradients scaled to length 1 in the inverse metric; 0 where the
            constraint does not hold the step back.
        ratio: |step - proposed| / |proposed|; 0 if it did no harm.
    """

    step: Vector
    multipliers: tuple[float, ...]
    ratio: float


def corrected_step(
    proposed: Vector, gradients: Constraints, metric: Vector | None = None, equality: bool = False
) -> Correction:
    """The step nearest to a proposed one that no protected loss rises along, to first order.

    argmin 1/2 (d - proposed)^T M (d - proposed) subject to g^T d <= 0 for every gradient g. So
    d = proposed - M^-1 G lambda; lambda is found in double precision over active sets: by exchange, and
    if that does not end, by trying all of them.

    Args:
        proposed: Parameters after the step - before it.
        gradients: Rows g of retain losses, at the parameters before the step; zero ones are no constraint.
        metric: Diagonal of M, above 0: Adam's denominator after the step; None is the identity.
        equality: Ask for g^T d = 0, so that the retained losses do not fall either.

    Returns:
        The correction, in the proposal's precision.

    Raises:
        InvalidHyperparameter: If there are more than 9 gradients, or the metric is not above 0.
        ModelMismatch: If shapes differ.
        NonFinite: If the proposal or a gradient holds NaN or Inf.
    """
    _check(proposed, gradients, metric)
    count = len(gradients)
    gram, effect, size = np.zeros((count, count)), np.zeros(count), 0.0
    for g, h, d in _chunks(gradients, metric, proposed):
        gram += ((g / h) @ g.T).cpu().numpy()
        effect += (g @ d).cpu().numpy()
        size += float((h * d * d).sum())
    if not (np.isfinite(gram).all() and np.isfinite(effect).all() and np.isfinite(size)):
        raise NonFinite("The step, or a protected gradient, holds NaN or Inf: leave this step out.")
    lengths = np.sqrt(np.diag(gram))
    used = np.flatnonzero(lengths > 0)
    scaled = gram[np.ix_(used, used)] / np.outer(lengths[used], lengths[used])
    multipliers = np.zeros(count)
    multipliers[used] = _multipliers(scaled, effect[used] / lengths[used], _EXACT * size**0.5, equality)
    if not multipliers.any():
        return Correction(proposed, tuple(multipliers), 0.0)
    along = multipliers / np.where(lengths > 0, lengths, 1.0)
    weights = torch.from_numpy(along).to(proposed.device, torch.promote_types(proposed.dtype, torch.float32))
    moved = weights @ gradients.to(weights.dtype)
    step = (proposed - (moved if metric is None else moved / metric)).to(proposed.dtype)
    return Correction(step, tuple(multipliers), float((step - proposed).norm() / proposed.norm()))


def _multipliers(gram: np.ndarray, effect: np.ndarray, exact: float, equality: bool) -> np.ndarray:
    """Multipliers of constraints that are scaled to unit length."""
    if equality:
        return _held_back(gram, effect, range(len(effect)))[0]
    found = _by_exchange(gram, effect, exact)
    return _by_enumeration(gram, effect, exact) if found is None else found


def _by_exchange(gram: np.ndarray, effect: np.ndarray, exact: float) -> np.ndarray | None:
    """Multipliers, by taking in or letting go of one constraint at a time; None if that goes round in circles."""
    active = set[int]()
    for _ in range(3 * len(effect) + 1):
        multipliers, left = _held_back(gram, effect, active)
        if multipliers.min(initial=0.0) < -exact:
            active.remove(int(multipliers.argmin()))
        elif left.max(initial=0.0) > exact:
            active.add(int(left.argmax()))
        else:
            return multipliers.clip(min=0.0)
    return None


def _by_enumeration(gram: np.ndarray, effect: np.ndarray, exact: float) -> np.ndarray:
    """Multipliers of the first active set that is exact, smallest first; or of the one that violates least."""
    best, least = np.zeros(len(effect)), np.inf
    for number in range(len(effect) + 1):
        for tried in combinations(range(len(effect)), number):
            multipliers, left = _held_back(gram, effect, tried)
            violation = max(left.max(initial=0.0), -multipliers.min(initial=0.0))
            if violation < least:
                best, least = multipliers.clip(min=0.0), violation
            if least <= exact:
                return best
    return best


def _held_back(
    gram: np.ndarray, effect: np.ndarray, active: Collection[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers that make the step orthogonal to the active gradients, and the effect left along each."""
    index, multipliers = sorted(active), np.zeros(len(effect))
    block = gram[np.ix_(index, index)]
    multipliers[index] = np.linalg.pinv(block, rcond=1e-12, hermitian=True) @ effect[index]
    return multipliers, effect - gram @ multipliers


def largest_safe_scale(increase: Callable[[float], float], budget: float = 1e-4, halvings: int = 6) -> float:
    """The first of the scales 1, 1/2, 1/4, ... of a step at which a retain loss rises by at most a budget.

    Args:
        increase: Rise of the loss when the step is taken at a scale.
        budget: In nats, at least 0.
        halvings: How often to halve; 0 is the answer after that.

    Raises:
        InvalidHyperparameter: If the budget or the number of halvings is negative.
    """
    check_range("budget", budget, 0, float("inf"))
    check_range("halvings", halvings, 0, float("inf"))
    return next((0.5**k for k in range(halvings + 1) if increase(0.5**k) <= budget), 0.0)


def _chunks(
    gradients: Constraints, metric: Vector | None, proposed: Vector
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Gradients, metric and step piece by piece in double precision, so that memory stays flat."""
    for start in range(0, len(proposed), _CHUNK):
        part = slice(start, start + _CHUNK)
        d = proposed[part].double()
        yield gradients[:, part].double(), torch.ones_like(d) if metric is None else metric[part].double(), d


def _check(proposed: Vector, gradients: Constraints, metric: Vector | None) -> None:
    if gradients.dim() != 2 or gradients.shape[1:] != proposed.shape or not len(proposed):
        raise ModelMismatch(
            f"A step {tuple(proposed.shape)} needs gradients [constraints, {len(proposed)}], not "
            f"{tuple(gradients.shape)}."
        )
    if len(gradients) > MOST_CONSTRAINTS:
        raise InvalidHyperparameter(
            f"At most {MOST_CONSTRAINTS} gradients can be protected at once, not {len(gradients)}."
        )
    if metric is None:
        return
    if metric.shape != proposed.shape:
        raise ModelMismatch(f"The metric {tuple(metric.shape)} does not fit a step {tuple(proposed.shape)}.")
    if not bool((metric > 0).all()):
        raise InvalidHyperparameter("Every entry of the metric must be above 0.")
