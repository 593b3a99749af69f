"""The verdict: one word from all findings, with its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from palimpsest.core.finding import Finding


class Verdict(StrEnum):
    """What the findings together say. Never "certified": only that the listed audits found no trace."""

    REMOVED = "removed"
    SUPPRESSED = "suppressed"
    INCOMPLETE = "incomplete"
    INTACT = "intact"
    OVER_FORGOTTEN = "over-forgotten"
    DAMAGED = "damaged"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Judgment:
    """A verdict and the findings it rests on, in words."""

    verdict: Verdict
    reasons: tuple[str, ...]


def judge(findings: Sequence[Finding]) -> Judgment:
    """The verdict of a list of findings."""
    return Judgment(Verdict.INCONCLUSIVE, ("no rule yet",))
