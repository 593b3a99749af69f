"""The losses of RESTOR's released code, which differ from its paper's: only to reproduce its figures.

Rezaei et al. 2025, arXiv 2411.00204. Use the objectives of the papers for everything else.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.unlearner import check_range
from palimpsest.parts.tokens import Labels, Logits, token_mean

INSIDE_LOG = 1e-12
"""Added to probabilities before their logarithm."""


def cross_entropy_to_frozen(logits: Logits, frozen_logits: Logits) -> Float[Tensor, ""]:
    """-mean over positions of sum p log(q + 1e-12): a cross entropy where the paper has a KL divergence.

    p is the current model, q the frozen one; prompt and padding count like everything else.
    """
    if logits.shape != frozen_logits.shape:
        raise ModelMismatch(
            f"The model gives logits {tuple(logits.shape)}, its frozen copy {tuple(frozen_logits.shape)}."
        )
    p, q = logits.softmax(-1), frozen_logits.detach().softmax(-1)
    return -(p * (q + INSIDE_LOG).log()).sum(-1).mean()


def npo_of_means(
    loss: Float[Tensor, ""], frozen_loss: Float[Tensor, ""], beta: float = 0.1
) -> Float[Tensor, ""]:
    """-(2/beta) log sigmoid(beta (L - L_frozen)) of two batch means, where NPO has one ratio per sequence."""
    check_range("beta", beta, 0, float("inf"), open_low=True)
    return -(2 / beta) * F.logsigmoid(beta * (loss - frozen_loss.detach()))


def npo_total(
    forget: tuple[Logits, Labels],
    frozen_logits: Logits,
    retain: tuple[Logits, Labels],
    beta: float = 0.1,
    gamma: float = 1.0,
) -> Float[Tensor, ""]:
    """`npo_of_means` on the forget batch plus gamma times the mean token loss of the retain batch.

    Args:
        forget: Logits and labels of the forget batch.
        frozen_logits: Of the corrupted model on it.
        retain: Logits and labels of the retain batch.
        beta: Fixed at 0.1 in the released code.
        gamma: Weight of the retain loss, at least 0.
    """
    if not gamma >= 0:
        raise InvalidHyperparameter(f"gamma must be 0 or more, not {gamma}.")
    npo = npo_of_means(token_mean(*forget), token_mean(frozen_logits, forget[1]), beta)
    return npo + gamma * token_mean(*retain)
