"""Interclass confusion: is the mix-up of two classes gone that wrong labels taught? (card `classifier-baselines`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.intervals import clopper_pearson
from palimpsest.core.scale import judged

SPREAD = 0.05
"""Prior deviation of IC-ERR between retrainings, which have lost a part of both classes (digits, small CNN, half
of the records of 3 and 8: 0.05 over six seeds)."""


@audit("interclass-confusion", code="A1", parts=("test",), tasks=("classification",), default=False)
@dataclass(frozen=True)
class InterclassConfusion:
    """How often a model mixes up two classes whose labels were swapped in the forget records.

    For requests that take wrong labels back: some training records of two classes carry each other's label,
    and they are the forget records. A model that still knows them errs on test records of both classes,
    which have their true labels. IC-ERR and FGT-ERR of "Towards Adversarial Evaluations for Inexact Machine
    Unlearning" (arXiv 2201.06640), also in SCRUB (arXiv 2302.09880); low is best.

    Attributes:
        classes: The two classes.
    """

    classes: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if len(set(self.classes)) != 2 or len(self.classes) != 2:
            raise InvalidAudit(f"Interclass confusion is between two different classes, not {self.classes}.")

    def run(self, evidence: Evidence) -> Outcome:
        """The share of test records of both classes that are taken for another class, and the mix-ups among them.

        Raises:
            InvalidAudit: If the test part has no record of one of the classes.
        """
        labels = evidence.labels("test")
        absent = [name for name in self.classes if not (labels == name).any()]
        if absent:
            raise InvalidAudit(f"The test records have none of class {absent[0]}.")
        counts = {
            role: confusions(evidence.observe(role, "test").logits.argmax(1).numpy(), labels, *self.classes)
            for role in evidence.roles
        }
        n = int(np.isin(labels, self.classes).sum())
        wrong, mixed = counts[UNLEARNED]
        findings = (
            self._finding(
                evidence, "ic_err", {role: found[0] / n for role, found in counts.items()}, wrong, n
            ),
            self._finding(
                evidence, "fgt_err", {role: found[1] / n for role, found in counts.items()}, mixed, n
            ),
        )
        return Outcome(findings)

    def _finding(self, evidence: Evidence, name: str, rates: dict[str, float], count: int, n: int) -> Finding:
        low, high = clopper_pearson(count, n)
        finding = Finding(
            "interclass-confusion", name, rates[UNLEARNED], low, high, n, more_is="knowledge",
            original=rates.get(ORIGINAL), controls=tuple(rates[role] for role in evidence.control_roles),
            bears="outputs", note=f"{count} of {n} test records of classes {self.classes[0]} and {self.classes[1]}",
        )  # fmt: skip
        return judged(finding, floor=1 / n, prior=SPREAD)


def confusions(predicted: NDArray[np.int64], labels: NDArray[np.int64], a: int, b: int) -> tuple[int, int]:
    """Records of classes a and b that are predicted as anything else, and those of a as b or of b as a.

    IC-ERR is the first over the number of such records; FGT-ERR is the second.

    Example:
        >>> confusions(np.array([0, 1, 2, 0, 2]), np.array([0, 0, 0, 1, 2]), 0, 1)
        (3, 2)
    """
    mine = np.isin(labels, (a, b))
    wrong = mine & (predicted != labels)
    mixed = ((labels == a) & (predicted == b)) | ((labels == b) & (predicted == a))
    return int(wrong.sum()), int(mixed.sum())
