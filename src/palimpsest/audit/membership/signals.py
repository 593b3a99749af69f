"""Signals of membership in a classifier's outputs.

Everything is computed from logits in double precision, so that a saturated or a masked class (a logit of
minus infinity) gives finite values. `member_signals` has one sign: high means member.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidAudit, InvalidLabels

TINY = 1e-45
"""Added inside logarithms of `scaled_confidence`, as in the published LiRA code: |phi| stays below 104."""
FLOOR = 1e-30
"""Smallest probability inside the logarithms of modified entropy, as published with it."""
ROUNDING = 1e-3
"""How far probabilities may be from summing to one."""


def entropy(probabilities: Float[Tensor, "records classes"]) -> Float[Tensor, " records"]:
    """Entropy -sum_j p_j log p_j of every prediction, in nats; 0 log 0 counts as 0.

    Raises:
        InvalidAudit: If rows are not probabilities.

    Example:
        >>> [round(value, 4) for value in entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()]
        [0.6931, 0.0]
    """
    _check_probabilities(probabilities)
    return torch.special.entr(probabilities.clamp(min=0)).sum(1)


def modified_entropy(
    probabilities: Float[Tensor, "records classes"], labels: Int[Tensor, " records"]
) -> Float[Tensor, " records"]:
    """Entropy that knows the label: -(1 - p_y) log p_y - sum_{j != y} p_j log(1 - p_j) (Song & Mittal 2021).

    0 for a right answer without doubt, large for a wrong one without doubt.

    Raises:
        InvalidAudit: If rows are not probabilities.
        InvalidLabels: If a label is no class.
    """
    _check_probabilities(probabilities)
    own = _one_hot(labels, probabilities.shape[1])
    weight = torch.where(own, 1 - probabilities, probabilities)
    inside = torch.where(own, probabilities, 1 - probabilities)
    return -(weight * inside.clamp(min=FLOOR).log()).sum(1)


def modified_entropy_as_released(
    probabilities: Float[Tensor, "records classes"], labels: Int[Tensor, " records"]
) -> Float[Tensor, " records"]:
    """Modified entropy with both faults of the support-vector code published with SalUn.

    It takes log p_j where log(1 - p_j) belongs, and it exchanges p for 1 - p in the column of every label
    that occurs anywhere in the batch, not only in the record's own. Only for reproducing such figures.
    """
    _check_probabilities(probabilities)
    occurs = _one_hot(labels, probabilities.shape[1]).any(0)
    weight = torch.where(occurs, 1 - probabilities, probabilities)
    inside = torch.where(probabilities > 0, probabilities, torch.full_like(probabilities, FLOOR))
    return -(weight * inside.log()).sum(1)


def true_probability(
    logits: Float[Tensor, "records classes"], labels: Int[Tensor, " records"]
) -> Float[Tensor, " records"]:
    """Probability p_y of the label."""
    return class_probabilities(logits).gather(1, _column(labels, logits.shape[1]))[:, 0]


def scaled_confidence(
    logits: Float[Tensor, "records classes"], labels: Int[Tensor, " records"]
) -> Float[Tensor, " records"]:
    """Logit-scaled confidence phi = log p_y - log(1 - p_y), near to normally distributed (LiRA, eq. 5).

    1 - p_y is the sum of the other classes, never a difference, which would cancel.

    Raises:
        InvalidAudit: If logits hold NaN or plus infinity.
        InvalidLabels: If a label is no class.
    """
    probability = class_probabilities(logits)
    column = _column(labels, logits.shape[1])
    wrong = probability.scatter(1, column, 0.0).sum(1)
    return (probability.gather(1, column)[:, 0] + TINY).log() - (wrong + TINY).log()


def margin(
    logits: Float[Tensor, "records classes"], labels: Int[Tensor, " records"]
) -> Float[Tensor, " records"]:
    """How far the label leads its strongest rival: log p_y - max_{j != y} log p_j."""
    probability = class_probabilities(logits)
    column = _column(labels, logits.shape[1])
    rival = probability.scatter(1, column, 0.0).max(1).values
    return (probability.gather(1, column)[:, 0] + TINY).log() - (rival + TINY).log()


def member_signals(
    logits: Float[Tensor, "records classes"], labels: Int[Tensor, " records"]
) -> dict[str, Float[Tensor, " records"]]:
    """The signals of the population attacks, all with high = member.

    Returns:
        `loss` (minus the cross-entropy), `confidence` (phi), `entropy` and `modified_entropy` (negated),
        `margin` and `probability` (p_y). The loss is a rising function of phi, so both rank alike.
    """
    probability = class_probabilities(logits)
    phi = scaled_confidence(logits, labels)
    return {
        "loss": -F.softplus(-phi),
        "confidence": phi,
        "entropy": -entropy(probability),
        "modified_entropy": -modified_entropy(probability, labels),
        "margin": margin(logits, labels),
        "probability": true_probability(logits, labels),
    }


def class_probabilities(
    logits: Float[Tensor, "records classes"], temperature: float = 1.0
) -> Float[Tensor, "records classes"]:
    """Softmax in double precision; minus infinity is a class that is ruled out.

    Raises:
        InvalidAudit: If there are no records, or logits hold NaN, plus infinity or only minus infinity.
    """
    if logits.dim() != 2 or len(logits) == 0 or logits.shape[1] < 2:
        raise InvalidAudit(
            f"Membership signals need logits [records, classes >= 2], not {tuple(logits.shape)}."
        )
    probability = (logits.double() / temperature).softmax(1)
    if not torch.isfinite(probability).all():
        raise InvalidAudit("Logits hold NaN, plus infinity, or rule out every class of a record.")
    return probability


def _check_probabilities(probabilities: Float[Tensor, "records classes"]) -> None:
    if probabilities.dim() != 2 or len(probabilities) == 0:
        raise InvalidAudit(f"Probabilities must be [records, classes], not {tuple(probabilities.shape)}.")
    sums = probabilities.sum(1)
    low = float(probabilities.min())
    off = float((sums - 1).abs().max())
    if not torch.isfinite(sums).all() or low < -ROUNDING or off > ROUNDING:
        raise InvalidAudit(
            f"Rows must be probabilities: the smallest entry is {low:.4g}, the sums are off by up to {off:.4g}."
        )


def _one_hot(labels: Int[Tensor, " records"], classes: int) -> Tensor:
    return F.one_hot(_column(labels, classes)[:, 0], classes).bool()


def _column(labels: Int[Tensor, " records"], classes: int) -> Int[Tensor, "records one"]:
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= classes:
        raise InvalidLabels(f"Labels run from {low} to {high}; there are classes 0 to {classes - 1}.")
    return labels.long()[:, None]
