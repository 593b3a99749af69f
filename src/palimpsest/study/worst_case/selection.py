"""The upper level as pure maths: projected gradient steps on the weights that say what is to be forgotten.

w lives in S = {w in [0, 1]^N : sum w = m}. With losses l of the unlearned model, the derivative of
sum_i w_i l_i + gamma ||w||^2 is l + 2 gamma w, for a lower level whose result does not depend on w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from palimpsest.core.errors import InvalidHyperparameter, NonFiniteLoss

Weights = Float[np.ndarray, " items"]
Goal = Literal["hardest", "easiest"]

PUBLISHED_TOLERANCE = 1e-5
"""Width of the bracket at which the published bisection stops; the sum is then within 1e-5 N of m."""
HALVINGS = 100
"""Most halvings of the bracket."""


def project(a: Weights, m: int, tolerance: float = PUBLISHED_TOLERANCE) -> Weights:
    """The nearest point of S: clip(a - mu, 0, 1), with mu found by bisection on [min(a) - 1, max(a)].

    Args:
        a: To project, [items].
        m: What the result sums to.
        tolerance: Width of the bracket at which to stop, after at most 100 halvings.

    Raises:
        InvalidHyperparameter: If m does not lie strictly between 0 and the number of items.
        NonFiniteLoss: If `a` holds NaN or Inf.

    Example:
        >>> project(np.array([0.9, 0.1, -0.4, 1.7, 0.55, 0.3]), 2, 1e-9).round(4).tolist()
        [0.65, 0.0, 0.0, 1.0, 0.3, 0.05]
    """
    a = np.asarray(a, dtype=np.float64)
    if not 0 < m < len(a):
        raise InvalidHyperparameter(f"m must lie strictly between 0 and {len(a)}, not {m}.")
    if not np.isfinite(a).all():
        raise NonFiniteLoss(f"{int((~np.isfinite(a)).sum())} of {len(a)} values to project are NaN or Inf.")
    low, high = float(a.min()) - 1, float(a.max())
    mu = low
    for _ in range(HALVINGS):
        if high - low <= tolerance:
            break
        mu = (low + high) / 2
        surplus = np.clip(a - mu, 0, 1).sum() - m
        if surplus == 0:
            break
        low, high = (mu, high) if surplus > 0 else (low, mu)
    return np.clip(a - mu, 0, 1)


def upper_step(
    w: Weights,
    losses: Weights,
    m: int,
    lr: float,
    gamma: float,
    goal: Goal = "hardest",
    tolerance: float = PUBLISHED_TOLERANCE,
) -> Weights:
    """Step w <- project(w -+ lr (l + 2 gamma w)): down to what unlearning leaves fitted, or up.

    Records with a LOW loss under the unlearned model are the hardest to forget: unlearning failed on them.

    Args:
        w: Weights, [items].
        losses: Of the unlearned model, [items].
        m: Size of the forget set.
        lr: Upper learning rate alpha.
        gamma: Weight of ||w||^2.
        goal: "hardest" descends, "easiest" ascends.
        tolerance: Of the projection.

    Raises:
        NonFiniteLoss: If a loss is NaN or Inf.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise NonFiniteLoss(
            f"The unlearned model's loss is {losses[bad[0]]} on item {bad[0]} ({len(bad)} of {len(losses)} in all)."
        )
    direction = -1 if goal == "hardest" else 1
    return project(w + direction * lr * (losses + 2 * gamma * w), m, tolerance)


def objective(w: Weights, losses: Weights) -> float:
    """sum_i w_i l_i, without the penalty: small if unlearning fails on what is selected."""
    return float(w @ losses)


def top(w: Weights, m: int) -> Int[np.ndarray, " m"]:
    """Positions of the m largest weights, in ascending order; of equal ones the first."""
    return np.sort(np.argsort(-w, kind="stable")[:m])


def indicator(chosen: Sequence[int] | Int[np.ndarray, " m"], count: int) -> Weights:
    """1 at the chosen positions, 0 elsewhere, [count]."""
    w = np.zeros(count)
    w[np.asarray(chosen, dtype=np.int64)] = 1
    return w


def non_binary_share(w: Weights, slack: float = 1e-6) -> float:
    """Share of weights that are neither 0 nor 1: of undecided ones, or of a search that has not moved far."""
    return float(((w > slack) & (w < 1 - slack)).mean())


def class_losses(
    losses: Weights,
    classes: Int[np.ndarray, " items"],
    count: int,
    batch_size: int | None = None,
) -> Float[np.ndarray, " classes"]:
    """One loss per class.

    Args:
        losses: Of single records, [items].
        classes: Number of each record's class, [items].
        count: Number of classes.
        batch_size: None gives the mean loss of a class. A size gives the sum over successive batches of the
            batch's mean loss of the class over its count there, as in the published code: it divides twice,
            and so weighs rare classes up.
    """
    size = batch_size or len(losses)
    total = np.zeros(count)
    for start in range(0, len(losses), size):
        part, own = losses[start : start + size], classes[start : start + size]
        number = np.bincount(own, minlength=count)
        summed = np.bincount(own, part, minlength=count)
        divisor = np.maximum(number, 1)
        total += summed / divisor if batch_size is None else summed / divisor**2
    return total
