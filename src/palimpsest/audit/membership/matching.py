"""Members and non-members of equal difficulty.

An attack measures membership only if the two sides differ in nothing else. Non-members are therefore
held-out records with the labels of the members, in the same proportions; for a class forgotten as a whole
these are held-out records of that class alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.membership.rates import Scores

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Match:
    """Which records are compared.

    Attributes:
        members: Positions in the member part, in order.
        others: Positions in the non-member part, in order.
        dropped: Members left out because no non-member has their label.
    """

    members: Positions
    others: Positions
    dropped: int


def match(member_labels: NDArray[Any], other_labels: NDArray[Any], random: np.random.Generator) -> Match:
    """The largest subsample of non-members with the class proportions of the members.

    All members whose label occurs among the non-members are kept. Of every class at least one non-member
    is kept, so that proportions are exact up to rounding.

    Args:
        member_labels: Class of each member.
        other_labels: Class of each non-member.
        random: Draws the subsample.
    """
    kept = np.isin(member_labels, other_labels)
    dropped = int((~kept).sum())
    if not kept.any():
        return Match(np.empty(0, np.int64), np.empty(0, np.int64), dropped)
    classes, counts = np.unique(member_labels[kept], return_counts=True)
    available = [np.flatnonzero(other_labels == label) for label in classes]
    ratio = min(len(where) / count for where, count in zip(available, counts, strict=True))
    chosen = [
        random.permutation(where)[: max(1, int(ratio * count + 1e-9))]
        for where, count in zip(available, counts, strict=True)
    ]
    return Match(np.flatnonzero(kept), np.sort(np.concatenate(chosen)), dropped)


def hardest(difficulty: Scores, share: float) -> Positions:
    """Positions of the most difficult share of records (at least one), in order.

    Args:
        difficulty: Per record, under models other than the attacked one.
        share: Of the records, in (0, 1].
    """
    count = max(1, round(share * len(difficulty)))
    return np.sort(np.argsort(-difficulty, kind="stable")[:count])
