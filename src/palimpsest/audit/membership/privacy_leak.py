"""PrivLeak: are forgotten documents still told from documents never seen?

Shi et al. 2025 (MUSE, arXiv 2407.06460): by Min-K% signals, against the same of a retrained model. Orientation of the area under the curve: MUSE's
is the chance that a HOLDOUT document looks more like a member than a forget document, so memorising gives
0, retraining one half, over-unlearning 1; OpenUnlearning prints one minus that. Either is taken, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from palimpsest.audit.membership import language_signals as signals
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.intervals import auc, auc_interval

K = 0.4
"""Share of Min-K% in PrivLeak."""
FEWEST_DOCUMENTS = 2
FAIR = 0.15
"""A retrained model's area under the curve further than this from 1/2 says the holdout is of another kind."""

Orientation = Literal["muse", "open-unlearning"]
Signals = Float[np.ndarray, " documents"]


@dataclass(frozen=True)
class PrivacyLeak:
    """PrivLeak of a model against the retrained one.

    Attributes:
        percent: 0 as retrained; far below, the forget data still pass for members; far above, they are
            abnormally unlikely, which is a leak too.
        auc: Of the model, in MUSE's orientation.
        retrained_auc: Of the retrained model, in MUSE's orientation.
        low: Lower end of the 95 % interval of `auc`.
        high: Upper end.
        forget: Documents.
        holdout: Documents.
        fair: Whether the retrained model's area is near 1/2: else forget and holdout differ by more than
            having been trained on, and the figure measures that.
    """

    percent: float
    auc: float
    retrained_auc: float
    low: float
    high: float
    forget: int
    holdout: int
    fair: bool


def privacy_auc(forget: Signals, holdout: Signals, orientation: Orientation = "muse") -> float:
    """Area under the curve of Min-K% signals between the documents of both sides.

    Args:
        forget: Minus the mean of the lowest token log-probabilities: low means likely a member.
        holdout: The same of documents that no model has seen.
        orientation: "muse", where a memorising model is near 0, or "open-unlearning", where it is near 1.

    Raises:
        InvalidAudit: If a side has fewer than 2 documents or a signal is NaN or infinite.
    """
    sides = check_documents(forget, holdout)
    value = auc(sides[0], sides[1])
    return value if _checked(orientation) == "muse" else 1.0 - value


def privacy_leak(value: float, retrained: float | None, orientation: Orientation = "muse") -> float:
    """100 (AUC - AUC_retrained) / AUC_retrained in MUSE's orientation.

    Args:
        value: Area under the curve of the model.
        retrained: Of the model that never saw the forget data.
        orientation: That both are given in.

    Raises:
        InvalidAudit: Without a retrained model, or if its area is 0: then the ratio is not defined.

    Example:
        >>> privacy_leak(0.0, 0.5), privacy_leak(0.9, 0.5, "open-unlearning")
        (-100.0, -80.0)
    """
    if retrained is None:
        raise InvalidAudit("PrivLeak is not defined without a retrained model: 1/2 may not be assumed.")
    if not (0 <= value <= 1 and 0 <= retrained <= 1):
        raise InvalidAudit(f"Areas under a curve lie in [0, 1], not {value} and {retrained}.")
    if _checked(orientation) == "open-unlearning":
        value, retrained = 1.0 - value, 1.0 - retrained
    if retrained == 0:
        raise InvalidAudit("The retrained model's area under the curve is 0: PrivLeak is not defined.")
    return 100.0 * (value - retrained) / retrained


def measure_privacy_leak(
    model: tuple[Signals, Signals], retrained: tuple[Signals, Signals] | None
) -> PrivacyLeak:
    """PrivLeak from the (forget, holdout) signals of both models, with what is needed to judge it."""
    if retrained is None:
        raise InvalidAudit("PrivLeak is not defined without a retrained model: 1/2 may not be assumed.")
    forget, holdout = check_documents(*model)
    _, low, high = auc_interval(forget, holdout)
    value, reference = privacy_auc(forget, holdout), privacy_auc(*retrained)
    return PrivacyLeak(
        privacy_leak(value, reference),
        value,
        reference,
        low,
        high,
        len(forget),
        len(holdout),
        abs(reference - 0.5) <= FAIR,
    )


def privacy_signals(
    scores: signals.TokenScores, mask: signals.TokenMask, k: float = K, as_released: bool = False
) -> Signals:
    """Min-K% signals of a batch of documents, minus the mean of their lowest log-probabilities.

    Args:
        scores: Log-probabilities of tokens (`language_signals.label_log_probabilities`).
        mask: Tokens that count.
        k: Share of tokens.
        as_released: NaN for documents of fewer than 1/k tokens, instead of their lowest token.
    """
    return (-signals.min_k_scores(scores, mask, k, fewest=0 if as_released else 1)).cpu().numpy()


def released_signals(
    scores: signals.LogProbabilities,
    lowercase: signals.LogProbabilities,
    reference: signals.LogProbabilities,
    text: str,
    ratios: Sequence[float],
) -> dict[str, float]:
    """All signals of one document under MUSE's names; its "PPL" is the mean loss, low for members."""
    loss = -signals.mean_log_probability(scores)
    reference_loss = -signals.mean_log_probability(reference)
    if reference_loss <= 0:
        raise InvalidAudit("The reference model finds the document certain: the ratio is not defined.")
    mask = torch.ones_like(scores[None], dtype=torch.bool)
    return {
        "PPL": loss,
        "PPL/ref": loss / reference_loss,
        "PPL/lower": -signals.lowercase_score(scores, lowercase),
        "PPL/zlib": loss / signals.compressed_size(text),
        **{
            f"Min-{ratio * 100:.10g}%": float(privacy_signals(scores[None], mask, ratio, as_released=True)[0])
            for ratio in ratios
        },
    }


def check_documents(forget: Signals, holdout: Signals) -> tuple[Signals, Signals]:
    """Signals of both sides as arrays.

    Raises:
        InvalidAudit: If a side has fewer than 2 documents or a signal is NaN or infinite.
    """
    sides = np.asarray(forget, float), np.asarray(holdout, float)
    for name, values in zip(("forget", "holdout"), sides, strict=True):
        if values.ndim != 1 or len(values) < FEWEST_DOCUMENTS:
            raise InvalidAudit(
                f"PrivLeak needs {FEWEST_DOCUMENTS} or more {name} documents, not {values.shape}."
            )
        if not np.isfinite(values).all():
            raise InvalidAudit(
                f"{int((~np.isfinite(values)).sum())} signals of the {name} documents are NaN."
            )
    return sides


def _checked(orientation: Orientation) -> Orientation:
    if orientation not in ("muse", "open-unlearning"):
        raise InvalidAudit(f"The orientation is 'muse' or 'open-unlearning', not {orientation!r}.")
    return orientation
