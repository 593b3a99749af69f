"""A matrix of scores, step by item: the tasks of a stream, or erasure requests that follow each other.

Row t holds what was measured after step t, column i what was measured on item i (learned, or forgotten, in
step i). What was not measured is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.core.errors import InvalidAudit


@dataclass(frozen=True)
class ScoreMatrix:
    """Scores of every item after every step.

    Attributes:
        scores: [steps, items], at least as many steps as items; NaN where nothing was measured.

    Raises:
        InvalidAudit: If it is no matrix, is empty, or has fewer steps than items.

    Example:
        >>> stream = ScoreMatrix(np.array([[0.9, 0.1], [0.6, 0.8]]))
        >>> round(stream.average, 3), round(stream.backward_transfer, 3), round(stream.forgetting, 3)
        (0.7, -0.3, 0.3)
    """

    scores: Float[NDArray[np.float64], "steps items"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", np.asarray(self.scores, float))
        if self.scores.ndim != 2 or 0 in self.scores.shape or len(self.scores) < self.scores.shape[1]:
            raise InvalidAudit(
                f"A matrix of scores is [steps, items] with no fewer steps than items, not {self.scores.shape}."
            )

    @property
    def at_their_time(self) -> Float[NDArray[np.float64], " items"]:
        """Score of each item right after its own step (the diagonal)."""
        return np.diagonal(self.scores).copy()

    @property
    def at_the_end(self) -> Float[NDArray[np.float64], " items"]:
        """Score of each item after the last step."""
        return self.scores[-1].copy()

    @property
    def average(self) -> float:
        """Mean score at the end over the items: ACC of Lopez-Paz and Ranzato (GEM, 2017), eq. 2."""
        return float(self.at_the_end.mean())

    @property
    def backward_transfer(self) -> float:
        """Mean change of the earlier items since their own step: BWT (GEM, eq. 3). NaN for one item.

        Below 0: later learning hurt earlier tasks.
        """
        return _mean(self.change[:-1])

    def forward_transfer(self, untrained: Float[NDArray[np.float64], " items"]) -> float:
        """Mean lead of the later items, just before their own step, over an untrained model: FWT (GEM, eq. 4).

        Args:
            untrained: Score of each item under random initialisation.

        Raises:
            InvalidAudit: If there is not one value per item.
        """
        items = self.scores.shape[1]
        if np.shape(untrained) != (items,):
            raise InvalidAudit(f"Forward transfer needs {items} untrained scores, not {np.shape(untrained)}.")
        before = np.array([self.scores[item - 1, item] for item in range(1, items)])
        return _mean(before - np.asarray(untrained, float)[1:])

    @property
    def forgetting(self) -> float:
        """Mean drop of the earlier items from their best score so far (Chaudhry et al., 2018). NaN for one item."""
        items = self.scores.shape[1]
        best = [np.nanmax(self.scores[item:-1, item], initial=-np.inf) for item in range(items - 1)]
        return _mean(np.array(best) - self.at_the_end[: items - 1])

    @property
    def change(self) -> Float[NDArray[np.float64], " items"]:
        """What became of each item from its own step to the end."""
        return self.at_the_end - self.at_their_time

    @property
    def re_emergence(self) -> float:
        """Largest rise of an earlier item since its own step: of knowledge K, what came back. NaN for one item."""
        earlier = self.change[:-1]
        return float(np.nanmax(earlier)) if np.isfinite(earlier).any() else float("nan")


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
