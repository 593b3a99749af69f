"""How ULD's assistant is taught: on which items, in which order, and by which loss.

Ji et al. 2024, "Reversing the Forget-Retain Objectives", arXiv 2406.08607. The assistant learns the opposite
of what the pair of models shall do: to know the forget data, and to be uniform on everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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


def forget_side(forget: Iterable[Mapping[str, Any]], paraphrases: int = 2) -> list[dict[str, Any]]:
    """What the assistant must remember: the forget records, each with paraphrased pairs.

    Args:
        forget: Items; those that ask something may have `paraphrased_question` and `paraphrased_answer`, texts
            or lists of them. A pair of which only one side is there takes the other from the item.
        paraphrases: At most so many pairs of each, the first ones, none twice.

    Returns:
        Items with "id", "question" and "answer" (or "text"), and "retained" false.
    """
    rows: list[dict[str, Any]] = []
    for item in forget:
        rows.append(_row(item, item["id"], False))
        if item.get("question") is None or not paraphrases:
            continue
        own = (item["question"], item["answer"])
        questions, answers = _texts(item, "paraphrased_question"), _texts(item, "paraphrased_answer")
        count = max(len(questions), len(answers))
        padded = [
            side + [whole] * (count - len(side))
            for side, whole in zip((questions, answers), own, strict=True)
        ]
        pairs = [pair for pair in dict.fromkeys(zip(*padded, strict=True)) if pair != own]
        for number, (question, answer) in enumerate(pairs[:paraphrases]):
            told = {"question": question, "answer": answer}
            rows.append(_row(told, f"{item['id']}/paraphrase-{number + 1}", False))
    return rows


def retain_side(
    forget: Iterable[Mapping[str, Any]], retain: Iterable[Mapping[str, Any]] | None, perturbed: int = 2
) -> list[dict[str, Any]]:
    """What the assistant must know nothing of: retained records, and forgotten questions with wrong answers.

    Args:
        forget: Items; those that ask something may have `perturbed_answer`, a text or a list.
        retain: Retained items; None for none.
        perturbed: At most so many wrong answers of each forget item, the first ones, none twice.

    Returns:
        Items as of `forget_side`, with "retained" true.
    """
    rows = [_row(item, item["id"], True) for item in retain or ()]
    for item in forget:
        if item.get("question") is None:
            continue
        wrong = [text for text in dict.fromkeys(_texts(item, "perturbed_answer")) if text != item["answer"]]
        for number, answer in enumerate(wrong[:perturbed]):
            told = {"question": item["question"], "answer": answer}
            rows.append(_row(told, f"{item['id']}/wrong-{number + 1}", True))
    return rows


def _row(item: Mapping[str, Any], name: str, retained: bool) -> dict[str, Any]:
    told = {key: item[key] for key in ("question", "answer", "text") if item.get(key) is not None}
    return {**told, "id": name, "retained": retained}


def _texts(item: Mapping[str, Any], field: str) -> list[str]:
    found = item.get(field) or []
    return [found] if isinstance(found, str) else list(found)


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
