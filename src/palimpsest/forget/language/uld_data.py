"""How ULD's assistant is taught: the order in which the two kinds of records come, and its loss.

Ji et al. 2024, "Reversing the Forget-Retain Objectives", arXiv 2406.08607. The assistant learns the opposite
of what the pair of models shall do: to know the forget data, and to be uniform on everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from palimpsest.core.errors import ModelMismatch
from palimpsest.core.unlearner import check_range
from palimpsest.parts.tokens import Labels, Logits, check_tokens, scored, token_mean

Item = TypeVar("Item")


@dataclass(frozen=True)
class AssistantLoss:
    """The assistant's loss and its parts.

    Attributes:
        total: remember + weight * uniform.
        remember: Mean token loss of the records to be forgotten; 0 without any.
        uniform: KL(uniform || model) on the others; 0 without any.
    """

    total: Float[Tensor, ""]
    remember: Float[Tensor, ""]
    uniform: Float[Tensor, ""]


def assistant_loss(
    logits: Logits,
    labels: Labels,
    retained: Bool[Tensor, " batch"],
    retain_weight: float = 5.0,
    scored_only: bool = False,
) -> AssistantLoss:
    """Remember the rows to be forgotten, know nothing of the retained ones.

    Args:
        logits: Of the assistant on a batch with both kinds of rows.
        labels: Of their answers.
        retained: True for retained records and for perturbed (wrong) answers, False for forget records
            and their paraphrases.
        retain_weight: Of the uniform part; 5 is published.
        scored_only: Ask for uniformity only where an answer token is predicted. By default at all positions,
            prompts and padding too, as published: the weight then falls with the padding.

    Raises:
        ModelMismatch: If the flags do not fit the batch.
        InvalidHyperparameter: If the weight is negative.
    """
    check_range("retain_weight", retain_weight, 0, float("inf"))
    check_tokens(logits, labels)
    if retained.dtype != torch.bool or retained.shape != labels.shape[:1]:
        raise ModelMismatch(
            f"Every row needs a flag (retained or not): {retained.dtype} of shape {tuple(retained.shape)} for "
            f"{len(labels)} rows."
        )
    remember = token_mean(logits[~retained], labels[~retained])
    rows = logits[retained]
    rows = rows[:, :-1][scored(labels[retained])] if scored_only else rows.flatten(0, 1)
    uniform = uniform_divergence(rows).sum() / max(len(rows), 1)
    return AssistantLoss(remember + retain_weight * uniform, remember, uniform)


def uniform_divergence(logits: Float[Tensor, "*rows vocabulary"]) -> Float[Tensor, "*rows"]:
    """KL(uniform || softmax(logits)) of every row, in nats: -log V - mean log p."""
    return -math.log(logits.shape[-1]) - logits.log_softmax(-1).mean(-1)


def interleave(one: Sequence[Item], two: Sequence[Item], as_released: bool = False) -> list[Item]:
    """The two lists as one, the longer spread evenly between the elements of the shorter.

    So that every mini-batch holds both kinds of records. Nothing is left out.

    Args:
        one: Shuffled already; comes first if both are as long.
        two: Likewise.
        as_released: After every element of the shorter list the same number of the longer, rounded (halves
            to even): then the end of the longer list may be missing.

    Example:
        >>> interleave([0, 1], [2, 3, 4, 5, 6])
        [0, 2, 3, 1, 4, 5, 6]
        >>> interleave([0, 1], [2, 3, 4, 5, 6], as_released=True)
        [0, 2, 3, 1, 4, 5]
    """
    shorter, longer = (one, two) if len(one) <= len(two) else (two, one)
    if not shorter:
        return list(longer)
    share = round(len(longer) / len(shorter))
    cuts = [
        position * share if as_released else position * len(longer) // len(shorter)
        for position in range(len(shorter) + 1)
    ]
    found: list[Item] = []
    for position, item in enumerate(shorter):
        found += [item, *longer[cuts[position] : cuts[position + 1]]]
    return found
