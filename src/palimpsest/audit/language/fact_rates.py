"""Rates over facts whose subjects are the independent units: intervals, and findings on the scale K.

Several prompts of a fact, and several facts of a person, stand or fall together: a model that never saw
the person misses them all. So prompts are averaged to one value per fact, and subjects are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from palimpsest.audit.attacks.knowledge import measured
from palimpsest.audit.hit_rates import Rate, wilson
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome
from palimpsest.core.scale import SEED_SPREAD, judged

Values = Float[np.ndarray, " facts"]
Clusters = Int[np.ndarray, " facts"]


def cluster_error(values: NDArray[Any], clusters: Clusters) -> float:
    """Standard error of a mean over values of which only the clusters are independent.

    Example:
        >>> together = cluster_error(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1]))
        >>> apart = cluster_error(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 1, 2, 3]))
        >>> round(together, 3), round(apart, 3)
        (0.5, 0.289)
    """
    values = np.asarray(values, np.float64)
    numbers = np.unique(clusters, return_inverse=True)[1]
    groups = int(numbers.max()) + 1
    if groups < 2:
        return math.inf
    sums = np.bincount(numbers, values - values.mean())
    return math.sqrt(groups / (groups - 1) * float((sums**2).sum())) / len(values)


def clustered_rate(values: NDArray[Any], clusters: Clusters) -> Rate:
    """A rate with Wilson's interval on the number of independent values that the clusters are worth.

    Never fewer than the clusters or more than the values; a rate of 0 or 1 counts clusters only.

    Args:
        values: Hits, or shares of hits, from 0 to 1, [facts].
        clusters: Number of the subject of each.

    Raises:
        InvalidAudit: If there is no value.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0 or len(values) != len(clusters):
        raise InvalidAudit(
            f"A rate needs one value and one subject per fact, not {values.shape} and {len(clusters)}."
        )
    rate, groups = float(values.mean()), len(np.unique(clusters))
    error = cluster_error(values, clusters)
    worth = rate * (1 - rate) / error**2 if 0 < error < math.inf else groups
    n = min(max(worth, groups), len(values))
    return Rate(rate, *wilson(min(rate * n, n), n), n=len(values), facts=groups)


def rate_finding(
    evidence: Evidence,
    audit: str,
    name: str,
    values: Mapping[str, NDArray[Any]],
    clusters: Clusters,
    note: str = "",
    bears: Literal["inside", "outputs", ""] = "",
) -> Finding:
    """A rate of recovered facts on the scale K, by role; subjects are what is resampled.

    Args:
        evidence: Whose roles `values` has.
        audit: Name of the audit.
        name: Of the finding.
        values: By role, hits or shares of hits of each fact, [facts].
        clusters: Subject of each fact.
        note: Budget.
        bears: What it tells the verdict.
    """
    mean = {role: float(np.mean(given)) for role, given in values.items()}
    rate = clustered_rate(values[UNLEARNED], clusters)
    said = "; ".join(part for part in (note, f"{rate.facts} subjects") if part)
    finding = measured(evidence, audit, name, mean, said, "knowledge")
    finding = replace(finding, low=rate.low, high=rate.high, n=rate.n, bears=bears)
    return judged(finding, range_error(evidence, values, clusters), 1 / rate.n, SEED_SPREAD)


def range_error(evidence: Evidence, values: Mapping[str, NDArray[Any]], clusters: Clusters) -> float:
    """Standard error, over subjects, of original minus mean control; 0 where one of them is missing."""
    if ORIGINAL not in values or not evidence.controls:
        return 0.0
    control = np.mean([values[role] for role in evidence.control_roles], 0)
    return cluster_error(np.asarray(values[ORIGINAL], np.float64) - control, clusters)


def worst(findings: Sequence[Finding], name: str, what: str) -> Finding | None:
    """The valid finding with the highest K as the headline that the verdict reads; None without a valid one.

    Findings whose interval lies above 0 go first: a way of asking with few facts must not hide a sure one.

    Args:
        findings: Of one audit, one per way of asking.
        name: Of the headline.
        what: Ways of asking in the plural, for the note.
    """
    valid = [finding for finding in findings if finding.valid and finding.k is not None]
    if not valid:
        return None
    top = max(valid, key=lambda finding: ((finding.k_low or 0.0) > 0, finding.k or 0.0))
    note = f"{top.name}, the worst of {len(valid)} valid {what} ({len(findings)} tried); {top.note}"
    return replace(top, name=name, note=note, bears="inside")


def invalid(audit: str, name: str, why: str) -> Finding:
    """A probe that measures nothing."""
    return Finding(audit, name, None, more_is="knowledge", valid=False, judgement=Judgement.INVALID, note=why)


def not_run(audit: str, name: str, why: str) -> Outcome:
    """An audit that could not be run, and why."""
    return Outcome((Finding(audit, name, None, judgement=Judgement.NOT_RUN, note=why),))
