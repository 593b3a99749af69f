"""Membership signals of language models, from per-token log-probabilities; high means member.

A text of L scored tokens gives lp_1..lp_L, the log-probability of each token after those before it. All
functions are pure; published code often drops the last token or flips the sign, which callers can do.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidAudit

SMALLEST_VARIANCE = 1e-6
"""Of log-probabilities over the vocabulary, for Min-K%++ where the model is certain."""

LogProbabilities = Float[Tensor, " tokens"]


def token_log_probabilities(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> LogProbabilities:
    """Log-probability of each target token.

    Args:
        logits: At the predicting positions, that is, one before each target.
        targets: Token ids.
    """
    _check_logits(logits, targets)
    return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


def standardised_log_probabilities(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> LogProbabilities:
    """(lp_t - mu_t) / sigma_t with mean and deviation of log p over the vocabulary under p (Min-K%++).

    sigma_t^2 is at least 1e-6, so that a certain model gives no division by zero.
    """
    _check_logits(logits, targets)
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    # A ruled-out token has log p = -inf and p = 0; it contributes nothing.
    weighted = torch.where(p > 0, p * log_p, torch.zeros_like(p))
    squares = torch.where(p > 0, p * log_p**2, torch.zeros_like(p)).sum(1)
    mean = weighted.sum(1)
    deviation = (squares - mean**2).clamp(min=SMALLEST_VARIANCE).sqrt()
    return (log_p.gather(1, targets[:, None])[:, 0] - mean) / deviation


def mean_log_probability(log_probabilities: LogProbabilities) -> float:
    """LOSS: minus the mean negative log-likelihood (Yeom et al. 2018)."""
    _check(log_probabilities)
    return float(log_probabilities.detach().double().mean())


def zlib_score(log_probabilities: LogProbabilities, text: str) -> float:
    """LOSS over the compressed size of the text in bytes (Carlini et al. 2021)."""
    return mean_log_probability(log_probabilities) / len(zlib.compress(text.encode("utf-8")))


def reference_score(log_probabilities: LogProbabilities, reference: LogProbabilities) -> float:
    """LOSS above that of a reference model on the same tokens."""
    if len(log_probabilities) != len(reference):
        raise InvalidAudit(
            f"The reference must score the same tokens: {len(log_probabilities)} and {len(reference)} differ."
        )
    return mean_log_probability(log_probabilities) - mean_log_probability(reference)


def lowercase_score(log_probabilities: LogProbabilities, lowercase: LogProbabilities) -> float:
    """Minus the ratio of the text's loss to that of the lower-cased text."""
    loss, lower = -mean_log_probability(log_probabilities), -mean_log_probability(lowercase)
    if lower <= 0:
        raise InvalidAudit("The lower-cased text has no loss: the ratio is not defined.")
    return -loss / lower


def min_k(scores: LogProbabilities, k: float = 0.2) -> float:
    """Mean of the max(1, floor(k L)) smallest token scores.

    Min-K% (Shi et al. 2023, arXiv 2310.16789) on log-probabilities, Min-K%++ (Zhang et al. 2024,
    arXiv 2404.02936) on `standardised_log_probabilities`.

    Args:
        scores: Per token.
        k: Share of tokens in (0, 1]; 0.2 in the paper, 0.4 in MUSE.
    """
    _check(scores)
    if not 0 < k <= 1:
        raise InvalidAudit(f"Min-K needs a share k in (0, 1], not {k}.")
    count = max(1, math.floor(k * len(scores)))
    return float(scores.detach().double().sort().values[:count].mean())


def gradient_norm(loss: Float[Tensor, ""], parameters: Iterable[nn.Parameter], p: float = 2.0) -> float:
    """Minus the mean over parameter tensors of the p-norm of the loss's gradient (GradNorm).

    Args:
        loss: Mean negative log-likelihood of the text, with its graph; gradients of the model stay as
            they are.
        parameters: Tensors to differentiate by; those that the loss does not reach count as zero.
        p: Order of the norm.
    """
    tensors = [parameter for parameter in parameters if parameter.requires_grad]
    if not tensors:
        raise InvalidAudit("The gradient norm needs at least one trainable parameter.")
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    norms = [0.0 if g is None else float(torch.linalg.vector_norm(g.double(), ord=p)) for g in gradients]
    return -sum(norms) / len(norms)


def _check(scores: LogProbabilities) -> None:
    if scores.dim() != 1 or len(scores) == 0:
        raise InvalidAudit(
            f"Scores of at least one token are needed (a text of 2 tokens or more), not {tuple(scores.shape)}."
        )
    if not torch.isfinite(scores).all():
        raise InvalidAudit("Token scores hold NaN or infinity.")


def _check_logits(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() != 2 or targets.dim() != 1 or len(logits) != len(targets) or len(targets) == 0:
        raise InvalidAudit(
            f"One row of logits per target token is needed, got {tuple(logits.shape)} for {tuple(targets.shape)} "
            "(a text needs 2 tokens or more)."
        )
    if int(targets.min()) < 0 or int(targets.max()) >= logits.shape[1]:
        raise InvalidAudit(
            f"Token ids run from {int(targets.min())} to {int(targets.max())}, the vocabulary has "
            f"{logits.shape[1]}."
        )
