"""RMIA: robust membership inference from few reference models (Zarifzadeh et al. 2024, arXiv 2312.03262).

A record's probability under the attacked model is compared with what models without it give, and the
ratio with the same ratio of population records, which nobody trained on.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from palimpsest.core.errors import InvalidAudit, shorten
from palimpsest.core.intervals import auc

Probabilities = Float[np.ndarray, " records"]
References = Float[np.ndarray, "models records"]
Memberships = Bool[np.ndarray, "models records"]


def rmia(
    target: Probabilities,
    references: References,
    inside: Memberships,
    population: Probabilities,
    population_references: References,
    a: float = 0.3,
    gamma: float = 1.0,
    *,
    as_released: bool = False,
) -> Float[np.ndarray, " records"]:
    """Share of population records that a record's likelihood ratio exceeds by the factor gamma (offline RMIA).

    ratio_x = p(x) / [(1 + a) / 2 mean_out p(x) + (1 - a) / 2]; the score of x is the share of z with
    ratio_x / ratio_z > gamma.

    Args:
        target: Probability of the true label under the attacked model.
        references: The same under reference models.
        inside: Which reference model was trained on which record; the others make the mean.
        population: Probability of the true label of population records under the attacked model.
        population_references: The same under the reference models, none of which saw them.
        a: Turns probabilities without the record into those of models of either kind.
        gamma: How much larger the ratio must be.
        as_released: Average over the larger half of the references only, with zeros where a record has
            fewer models without it than that, as the published code does.

    Returns:
        Scores in [0, 1], high = member.

    Raises:
        InvalidAudit: If shapes differ, values are no probabilities, or a record was in every reference.
    """
    _check(target, references, inside, population, population_references, a, gamma)
    nowhere = np.zeros_like(population_references, bool)
    mean = _out_mean_as_released if as_released else _out_mean
    ratio = target / ((1 + a) / 2 * mean(references, inside, a) + (1 - a) / 2)
    others = population / ((1 + a) / 2 * mean(population_references, nowhere, a) + (1 - a) / 2)
    # ratio_x > gamma * ratio_z, counted by sorting instead of a table of all pairs.
    return np.searchsorted(np.sort(gamma * others), ratio, side="left") / len(others)


def tune_offline_a(
    references: References,
    inside: Memberships,
    population_references: References,
    attacked: int = 0,
    gamma: float = 1.0,
) -> float:
    """The constant a, in steps of 0.1, with which one reference model is attacked best by the others.

    No data of the target are used, so that the choice does not flatter the attack on it.

    Args:
        references: Probability of the true label under the reference models, at least 3 of them.
        inside: Which reference model was trained on which record.
        population_references: The same for population records.
        attacked: Which reference model plays the target.
        gamma: As in `rmia`.
    """
    rest = np.arange(len(references)) != attacked
    known = ~inside[rest].all(0)
    truth = inside[attacked] & known
    if not truth.any() or not (known & ~inside[attacked]).any():
        raise InvalidAudit(
            "The attacked reference model needs records of both kinds that others did not see."
        )

    def quality(a: float) -> float:
        scores = rmia(
            references[attacked][known],
            references[rest][:, known],
            inside[rest][:, known],
            population_references[attacked],
            population_references[rest],
            a,
            gamma,
        )
        return auc(scores[truth[known]], scores[~truth[known]])

    return max((round(0.1 * step, 1) for step in range(11)), key=quality)


def _out_mean(references: References, inside: Memberships, a: float) -> Probabilities:
    del a
    return np.where(inside, 0.0, references).sum(0) / (~inside).sum(0)


def _out_mean_as_released(references: References, inside: Memberships, a: float) -> Probabilities:
    half = max(len(references) // 2, 1)
    if half == 1:
        slope = a or 0.3
        return np.where(inside, (references + slope - 1) / slope, references).mean(0)
    largest = -np.sort(-np.where(inside, 0.0, references), axis=0)[:half]
    return largest.mean(0)


def _check(
    target: np.ndarray,
    references: np.ndarray,
    inside: np.ndarray,
    population: np.ndarray,
    population_references: np.ndarray,
    a: float,
    gamma: float,
) -> None:
    if references.ndim != 2 or references.shape != inside.shape or target.shape != references.shape[1:]:
        raise InvalidAudit(
            "RMIA needs a target [records], references and memberships [models, records]; got "
            f"{target.shape}, {references.shape} and {inside.shape}."
        )
    if population.ndim != 1 or population_references.shape != (len(references), len(population)):
        raise InvalidAudit(
            f"RMIA needs the population under the target and all {len(references)} references; got "
            f"{population.shape} and {population_references.shape}."
        )
    if len(population) == 0 or len(target) == 0:
        raise InvalidAudit("RMIA needs at least one record and one population record.")
    for values in (target, references, population, population_references):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise InvalidAudit("RMIA compares probabilities of the true label: they must lie in [0, 1].")
    if not 0 <= a <= 1 or not gamma > 0:
        raise InvalidAudit(f"RMIA needs a in [0, 1] and gamma above 0, not {a} and {gamma}.")
    everywhere = np.flatnonzero(inside.all(0))
    if len(everywhere):
        raise InvalidAudit(
            f"No reference model was trained without records {shorten(everywhere.tolist())}: RMIA needs one."
        )
