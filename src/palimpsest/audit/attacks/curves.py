"""Curves of what a model knew while it was tuned, and what is read from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.attacks.knowledge import Watched
from palimpsest.core.finding import Row
from palimpsest.core.records import Batch


@dataclass(frozen=True)
class Curve:
    """What a model knew of records while it was tuned.

    Attributes:
        steps: After which it was measured.
        right: Whether each record was answered correctly, [measurements, records].
        confidence: Log odds of the true label, [measurements, records].
        diverged: Whether the loss became NaN or Inf; from then on the last values before are kept.
    """

    steps: list[int]
    right: NDArray[np.bool_]
    confidence: NDArray[np.float32]
    diverged: bool = False

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Share answered correctly, [measurements]."""
        return self.right.mean(1)


@dataclass(frozen=True)
class Draw:
    """One repetition of the attack: what is relearned, and on what it is measured.

    Attributes:
        batches: Of the steps, in order.
        rest: Positions in the forget part of the records that are measured, [records].
        watched: Those records, ready to be measured.
        learned: The relearned questions themselves; None where records are not independent facts.
    """

    batches: Sequence[Batch]
    rest: NDArray[np.int64]
    watched: Watched
    learned: Watched | None = None


@dataclass(frozen=True)
class Relearned:
    """Relearning curves of all models.

    Attributes:
        lr: Learning rate of all.
        goal: Half of the original's accuracy before the attack.
        curves: By role, one per draw.
        draws: The draws.
    """

    lr: float
    goal: float
    curves: Mapping[str, Sequence[Curve]]
    draws: Sequence[Draw]

    def per_record(
        self, what: Literal["right", "confidence"], measured: slice
    ) -> dict[str, NDArray[np.float64]]:
        """Mean over the measurements and over the draws that measured a record, by role, [records]."""
        size = max(int(draw.rest.max()) for draw in self.draws) + 1
        means: dict[str, NDArray[np.float64]] = {}
        for role, curves in self.curves.items():
            total, count = np.zeros(size), np.zeros(size)
            for curve, draw in zip(curves, self.draws, strict=True):
                total[draw.rest] += getattr(curve, what)[measured].astype(np.float64).mean(0)
                count[draw.rest] += 1
            means[role] = total[count > 0] / count[count > 0]
        return means

    def accuracy(self, role: str) -> NDArray[np.float64]:
        """Mean over the draws, [measurements]."""
        return np.mean([curve.accuracy for curve in self.curves[role]], 0)

    def steps_to_goal(self, role: str) -> float:
        """Steps to the goal, interpolated, at least 1; the whole budget if it is not reached."""
        steps, accuracy = self.curves[role][0].steps, self.accuracy(role)
        reached = np.flatnonzero(accuracy >= self.goal)
        if not len(reached):
            return float(steps[-1])
        first = int(reached[0])
        if first == 0:
            return 1.0
        share = (self.goal - accuracy[first - 1]) / (accuracy[first] - accuracy[first - 1])
        return max(1.0, float(steps[first - 1] + share * (steps[first] - steps[first - 1])))


def curve_rows(attack: str, role: str, curves: Sequence[Curve]) -> list[Row]:
    """Rows of the series `relearning`: mean accuracy of several curves after every measured step."""
    mean = np.mean([curve.accuracy for curve in curves], 0)
    return [
        {"attack": attack, "model": role, "step": step, "accuracy": float(value)}
        for step, value in zip(curves[0].steps, mean, strict=True)
    ]
