"""Population attacks: one rule for all records, learnt without shadow models.

- `threshold_attack`: a threshold per class (Song & Mittal 2021).
- `svc_attack`: the support-vector attack behind "MIA-efficacy" (card of the SalUn family).
- `member_share`: the logistic attack printed with SSD and bad teaching.
- `crossfit`: a logistic attack fitted on the very records it judges, none of which scores itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from palimpsest.audit.membership.rates import Scores
from palimpsest.core.errors import InvalidAudit

Features = Float[np.ndarray, "records features"]

CROSSFIT_WIDENING = math.sqrt(2)
"""How much wider than DeLong's the error of a cross-fitted AUC is: each pair of folds enters it twice, each
time fitted on one and judged on the other (simulated without any signal: 1.38 to 1.48)."""


class Labelled(NamedTuple):
    """One score per record (high = member), and its class."""

    values: Scores
    labels: Int[np.ndarray, " records"]


def class_threshold(members: Scores, others: Scores) -> float:
    """The value that best tells members (at or above) from non-members, in balanced accuracy.

    Candidates are the members' values, then the non-members'; the first best one is taken.

    Raises:
        InvalidAudit: If a side is empty.
    """
    if len(members) == 0 or len(others) == 0:
        raise InvalidAudit(f"A threshold needs scores on both sides, got {len(members)} and {len(others)}.")
    candidates = np.concatenate([members, others])
    kept = (len(members) - np.searchsorted(np.sort(members), candidates, side="left")) / len(members)
    refused = np.searchsorted(np.sort(others), candidates, side="left") / len(others)
    return float(candidates[np.argmax(0.5 * (kept + refused))])


def called_member(
    shadow_members: Labelled, shadow_others: Labelled, targets: Labelled
) -> Bool[np.ndarray, " t"]:
    """Which targets reach the threshold of their class, learnt on shadow members and non-members.

    Raises:
        InvalidAudit: If a class of the targets is missing on either side of the shadow data.
    """
    called = np.zeros(len(targets.values), bool)
    for label in np.unique(targets.labels):
        mine = targets.labels == label
        threshold = class_threshold(
            shadow_members.values[shadow_members.labels == label],
            shadow_others.values[shadow_others.labels == label],
        )
        called[mine] = targets.values[mine] >= threshold
    return called


def threshold_attack(
    shadow_members: Labelled, shadow_others: Labelled, members: Labelled, others: Labelled
) -> tuple[float, float]:
    """Per-class thresholds learnt on shadow data, applied to targets.

    Returns:
        (share of target members called members, share of target non-members called non-members).
    """
    return (
        float(called_member(shadow_members, shadow_others, members).mean()),
        float((~called_member(shadow_members, shadow_others, others)).mean()),
    )


def correctness_attack(
    members: Bool[np.ndarray, " m"], others: Bool[np.ndarray, " n"]
) -> tuple[float, float]:
    """Calls a record a member if it is classified right; takes and returns as `threshold_attack`."""
    return float(members.mean()), float((~others).mean())


def svc_attack(members: Features, others: Features, targets: Features, c: float = 3.0) -> float:
    """Share of targets that a support-vector machine calls NON-member ("MIA-efficacy"; 1 is not the ideal).

    Radial basis functions and gamma = 1 / features, as published.

    Args:
        members: Features of trained records (retain).
        others: Features of records not trained on (test).
        targets: Features of the records in question (forget).
        c: Price of an error.
    """
    from sklearn.svm import SVC

    inputs, truth = _sides(members, others)
    machine = SVC(C=c, gamma="auto", kernel="rbf").fit(inputs, truth)
    return 1 - float(machine.predict(targets).mean())


def member_share(members: Features, others: Features, targets: Features) -> float:
    """Share of targets that a class-balanced logistic regression calls MEMBER.

    With entropy as the only feature this is the attack printed with SSD and bad teaching.
    """
    from sklearn.linear_model import LogisticRegression

    inputs, truth = _sides(members, others)
    model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(inputs, truth)
    return float(model.predict(targets).mean())


def crossfit(
    members: Features,
    others: Features,
    random: np.random.Generator,
    folds: int = 5,
    groups: tuple[Int[np.ndarray, " members"], Int[np.ndarray, " others"]] | None = None,
) -> tuple[Scores, Scores]:
    """Scores of a logistic attack in which no record is scored by a fit that saw it.

    Each fold is scored by a class-balanced logistic regression on standardised features, fitted on the
    others. So that folds share one scale, scores are counted in standard deviations of the fitted
    non-members from their mean.

    Args:
        members: Features of members.
        others: Features of non-members.
        random: Draws the folds; the same generator state gives the same folds for every model.
        folds: Number of folds.
        groups: Of each member and non-member; records of a group are always in the same fold.

    Returns:
        Scores of (members, non-members), high = member.

    Raises:
        InvalidAudit: If a side has fewer records than folds, or features are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    if min(len(members), len(others)) < folds:
        raise InvalidAudit(
            f"{folds} folds need as many records a side, got {len(members)} members and {len(others)} non-members."
        )
    inputs, truth = _sides(members, others)
    fold = _folds(len(members), len(others), folds, groups, random)
    scores = np.empty(len(inputs))
    for index in range(folds):
        held, fitted = fold == index, fold != index
        center, width = inputs[fitted].mean(0), inputs[fitted].std(0)
        scaled = (inputs - center) / np.where(width > 1e-12 * (1 + np.abs(center)), width, np.inf)
        model = LogisticRegression(class_weight="balanced", solver="newton-cholesky").fit(
            scaled[fitted], truth[fitted]
        )
        values = model.decision_function(scaled)
        reference = values[fitted & (truth == 0)]
        spread = reference.std()
        scores[held] = (values[held] - reference.mean()) / (spread if spread > 1e-12 else 1.0)
    return scores[: len(members)], scores[len(members) :]


def _folds(
    members: int,
    others: int,
    folds: int,
    groups: tuple[Int[np.ndarray, " members"], Int[np.ndarray, " others"]] | None,
    random: np.random.Generator,
) -> Int[np.ndarray, " records"]:
    if groups is None:
        return np.concatenate([random.permutation(size) % folds for size in (members, others)])
    names, index = np.unique(np.concatenate(groups), return_inverse=True)
    return (random.permutation(len(names)) % folds)[index]


def _sides(members: Features, others: Features) -> tuple[Features, Int[np.ndarray, " records"]]:
    if members.ndim != 2 or others.ndim != 2 or members.shape[1] != others.shape[1]:
        raise InvalidAudit(
            f"Features must be [records, features] alike, got {members.shape} and {others.shape}."
        )
    if len(members) == 0 or len(others) == 0:
        raise InvalidAudit(
            f"An attack needs both sides, got {len(members)} members and {len(others)} others."
        )
    inputs = np.concatenate([members, others]).astype(np.float64)
    if not np.isfinite(inputs).all():
        raise InvalidAudit("Attack features hold NaN or infinity.")
    return inputs, np.concatenate([np.ones(len(members), np.int64), np.zeros(len(others), np.int64)])
