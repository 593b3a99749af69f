"""Knowledge isolation's joint loss: ascent on forget, descent on retain with a weight that follows the damage.

Agrawal and Huang 2025, "Selective Amnesia - Constrained Unlearning for LLMs via Knowledge Isolation", SemEval
2025 task 4, arXiv 2504.12996.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter, NonFiniteLoss
from palimpsest.core.unlearner import check_range

Baseline = Literal["mean", "official"]


@dataclass
class AdaptiveMultiplier:
    """The retain weight m: `low`, or more once the retain loss exceeds what it was in the first epoch.

    m = clip(round(scale * base^(loss - baseline) + offset, 1 decimal), low, high) above the baseline. During the
    first epoch (number 0) m is `low`, and every batch enters the baseline; later it stays.

    The cap is 2.3 in the published code and 2.8 in the paper. The released code adds up batch means and
    divides by rows, so that its baseline is smaller by about the rows per batch, and m is near the cap
    from the second epoch on; evaluation batches of the first epoch enter as well: give those only to reproduce.

    Attributes:
        scale: a, above 0.
        base: b, above 1.
        offset: c.
        low: Smallest m, at least 0.
        high: Largest m.
        baseline: "mean": mean retain loss of the first epoch, weighted by rows. "official": as released.
        total: State: sum of losses so far.
        rows: State: retained rows so far.
        reference: State: the baseline, in nats.
        change: State: how far the last batch was above the baseline; 0 if it was not.
    """

    scale: float = 0.3
    base: float = 6.0
    offset: float = 0.8
    low: float = 1.2
    high: float = 2.3
    baseline: Baseline = "mean"
    total: float = 0.0
    rows: int = 0
    reference: float = 0.0
    change: float = 0.0

    def __post_init__(self) -> None:
        check_range("scale", self.scale, 0, float("inf"), open_low=True)
        check_range("base", self.base, 1, float("inf"), open_low=True)
        check_range("low", self.low, 0, float("inf"))
        check_range("high", self.high, self.low, float("inf"))
        if self.baseline not in ("mean", "official"):
            raise InvalidHyperparameter(f"baseline must be 'mean' or 'official', not {self.baseline!r}.")

    def update(self, retain_loss: float, rows: int, epoch: float) -> float:
        """The weight m of a batch, whose loss enters the baseline during the first epoch.

        Args:
            retain_loss: Mean token loss of the batch's retained rows.
            rows: Their number; 0 gives m = 0, and leaves the baseline alone.
            epoch: Epochs done so far, fractions included.

        Raises:
            NonFiniteLoss: If the loss is NaN or Inf.
        """
        self.change = 0.0
        if rows == 0:
            return 0.0
        if not math.isfinite(retain_loss):
            raise NonFiniteLoss(f"The retain loss is {retain_loss} in epoch {epoch:g}.")
        if epoch < 1:
            self.total += retain_loss * (rows if self.baseline == "mean" else 1)
            self.rows += rows
            self.reference = self.total / self.rows
            return self.low
        if retain_loss <= self.reference:
            return self.low
        self.change = retain_loss - self.reference
        most = math.log(
            max(self.high - self.offset, 0) / self.scale + 1, self.base
        )  # beyond it m is at the cap
        raised = self.scale * self.base ** min(self.change, most + 1) + self.offset
        return min(max(round(raised, 1), self.low), self.high)


def joint_loss(
    forget_loss: Float[Tensor, ""] | None, retain_loss: Float[Tensor, ""] | None, multiplier: float
) -> Float[Tensor, ""]:
    """-forget + m * retain, of mean token losses; None for a batch without rows of that kind.

    The ascent has no bound: cap it, or stop once the forget accuracy is at chance.

    Raises:
        InvalidHyperparameter: If both are None.
    """
    if retain_loss is None:
        if forget_loss is None:
            raise InvalidHyperparameter("A batch needs forget or retained rows.")
        return -forget_loss
    return multiplier * retain_loss if forget_loss is None else multiplier * retain_loss - forget_loss
