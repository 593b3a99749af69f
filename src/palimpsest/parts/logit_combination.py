"""Next-token logits of two models combined into those of one: logit difference, offsets, and what stays eligible.

The combined logits score text and generate alike. All work on raw logits [..., vocabulary].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.unlearner import check_range

AnyLogits = Float[Tensor, "*rows vocabulary"]


def whp_logits(base: AnyLogits, reinforced: AnyLogits, alpha: float = 1.0) -> AnyLogits:
    """Lower what a model that knows the text too well raises: base - alpha * relu(reinforced - base).

    Eldan and Russinovich 2023, "Who's Harry Potter?", arXiv 2310.02238, equation 1.

    Args:
        base: Of the model that must forget.
        reinforced: Of the same model after further training on the forget text.
        alpha: At least 0; 0 gives the base.
    """
    check_range("alpha", alpha, 0, float("inf"))
    _check_vocabulary(base, reinforced)
    return base - alpha * torch.relu(reinforced - base)


def logit_difference(
    target: AnyLogits,
    assistant: AnyLogits,
    alpha: float = 1.0,
    relative_top: float | None = None,
    excluded: Literal["keep", "exclude"] = "keep",
    as_released: bool = False,
) -> AnyLogits:
    """Subtract an assistant that remembers what is to be forgotten: target - alpha * assistant (ULD).

    Ji et al. 2024, arXiv 2406.08607.

    Args:
        target: Of the model that must forget; it stays as it is.
        assistant: Of the small model, which is near uniform on everything else.
        alpha: At least 0; 0 gives the target.
        relative_top: Tokens that the target finds too unlikely (`eligible`) are not raised by the
            difference; None combines all.
        excluded: What becomes of those tokens: "keep" their target logit (to score text), or "exclude"
            them with -inf (to generate).
        as_released: See `eligible`.
    """
    check_range("alpha", alpha, 0, float("inf"))
    if excluded not in ("keep", "exclude"):
        raise InvalidHyperparameter(f"excluded must be 'keep' or 'exclude', not {excluded!r}.")
    _check_vocabulary(target, assistant)
    combined = target - alpha * assistant
    if relative_top is None:
        return combined
    left = target if excluded == "keep" else torch.full_like(target, -math.inf)
    return torch.where(eligible(target, relative_top, as_released), combined, left)


def offset_logits(target: AnyLogits, tuned: AnyLogits, untuned: AnyLogits, weight: float = 1.0) -> AnyLogits:
    """What unlearning did to a small model, carried to a large one: target + weight * (tuned - untuned).

    Huang et al. 2024, "Offset Unlearning", arXiv 2404.11045.
    """
    _check_vocabulary(target, tuned)
    _check_vocabulary(target, untuned)
    return target + weight * (tuned - untuned)


def eligible(
    logits: AnyLogits, relative_top: float, as_released: bool = False
) -> Bool[Tensor, "*rows vocabulary"]:
    """Tokens that are likely enough: log p at least `relative_top_threshold`."""
    return logits.log_softmax(-1) >= relative_top_threshold(logits, relative_top, as_released)


def relative_top_threshold(
    logits: AnyLogits, relative_top: float, as_released: bool = False
) -> Float[Tensor, "*rows 1"]:
    """min(largest log p + log rho, k-th largest log p), k = max(1, whole part of rho * vocabulary).

    So at least k tokens stay, however unlikely.

    Args:
        logits: Of the model that decides.
        relative_top: rho in (0, 1]: the share of the most likely token's probability, and of the vocabulary.
        as_released: Take the least likely token's log p where rho * vocabulary is below 1, as in the
            released code: the filter is then off.

    Raises:
        InvalidHyperparameter: If rho lies outside (0, 1].
    """
    check_range("relative_top", relative_top, 0, 1, open_low=True)
    log_p = logits.log_softmax(-1)
    k = int(relative_top * logits.shape[-1]) or (logits.shape[-1] if as_released else 1)
    kth = log_p.topk(k, dim=-1).values[..., -1:]
    return torch.minimum(log_p.amax(-1, keepdim=True) + math.log(relative_top), kth)


def _check_vocabulary(one: Tensor, two: Tensor) -> None:
    if one.shape != two.shape:
        raise ModelMismatch(
            f"Logits {tuple(one.shape)} and {tuple(two.shape)} cannot be combined: both models must read the "
            "same tokens and share a vocabulary."
        )
