"""Membership signals of language models, from per-token log-probabilities; high means member.

A text of L scored tokens gives lp_1..lp_L, the log-probability of each token after those before it. The
functions in the plural take a whole batch: padded [batch, tokens] scores with the mask of the tokens that
count, so that a part of the data is scored without a loop over its texts. Those in the singular take one
text. All are pure; published code often drops the last token (`without_last`) or flips the sign.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidAudit
from palimpsest.parts.tokens import IGNORED, check_tokens, scored

SMALLEST_VARIANCE = 1e-6
"""Of log-probabilities over the vocabulary, for Min-K%++ where the model is certain."""

LogProbabilities = Float[Tensor, " tokens"]
TokenScores = Float[Tensor, "batch tokens"]
TokenMask = Bool[Tensor, "batch tokens"]
TextScores = Float[Tensor, " batch"]


def label_log_probabilities(
    logits: Float[Tensor, "batch tokens vocabulary"], labels: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "batch tokens-1"], Bool[Tensor, "batch tokens-1"]]:
    """Log-probability of every labelled token, and which tokens are labelled.

    Args:
        logits: Of a causal model, unshifted.
        labels: Hugging Face's: as long as the inputs, -100 where a token is not scored.
    """
    check_tokens(logits, labels)
    mask = scored(labels)
    found = logits[:, :-1].log_softmax(2).gather(2, _targets(labels))[..., 0]
    return found.masked_fill(~mask, 0.0), mask


def standardised_label_scores(
    logits: Float[Tensor, "batch tokens vocabulary"],
    labels: Int[Tensor, "batch tokens"],
    smallest_variance: float = SMALLEST_VARIANCE,
) -> tuple[Float[Tensor, "batch tokens-1"], Bool[Tensor, "batch tokens-1"]]:
    """(lp_t - mu_t) / sigma_t with mean and deviation of log p over the vocabulary under p (Min-K%++).

    Args:
        logits: Of a causal model, unshifted.
        labels: As for `label_log_probabilities`.
        smallest_variance: sigma_t^2 is at least this, so that a certain model gives no division by zero;
            0 as the authors' code has it.
    """
    check_tokens(logits, labels)
    mask = scored(labels)
    log_p = logits[:, :-1].log_softmax(2)
    p = log_p.exp()
    # A ruled-out token has log p = -inf and p = 0; it contributes nothing.
    weighted = torch.where(p > 0, p * log_p, torch.zeros_like(p))
    mean = weighted.sum(2)
    squares = torch.where(p > 0, weighted * log_p, torch.zeros_like(p)).sum(2)
    deviation = (squares - mean**2).clamp(min=smallest_variance).sqrt()
    found = (log_p.gather(2, _targets(labels))[..., 0] - mean) / deviation
    return found.masked_fill(~mask, 0.0), mask


def without_last(mask: TokenMask) -> TokenMask:
    """The mask without the last counted token of every row, which often is the end of the text."""
    after = mask.flip(1).cumsum(1).flip(1)
    return mask & (after > 1)


def mean_log_probabilities(scores: TokenScores, mask: TokenMask) -> TextScores:
    """LOSS of every text: minus its mean negative log-likelihood (Yeom et al. 2018)."""
    check_batch(scores, mask)
    return _masked(scores, mask, 0.0).sum(1) / mask.sum(1)


def zlib_scores(scores: TokenScores, mask: TokenMask, texts: Sequence[str]) -> TextScores:
    """LOSS over the compressed size of each text in bytes (Carlini et al. 2021)."""
    if len(texts) != len(scores):
        raise InvalidAudit(f"One text per row is needed: {len(texts)} texts for {len(scores)} rows.")
    sizes = torch.tensor([compressed_size(text) for text in texts], device=scores.device)
    return mean_log_probabilities(scores, mask) / sizes


def reference_scores(scores: TokenScores, reference: TokenScores, mask: TokenMask) -> TextScores:
    """LOSS above that of a reference model on the same tokens."""
    if scores.shape != reference.shape:
        raise InvalidAudit(
            f"The reference must score the same tokens: {tuple(scores.shape)} and {tuple(reference.shape)} differ."
        )
    return mean_log_probabilities(scores, mask) - mean_log_probabilities(reference, mask)


def lowercase_scores(losses: TextScores, lowercase: TextScores) -> TextScores:
    """Minus the ratio of each text's loss to that of the lower-cased text, which has other tokens.

    Args:
        losses: Mean negative log-likelihood of the texts.
        lowercase: The same of the lower-cased texts.
    """
    if bool((lowercase <= 0).any()):
        raise InvalidAudit("A lower-cased text has no loss: the ratio is not defined.")
    return -losses.double() / lowercase.double()


def min_k_scores(scores: TokenScores, mask: TokenMask, k: float = 0.2, fewest: int = 1) -> TextScores:
    """Mean of the max(fewest, floor(k L)) smallest token scores of every text.

    Min-K% (Shi et al. 2023, arXiv 2310.16789) on log-probabilities, Min-K%++ (Zhang et al. 2024,
    arXiv 2404.02936) on `standardised_label_scores`.

    Args:
        scores: Per token.
        mask: Tokens that count.
        k: Share of tokens in (0, 1]; 0.2 in the paper, 0.4 in MUSE.
        fewest: Tokens to average at least; 0 as released, where a text of fewer than 1/k tokens gives NaN.

    Example:
        >>> scores = torch.tensor([[-1.0, -4.0, -2.0, 0.0], [-3.0, -9.0, 0.0, 0.0]])
        >>> mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
        >>> min_k_scores(scores, mask, k=0.5).tolist()
        [-3.0, -3.0]
    """
    check_batch(scores, mask)
    if not 0 < k <= 1:
        raise InvalidAudit(f"Min-K needs a share k in (0, 1], not {k}.")
    counts = (mask.sum(1).double() * k).floor().long().clamp(min=fewest)
    smallest = _masked(scores, mask, torch.inf).sort(1).values
    taken = torch.arange(smallest.shape[1], device=scores.device) < counts[:, None]
    return smallest.masked_fill(~taken, 0.0).sum(1) / counts


def token_log_probabilities(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> LogProbabilities:
    """Log-probability of each target token.

    Args:
        logits: At the predicting positions, that is, one before each target.
        targets: Token ids.
    """
    return label_log_probabilities(*_one_text(logits, targets))[0][0]


def standardised_log_probabilities(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> LogProbabilities:
    """`standardised_label_scores` of one text, from the logits at its predicting positions."""
    return standardised_label_scores(*_one_text(logits, targets))[0][0]


def mean_log_probability(log_probabilities: LogProbabilities) -> float:
    """LOSS: minus the mean negative log-likelihood (Yeom et al. 2018)."""
    return float(mean_log_probabilities(*_row(log_probabilities)))


def zlib_score(log_probabilities: LogProbabilities, text: str) -> float:
    """LOSS over the compressed size of the text in bytes (Carlini et al. 2021)."""
    return float(zlib_scores(*_row(log_probabilities), [text]))


def reference_score(log_probabilities: LogProbabilities, reference: LogProbabilities) -> float:
    """LOSS above that of a reference model on the same tokens."""
    scores, mask = _row(log_probabilities)
    return float(reference_scores(scores, reference[None], mask))


def lowercase_score(log_probabilities: LogProbabilities, lowercase: LogProbabilities) -> float:
    """Minus the ratio of the text's loss to that of the lower-cased text."""
    losses = [-mean_log_probabilities(*_row(scores)) for scores in (log_probabilities, lowercase)]
    return float(lowercase_scores(losses[0], losses[1]))


def min_k(scores: LogProbabilities, k: float = 0.2) -> float:
    """`min_k_scores` of one text."""
    return float(min_k_scores(*_row(scores), k))


def compressed_size(text: str) -> int:
    """Bytes of a text after zlib, a model-free measure of how predictable it is."""
    return len(zlib.compress(text.encode("utf-8")))


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


def check_batch(scores: TokenScores, mask: TokenMask) -> None:
    """Check padded scores and their mask.

    Raises:
        InvalidAudit: If the shapes differ, a text has no scored token, or a score is NaN or infinite.
    """
    if scores.dim() != 2 or scores.shape != mask.shape or len(scores) == 0:
        raise InvalidAudit(
            f"Scores [batch, tokens] with a mask of their shape are needed, not {tuple(scores.shape)} and "
            f"{tuple(mask.shape)}."
        )
    empty = (~mask.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise InvalidAudit(
            f"Scores of at least one token are needed (a text of 2 tokens or more); rows {empty[:5]} have none."
        )
    if not torch.isfinite(scores[mask]).all():
        bad = (mask & ~torch.isfinite(scores)).any(1).nonzero()[:, 0].tolist()
        raise InvalidAudit(f"Token scores hold NaN or infinity in rows {bad[:5]}.")


def _masked(scores: TokenScores, mask: TokenMask, value: float) -> TokenScores:
    return scores.detach().double().masked_fill(~mask, value)


def _targets(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens-1 1"]:
    return labels[:, 1:].masked_fill(~scored(labels), 0)[..., None]


def _row(scores: LogProbabilities) -> tuple[TokenScores, TokenMask]:
    return scores[None], torch.ones_like(scores[None], dtype=torch.bool)


def _one_text(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One text as a batch: a row of logits that predicts nothing is added, and a label before the first."""
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
    first = torch.full_like(targets[:1], IGNORED)
    return torch.cat([logits, torch.zeros_like(logits[:1])])[None], torch.cat([first, targets])[None]
