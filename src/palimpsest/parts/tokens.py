"""Losses of labelled tokens: the one place where the shift between logits and labels is made.

Labels are those of Hugging Face: as long as the inputs, `IGNORED` on prompts and padding; the logits at
position t - 1 predict the label at position t, so the first label is never scored.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidLabels, ModelMismatch

IGNORED = -100
"""Label of tokens that are not scored."""

Logits = Float[Tensor, "batch tokens vocabulary"]
Labels = Int[Tensor, "batch tokens"]
TokenLosses = Float[Tensor, "batch tokens-1"]
TokenMask = Bool[Tensor, "batch tokens-1"]


def scored(labels: Labels) -> TokenMask:
    """Which of the predicted tokens count, [batch, tokens - 1]."""
    return labels[:, 1:] != IGNORED


def token_losses(logits: Logits, labels: Labels) -> TokenLosses:
    """-log p of every labelled token after those before it, in nats; 0 where there is no label.

    At least in float32: sums over an answer are too coarse in bfloat16.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 4)
        >>> token_losses(logits, torch.tensor([[IGNORED, 2, IGNORED]]))
        tensor([[1.3863, 0.0000]])
    """
    check_tokens(logits, labels)
    return scored_losses(logits[:, :-1][scored(labels)], labels)


def scored_losses(rows: Float[Tensor, "scored vocabulary"], labels: Labels) -> TokenLosses:
    """The same as `token_losses`, from the logits of the scored tokens alone, in the order of rows and positions.

    Raises:
        ModelMismatch: If there are not as many as scored tokens.
        InvalidLabels: If a label lies outside the vocabulary.
    """
    mask = scored(labels)
    targets = labels[:, 1:][mask]
    if rows.dim() != 2 or len(rows) != len(targets):
        raise ModelMismatch(
            f"Logits [{len(targets)}, vocabulary] of the scored tokens are needed, not {tuple(rows.shape)}."
        )
    _check_targets(targets, rows.shape[1])
    losses = F.cross_entropy(_exact(rows), targets, reduction="none")
    return losses.new_zeros(mask.shape).masked_scatter(mask, losses)


def _exact(logits: Float[Tensor, "scored vocabulary"]) -> Float[Tensor, "scored vocabulary"]:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def sequence_losses(logits: Logits, labels: Labels) -> Float[Tensor, " batch"]:
    """Sum of the token losses of every row: minus the log-likelihood of the answer."""
    return token_losses(logits, labels).sum(1)


def mean_losses(logits: Logits, labels: Labels) -> Float[Tensor, " batch"]:
    """Mean token loss of every row; 0 for a row without labels."""
    return row_means(token_losses(logits, labels), labels)


def row_means(losses: TokenLosses, labels: Labels) -> Float[Tensor, " batch"]:
    """Mean of the token losses of every row; 0 for a row without labels."""
    return losses.sum(1) / token_counts(labels).clamp(min=1)


def token_counts(labels: Labels) -> Int[Tensor, " batch"]:
    """Number of scored tokens of every row."""
    return scored(labels).sum(1)


def token_mean(logits: Logits, labels: Labels) -> Float[Tensor, ""]:
    """Mean loss over all scored tokens of a batch, as Hugging Face trains: long answers weigh more."""
    return joint_mean(token_losses(logits, labels), labels)


def joint_mean(losses: TokenLosses, labels: Labels) -> Float[Tensor, ""]:
    """Mean of the token losses over all scored tokens of a batch."""
    return losses.sum() / token_counts(labels).sum().clamp(min=1)


def check_tokens(logits: Logits, labels: Labels) -> None:
    """Check that logits and labels belong together.

    Raises:
        ModelMismatch: If their shapes differ.
        InvalidLabels: If a label lies outside the vocabulary.
    """
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ModelMismatch(
            f"Logits [batch, tokens, vocabulary] are needed for labels {tuple(labels.shape)}, not {tuple(logits.shape)}."
        )
    _check_targets(labels[labels != IGNORED], logits.shape[2])


def _check_targets(targets: Int[Tensor, " scored"], vocabulary: int) -> None:
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= vocabulary):
        raise InvalidLabels(
            f"Token ids run from {int(targets.min())} to {int(targets.max())}, the vocabulary has {vocabulary}."
        )
