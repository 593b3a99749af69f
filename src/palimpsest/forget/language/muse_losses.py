"""The losses of MUSE's released code, which differ from the papers': only to reproduce its published numbers.

Shi et al. 2024, arXiv 2407.06460. Both work on raw logits. Use `forget.objectives` for everything else.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import ModelMismatch
from palimpsest.core.unlearner import check_range
from palimpsest.parts.tokens import Logits


def npo_on_logits(logits: Logits, reference_logits: Logits, beta: float = 0.1) -> Float[Tensor, ""]:
    """-2/beta mean log sigmoid(beta * (reference logit - logit)) over every logit, labels unused."""
    _check(logits, reference_logits)
    check_range("beta", beta, 0, float("inf"), open_low=True)
    return -(2 / beta) * F.logsigmoid(beta * (reference_logits.detach() - logits)).mean()


def kl_on_logits(logits: Logits, reference_logits: Logits) -> Float[Tensor, ""]:
    """KL divergence with raw logits in the place of log-probabilities, divided by the number of rows."""
    _check(logits, reference_logits)
    return F.kl_div(logits, reference_logits.detach(), reduction="batchmean", log_target=True)


def _check(logits: Logits, reference_logits: Logits) -> None:
    if logits.shape != reference_logits.shape:
        raise ModelMismatch(
            f"The model gives logits {tuple(logits.shape)}, its reference {tuple(reference_logits.shape)}."
        )
