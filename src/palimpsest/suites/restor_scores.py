"""Scores of RESTOR: is the true answer back, or is only the planted one gone?

Rezaei et al. 2025, arXiv 2411.00204. A clean model is corrupted by documents with false facts and must
unlearn them. Forgetting (the planted answers are no longer given) and restoration (the true ones are given
again) are two numbers: a method that only forgets has the first near 1 and the second near 0.

Answers are matched by alias, where the paper asks a chat model; a planted answer that holds a true one
("New York" for "York") does not count as true.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.audit.answers import cut_at, find_alias, is_answer
from palimpsest.core.errors import InvalidAudit, InvalidRecords, UnknownName, shorten
from palimpsest.parts.tokens import mean_losses, token_counts

LINES = 5
"""Solved lines before a question."""
RUNS = 3
"""Answers are sampled: fewer runs show noise."""
DEVELOPMENT = 0.1
"""Share of the facts on which hyperparameters are chosen."""


class ContextLine(TypedDict):
    """A solved question of the published file."""

    entity: str
    question: str
    answer: str


class Said(StrEnum):
    """What an answer says."""

    TRUE = "true"
    PLANTED = "planted"
    OTHER = "other"


@dataclass(frozen=True)
class Accuracy:
    """Share of true answers.

    Attributes:
        value: Mean over runs.
        deviation: Standard deviation between runs; NaN for one run.
        runs: Of every run.
        n: Questions of a run.
    """

    value: float
    deviation: float
    runs: tuple[float, ...]
    n: int


@dataclass(frozen=True)
class Recovery:
    """How far a model came back.

    Attributes:
        degradation: Accuracy of the clean model minus that of the corrupted one.
        restoration: 1 all that was lost is back, 0 nothing, below 0 worse than corrupted.
        forgetting: 1 no planted answer is given any more; NaN if the planted rates are not known.
    """

    degradation: float
    restoration: float
    forgetting: float


def context_prompt(
    question: str,
    relation: str,
    entity: str,
    context: Mapping[str, Sequence[ContextLine]],
    lines: int = LINES,
) -> str:
    """Solved questions about other entities for the same relation, in stored order, then the question.

    A relation with fewer lines gives a shorter prompt.

    Raises:
        UnknownName: If the context does not have the relation.
    """
    if relation not in context:
        raise UnknownName("relation", relation, context)
    others = (line for line in context[relation] if line["entity"] != entity)
    shots = "".join(f"{line['question']} {line['answer']}\n" for line in islice(others, lines))
    return shots + question


def cut_answer(text: str) -> str:
    """New text up to the first line break, without blanks around it."""
    return cut_at(text.lstrip(" "), ["\n"]).strip()


def judge(answer: str, accepted: Sequence[str], planted: Sequence[str] = (), exact: bool = False) -> Said:
    """Whether an answer is true, planted or something else.

    An answer that names both a true and a planted object is planted: the falsehood is still there.

    Args:
        answer: New text, cut.
        accepted: True objects and their aliases.
        planted: What the corruption planted.
        exact: The whole answer must be an object, instead of naming one.

    Example:
        >>> judge("New York, I think", ["York"], ["New York"]).value
        'planted'
    """
    check_objects(accepted, planted)
    if exact:
        if is_answer(answer, accepted):
            return Said.TRUE
        return Said.PLANTED if planted and is_answer(answer, planted) else Said.OTHER
    if planted and find_alias(answer, planted, rivals=accepted) is not None:
        return Said.PLANTED
    return Said.TRUE if find_alias(answer, accepted, rivals=planted) is not None else Said.OTHER


def check_objects(accepted: Sequence[str], planted: Sequence[str] = ()) -> None:
    """Check the objects of a fact.

    Raises:
        InvalidRecords: If there is no accepted object, one is blank, or a planted object is a true one.
    """
    if not accepted or not all(name.strip() for name in (*accepted, *planted)):
        raise InvalidRecords("A fact needs at least one accepted object, and none may be blank.")
    equal = [name for name in planted if is_answer(name, accepted)]
    if equal:
        raise InvalidRecords(f"Planted objects {shorten(equal)} are true: the fact is not corrupted.")


def accuracy(runs: Sequence[Mapping[str, Sequence[bool]]], as_released: bool = False) -> Accuracy:
    """Accuracy per entity, weighted by its questions, mean over sampled runs.

    Args:
        runs: For every run, whether each answer about each entity is true.
        as_released: Round the accuracy of every entity to two decimals before weighting.

    Raises:
        InvalidAudit: If there is no run, an entity has no answer, or the runs are about other questions.
    """
    if not runs or not runs[0]:
        raise InvalidAudit("There is no answer to judge.")
    sizes = {entity: len(judged) for entity, judged in runs[0].items()}
    empty = [entity for entity, size in sizes.items() if not size]
    if empty:
        raise InvalidAudit(f"Entities without an answer: {shorten(empty)}.")
    if any({entity: len(judged) for entity, judged in run.items()} != sizes for run in runs):
        raise InvalidAudit("The runs are not about the same questions: they cannot be averaged.")
    n = sum(sizes.values())

    def one(run: Mapping[str, Sequence[bool]]) -> float:
        shares = {entity: sum(map(bool, judged)) / sizes[entity] for entity, judged in run.items()}
        return sum((round(s, 2) if as_released else s) * sizes[e] for e, s in shares.items()) / n

    values = [one(run) for run in runs]
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Accuracy(float(np.mean(values)), deviation, tuple(values), n)


def recovery(
    clean: float,
    corrupted: float,
    unlearned: float,
    planted_before: float | None = None,
    planted_after: float | None = None,
) -> Recovery:
    """Degradation, restoration and forgetting from accuracies and rates of planted answers.

    Raises:
        InvalidAudit: If the corruption lowered nothing (restoration is then not defined), or a rate is
            outside [0, 1].

    Example:
        >>> recovery(0.9, 0.1, 0.3, 0.8, 0.0).forgetting
        1.0
    """
    degradation = degradation_of(clean, corrupted)
    restoration = restoration_of(clean, corrupted, unlearned)
    if planted_before is None or planted_after is None:
        return Recovery(degradation, restoration, math.nan)
    return Recovery(degradation, restoration, forgetting_of(planted_before, planted_after))


def degradation_of(clean: float, corrupted: float) -> float:
    """D = accuracy of the clean model - accuracy of the corrupted one."""
    _rates(clean=clean, corrupted=corrupted)
    return clean - corrupted


def restoration_of(clean: float, corrupted: float, unlearned: float) -> float:
    """(accuracy of the unlearned model - that of the corrupted one) / D.

    Raises:
        InvalidAudit: If D is 0 or below.
    """
    _rates(unlearned=unlearned)
    degradation = degradation_of(clean, corrupted)
    if degradation <= 0:
        raise InvalidAudit(
            f"The corruption did nothing (accuracy {clean:.3g} clean, {corrupted:.3g} corrupted): "
            "restoration is not defined."
        )
    return (unlearned - corrupted) / degradation


def forgetting_of(planted_before: float, planted_after: float) -> float:
    """1 - (rate of planted answers after) / (rate before).

    Raises:
        InvalidAudit: If the corrupted model gives no planted answer.
    """
    _rates(planted_before=planted_before, planted_after=planted_after)
    if planted_before == 0:
        raise InvalidAudit("The corrupted model gives no planted answer: there is nothing to forget.")
    return 1 - planted_after / planted_before


def option_log_probabilities(
    logits: Float[Tensor, "batch tokens vocabulary"], labels: Int[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Mean log-probability of each option's tokens after its prompt, one option a row.

    Raises:
        InvalidRecords: If an option has no token.
    """
    empty = (token_counts(labels) == 0).nonzero()[:, 0].tolist()
    if empty:
        raise InvalidRecords(f"Options in rows {shorten(empty)} have no token to score.")
    return -mean_losses(logits, labels)


def category_means(
    log_probabilities: Sequence[float] | Float[Tensor, " options"], categories: Sequence[str]
) -> dict[str, float]:
    """Mean over the options of each category ("correct", "corrupted", "random")."""
    values = torch.as_tensor(log_probabilities).double()
    if len(values) != len(categories) or not len(values):
        raise InvalidAudit(f"{len(values)} options do not fit {len(categories)} categories.")
    return {
        name: float(values[torch.tensor([category == name for category in categories])].mean())
        for name in dict.fromkeys(categories)
    }


def development_facts(
    facts: Sequence[str], random: np.random.Generator, share: float = DEVELOPMENT
) -> tuple[list[str], list[str]]:
    """Facts on which hyperparameters are chosen, and those that are reported.

    Raises:
        InvalidAudit: If one of the two would be empty.
    """
    chosen = round(share * len(facts))
    if not 0 < chosen < len(facts):
        raise InvalidAudit(
            f"A share of {share} of {len(facts)} facts leaves nothing to choose on or to report."
        )
    picked = set(random.choice(len(facts), chosen, replace=False).tolist())
    development = [fact for index, fact in enumerate(facts) if index in picked]
    return development, [fact for index, fact in enumerate(facts) if index not in picked]


def _rates(**rates: float) -> None:
    for name, value in rates.items():
        if not 0 <= value <= 1:
            raise InvalidAudit(f"{name} must be a rate from 0 to 1, not {value}.")
