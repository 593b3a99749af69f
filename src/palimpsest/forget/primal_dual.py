"""PDU: flatten the logits on forget answers, under a bound on the retain loss that a dual variable enforces.

Entesari et al. 2025, "Constrained Entropic Unlearning", arXiv 2506.05314.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.unlearner import check_range
from palimpsest.parts.tokens import IGNORED, Labels, Logits, check_tokens, scored

Loss = Float[Tensor, ""]


def flatness_loss(logits: Logits, labels: Labels, as_released: bool = False) -> Loss:
    """Mean over the answer's tokens of (largest logit - mean logit)^2: 0 for a uniform guess.

    Args:
        logits: Of the model.
        labels: Of the answers to forget.
        as_released: Count the positions of the answer's tokens instead of those that predict them: the
            published code does not shift, so it misses the first token and counts what follows the last.
    """
    check_tokens(logits, labels)
    rows = logits[labels != IGNORED] if as_released else logits[:, :-1][scored(labels)]
    heights = rows.amax(-1) - rows.mean(-1)
    return (heights**2).sum() / max(len(heights), 1)


def pdu_loss(forget: Loss, retain: Loss, multiplier: float, bound: float, gamma: float = 1.0) -> Loss:
    """The Lagrangian gamma * forget + multiplier * (retain - bound), with the multiplier before its update.

    Args:
        forget: `flatness_loss`.
        retain: Mean token loss of the retained records.
        multiplier: Dual variable, at least 0.
        bound: Largest retain loss that is allowed, in nats; a bit above that of the original model.
        gamma: Weight of the forget term.
    """
    return gamma * forget + multiplier * (retain - bound)


def dual_update(multiplier: float, retain: float, bound: float, step: float) -> float:
    """The dual variable after a step of projected ascent: max(0, multiplier + step * (retain - bound)).

    Raises:
        InvalidHyperparameter: If the multiplier or the step is out of range, or the loss is not finite.

    Example:
        >>> dual_update(1.0, retain=0.5, bound=0.25, step=2.0)
        1.5
    """
    check_range("multiplier", multiplier, 0, float("inf"))
    check_range("step", step, 0, float("inf"), open_low=True)
    if not (math.isfinite(retain) and math.isfinite(bound)):
        raise InvalidHyperparameter(f"Retain loss and bound must be finite, not {retain!r} and {bound!r}.")
    return max(0.0, multiplier + step * (retain - bound))
