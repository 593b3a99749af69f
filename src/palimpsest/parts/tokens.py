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
    losses = F.cross_entropy(
        _exact(logits)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED
    )
    return losses.masked_fill(~scored(labels), 0.0)


def _exact(logits: Logits) -> Logits:
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def sequence_losses(logits: Logits, labels: Labels) -> Float[Tensor, " batch"]:
    """Sum of the token losses of every row: minus the log-likelihood of the answer."""
    return token_losses(logits, labels).sum(1)


def mean_losses(logits: Logits, labels: Labels) -> Float[Tensor, " batch"]:
    """Mean token loss of every row; 0 for a row without labels."""
    return token_losses(logits, labels).sum(1) / token_counts(labels).clamp(min=1)


def token_counts(labels: Labels) -> Int[Tensor, " batch"]:
    """Number of scored tokens of every row."""
    return scored(labels).sum(1)


def token_mean(logits: Logits, labels: Labels) -> Float[Tensor, ""]:
    """Mean loss over all scored tokens of a batch, as Hugging Face trains: long answers weigh more."""
    return token_losses(logits, labels).sum() / token_counts(labels).sum().clamp(min=1)


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
    used = labels[labels != IGNORED]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= logits.shape[2]):
        raise InvalidLabels(
            f"Token ids run from {int(used.min())} to {int(used.max())}, the vocabulary has {logits.shape[2]}."
        )
