"""Which measure of knowledge deserves trust: faithfulness and robustness (E5 of card `sok`).

OpenUnlearning (arXiv 2506.12618) asks two things of a measure m in which more means more knowledge. It is
faithful if it tells models that have the knowledge from models that have not; it is robust if a model that
it calls forgetful neither relearns faster than a control nor remembers when its weights are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from palimpsest.core.errors import InvalidAudit
from palimpsest.core.intervals import auc

TINY = 1e-10
"""Added to the divisor of relative differences by the released code."""


def faithfulness(informed: Sequence[float], ignorant: Sequence[float]) -> float:
    """AUC of a measure over models trained with the knowledge against models trained without it.

    Raises:
        InvalidAudit: If a side is empty or holds NaN.
    """
    if not informed or not ignorant:
        raise InvalidAudit("Faithfulness needs models with the knowledge and models without it.")
    _finite(*informed, *ignorant)
    return auc(np.asarray(informed, float), np.asarray(ignorant, float))


def relearning_robustness(
    unlearned: tuple[float, float], control: tuple[float, float], as_released: bool = False
) -> float:
    """R = min(1, what the control gained / what the unlearned model gained) by the same relearning.

    1: learns no faster than a model that never knew. A model that gained nothing learns no faster.

    Args:
        unlearned: The measure before and after relearning.
        control: The same of the retrained model.
        as_released: Leave a negative gain of the control negative, instead of 0.
    """
    _finite(*unlearned, *control)
    gained, expected = unlearned[1] - unlearned[0], control[1] - control[0]
    if gained <= 0:
        return 1.0
    share = min(1.0, expected / gained)
    return share if as_released else max(0.0, share)


def quantization_robustness(before: float, after: float) -> float:
    """Q = min(1, m before / m after rounding the weights): below 1, rounding brought knowledge back.

    Raises:
        InvalidAudit: If a value is negative: a measure of knowledge starts at 0.
    """
    _finite(before, after)
    if before < 0 or after < 0:
        raise InvalidAudit(f"A measure of knowledge is not negative: {before} before and {after} after.")
    return 1.0 if after <= before else before / after


def robustness(relearning: float, quantization: float) -> float:
    """Harmonic mean of R and Q; 0 if either is 0 or below.

    Example:
        >>> robustness(1.0, 0.5)
        0.6666666666666666
    """
    _finite(relearning, quantization)
    if relearning <= 0 or quantization <= 0:
        return 0.0
    return 2 * relearning * quantization / (relearning + quantization)


def relative_difference(value: float, reference: float, tiny: float = TINY) -> float:
    """100 (m - m_ref) / (m_ref + 1e-10), in per cent of the retrained model's value."""
    _finite(value, reference)
    if reference + tiny == 0:
        raise InvalidAudit("The reference value is 0: a relative difference is not defined.")
    return 100.0 * (value - reference) / (reference + tiny)


def _finite(*values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise InvalidAudit(f"Measurements hold NaN or infinity: {list(values)[:6]}.")
