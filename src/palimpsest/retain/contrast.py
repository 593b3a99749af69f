"""Supervised contrast: anchors are drawn to the columns of their class, against all columns that take part."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter, InvalidLabels


def contrast(
    similarity: Float[Tensor, "anchors columns"],
    positive: Bool[Tensor, "anchors columns"],
    taking_part: Bool[Tensor, "anchors columns"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over anchors of the mean negative log-probability of their positive columns.

    log p = s - logsumexp of s over the columns that take part. Anchors without a positive are left out of
    the mean.

    Args:
        similarity: Already divided by the temperature.
        positive: Columns to which each anchor is drawn, all of them taking part.
        taking_part: Columns in the denominator of each anchor; all by default.

    Raises:
        InvalidLabels: If no anchor has a positive.
    """
    if taking_part is not None:
        similarity = similarity.masked_fill(~taking_part, float("-inf"))
        positive = positive & taking_part
    count = positive.sum(1)
    if not (count > 0).any():
        raise InvalidLabels("No record has another of its class to be drawn to: give two views of each.")
    log_p = similarity - torch.logsumexp(similarity, 1, keepdim=True)
    mean = log_p.masked_fill(~positive, 0.0).sum(1) / count.clamp_min(1)
    return -mean[count > 0].mean()


def supervised_contrast(
    vectors: Float[Tensor, "rows dim"],
    labels: Int[Tensor, " rows"],
    temperature: float,
    base_temperature: float | None = None,
) -> Float[Tensor, ""]:
    """SupCon (Khosla et al., 2020, eq. 2): every vector against all others, those of its label positive.

    Args:
        vectors: Of length 1, all views.
        labels: Of all views.
        temperature: T.
        base_temperature: The loss is multiplied by T over this; None leaves it as it is.
    """
    others = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    same = labels[:, None] == labels[None, :]
    loss = contrast(vectors @ vectors.T / temperature, same & others, others)
    return loss if base_temperature is None else loss * (temperature / base_temperature)


def check_temperature(**temperatures: float) -> None:
    """Check that temperatures are above 0 and finite.

    Raises:
        InvalidHyperparameter: Naming the first that is not.
    """
    for name, value in temperatures.items():
        if not 0 < value < float("inf"):
            raise InvalidHyperparameter(f"{name} must be above 0 and finite, not {value}.")
