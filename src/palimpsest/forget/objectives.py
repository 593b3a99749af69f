"""Losses that make a language model forget, built from the likelihood of answers.

Every function gives the forget term of a method as it is minimised; `weighted` adds the retain term. There
are two kinds of input. Sequence losses take tensors [batch]: the summed loss of every answer (minus its
log-likelihood, `parts.tokens.sequence_losses`) and, where it is needed, its number of tokens; what a frozen
reference model says of an answer is such a number too, so it can be computed once, before the training, and
the reference model need not stay in memory. Token losses take logits [batch, tokens, vocabulary] and labels
[batch, tokens] as Hugging Face has them; `parts.tokens` makes the shift between the two.

Losses on hidden states are in `forget/steering.py`, PDU's in `forget/primal_dual.py`, f-divergences in
`forget/language/flat_divergences.py`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch
from palimpsest.core.unlearner import check_range
from palimpsest.parts.distillation import kl_divergence
from palimpsest.parts.tokens import (
    Labels,
    Logits,
    TokenMask,
    check_tokens,
    scored,
    token_losses,
)

Losses = Float[Tensor, " batch"]
"""-log p(answer | prompt) of every row in nats, summed over its tokens: above 0, small where it is known."""
Counts = Int[Tensor, " batch"]
"""Number of scored tokens of every row."""
Loss = Float[Tensor, ""]


# The sum of forget and retain terms


def weighted(forget: Loss, retain: Loss | None = None, gamma: float = 1.0, alpha: float = 1.0) -> Loss:
    """The sum gamma * forget + alpha * retain: what all methods but PDU minimise."""
    return gamma * forget if retain is None else gamma * forget + alpha * retain


def mean_token_loss(losses: Losses, counts: Counts) -> Loss:
    """Mean over all scored tokens of the batch, from sums per row: long answers weigh more.

    The same as `parts.tokens.token_mean` of the logits; the retain term of most methods.

    Raises:
        ModelMismatch: If the shapes differ.
    """
    _check_rows(losses, counts)
    return losses.sum() / counts.sum().clamp(min=1)


def kl_retain_loss(logits: Logits, reference_logits: Logits, labels: Labels | None = None) -> Loss:
    """KL(reference || model) of next-token distributions, mean over positions.

    Args:
        logits: Of the model on retained records.
        reference_logits: Of the frozen reference model on the same batch.
        labels: Count only positions that predict a scored token. Without labels all positions count,
            prompts and padding too, as published: the weight of the term then falls with the padding.

    Raises:
        ModelMismatch: If the two vocabularies or batches differ.
    """
    mask = None if labels is None else F.pad(_scored(logits, labels), (0, 1))
    return kl_divergence(logits, reference_logits.detach(), mask=mask)


# Sequence losses


def gradient_ascent_loss(losses: Losses, counts: Counts) -> Loss:
    """Minus the mean token loss (Jang et al. 2022, arXiv 2210.01504). Without bound: stop in time.

    With `weighted` and the retained records' mean token loss it is GradDiff (Liu et al. 2022), with
    `kl_retain_loss` KL-min.
    """
    return -mean_token_loss(losses, counts)


def idk_nll_loss(
    losses: Losses,
    counts: Counts,
    retain_losses: Losses,
    retain_counts: Counts,
    alpha: float = 1.0,
    reduction: Literal["separate", "joint"] = "separate",
) -> Loss:
    """Learn to answer "I don't know" (TOFU's PO, arXiv 2401.06121), beside the retained records.

    Args:
        losses: Of refusals to the forgotten questions.
        counts: Their tokens.
        retain_losses: Of the retained answers.
        retain_counts: Their tokens.
        alpha: Weight of the retained records; must be 1 for "joint".
        reduction: "separate": mean token loss of the refusals + alpha * that of the retained answers.
            "joint": one mean over the tokens of both, as in TOFU's code; long retained answers then
            outweigh short refusals.

    Raises:
        InvalidHyperparameter: If the reduction is unknown, or alpha does not fit it.
    """
    if reduction == "separate":
        return mean_token_loss(losses, counts) + alpha * mean_token_loss(retain_losses, retain_counts)
    if reduction != "joint":
        raise InvalidHyperparameter(f"reduction must be 'separate' or 'joint', not {reduction!r}.")
    if alpha != 1:
        raise InvalidHyperparameter(f"A joint mean has no weight of the retained records: alpha is {alpha}.")
    return mean_token_loss(torch.cat([losses, retain_losses]), torch.cat([counts, retain_counts]))


def dpo_loss(
    chosen: Losses, chosen_reference: Losses, rejected: Losses, rejected_reference: Losses, beta: float = 0.1
) -> Loss:
    """Prefer another answer to the true one (Rafailov et al. 2023, arXiv 2305.18290).

    -2/beta mean log sigmoid(beta * (r(chosen) - r(rejected))), r = log p / p_reference of a whole answer.
    IdkDPO chooses refusals, AltPO (arXiv 2409.13474) plausible wrong answers, one row for each of them.
    The factor 2/beta is that of NPO, so that learning rates compare; Rafailov et al. have none.

    Args:
        chosen: Losses of the answers to learn.
        chosen_reference: The reference model's.
        rejected: Losses of the answers to forget.
        rejected_reference: The reference model's.
        beta: Inverse temperature, above 0.

    Raises:
        InvalidHyperparameter: If beta is not above 0.
        ModelMismatch: If the shapes differ.
    """
    _check_rows(chosen, chosen_reference, rejected, rejected_reference)
    gain = (chosen_reference.detach() - chosen) - (rejected_reference.detach() - rejected)
    return _preference(gain, beta)


def npo_loss(losses: Losses, reference_losses: Losses, beta: float = 0.1) -> Loss:
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868).

    -2/beta mean log sigmoid(beta * (loss - reference loss)): DPO without a chosen answer. Above 0, so
    bounded below, and the gradient of a row fades as its answer is forgotten: it is that of gradient
    ascent on summed losses times 2 p^beta / (p^beta + p_reference^beta). beta to 0 gives gradient ascent.

    Raises:
        InvalidHyperparameter: If beta is not above 0.
        ModelMismatch: If the shapes differ.

    Example:
        >>> same = torch.tensor([3.0, 5.0])  # before the first step the two models agree
        >>> round(npo_loss(same, same, beta=0.1).item(), 4)  # 2/beta log 2
        13.8629
    """
    _check_rows(losses, reference_losses)
    return _preference(losses - reference_losses.detach(), beta)


def simnpo_loss(losses: Losses, counts: Counts, beta: float = 4.5, delta: float = 0.0) -> Loss:
    """NPO without reference model, by the mean loss per token (Fan et al. 2024, arXiv 2410.07163).

    -2/beta mean log sigmoid(beta * (loss / tokens - delta)).

    Args:
        losses: Of the answers to forget.
        counts: Their tokens.
        beta: Inverse temperature, above 0.
        delta: Loss per token from which on an answer counts as forgotten ("gamma" in the paper).

    Raises:
        InvalidHyperparameter: If beta is not above 0.
        InvalidRecords: If an answer has no token.
    """
    _check_rows(losses, counts)
    if bool((counts == 0).any()):
        rows = torch.nonzero(counts == 0).flatten().tolist()
        raise InvalidRecords(f"SimNPO divides by the length of answers: rows {rows} have no scored token.")
    return _preference(losses / counts - delta, beta)


def _preference(gain: Losses, beta: float) -> Loss:
    check_range("beta", beta, 0, float("inf"), open_low=True)
    return -(2 / beta) * F.logsigmoid(beta * gain).mean()


# Token losses


def wga_loss(logits: Logits, labels: Labels, beta: float = 1.0) -> Loss:
    """Weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301): tokens weigh p^beta, detached.

    Tokens that are forgotten already no longer pull.

    Raises:
        InvalidHyperparameter: If beta is negative.
    """
    check_range("beta", beta, 0, float("inf"))
    losses = token_losses(logits, labels)
    weights = (-losses.detach() * beta).exp()
    return -_token_mean(weights * losses, scored(labels))


def satimp_loss(logits: Logits, labels: Labels, beta1: float = 5.0, beta2: float = 1.0) -> Loss:
    """Gradient ascent by saturation and importance (Yang et al. 2025, arXiv 2505.11953).

    Tokens weigh p^beta1 (1 - p)^beta2, detached.

    Raises:
        InvalidHyperparameter: If an exponent is negative.
    """
    check_range("beta1", beta1, 0, float("inf"))
    check_range("beta2", beta2, 0, float("inf"))
    losses = token_losses(logits, labels)
    probability = (-losses.detach()).exp()
    weights = probability**beta1 * (1 - probability) ** beta2
    return -_token_mean(weights * losses, scored(labels))


def undial_loss(logits: Logits, reference_logits: Logits, labels: Labels, beta: float = 10.0) -> Loss:
    """Distil from a reference whose logit of the true token is lowered by beta (arXiv 2402.10052).

    Cross entropy between softmax(reference logits - beta at the label) and the model, mean over the
    scored tokens. The published port averages over prompts and padding as well, where it reads the
    ignored label as a token.

    Args:
        logits: Of the model.
        reference_logits: Of the frozen reference model on the same batch.
        labels: Of the answers to forget.
        beta: How much the true token loses, above 0.

    Raises:
        InvalidHyperparameter: If beta is not above 0.
        ModelMismatch: If the two vocabularies or batches differ.
    """
    check_range("beta", beta, 0, float("inf"), open_low=True)
    _check_alike(logits, reference_logits)
    mask = _scored(logits, labels)
    target = reference_logits.detach()[:, :-1][mask]
    true = F.one_hot(labels[:, 1:][mask], target.shape[-1]).to(target.dtype)
    return _soft_cross_entropy(logits[:, :-1][mask], (target - beta * true).softmax(-1))


def ceu_loss(logits: Logits, labels: Labels, skip: int = 1) -> Loss:
    """Cross entropy unlearning (Yang 2025, arXiv 2503.01224): learn one's own guess without the truth.

    The target is the model's distribution, detached, with the true token taken out.

    Args:
        logits: Of the model.
        labels: Of the answers to forget.
        skip: So many first tokens of every answer are left alone.

    Raises:
        InvalidHyperparameter: If `skip` is negative.
    """
    check_range("skip", skip, 0, float("inf"))
    mask = _scored(logits, labels)
    mask = mask & (mask.cumsum(1) > skip)
    student, true = logits[:, :-1][mask], labels[:, 1:][mask]
    target = student.detach().scatter(1, true[:, None], -math.inf).softmax(-1)
    return _soft_cross_entropy(student, target)


def _soft_cross_entropy(
    logits: Float[Tensor, "rows vocabulary"], target: Float[Tensor, "rows vocabulary"]
) -> Loss:
    """Mean over rows of -sum of target log p; 0 without rows."""
    return -(target * F.log_softmax(logits, -1)).sum() / max(len(logits), 1)


def _token_mean(values: Float[Tensor, "batch tokens-1"], mask: TokenMask) -> Loss:
    return values.sum() / mask.sum().clamp(min=1)


def _scored(logits: Logits, labels: Labels) -> Bool[Tensor, "batch tokens-1"]:
    check_tokens(logits, labels)
    return scored(labels)


def _check_alike(logits: Tensor, reference: Tensor) -> None:
    if logits.shape != reference.shape:
        raise ModelMismatch(
            f"The model gives logits {tuple(logits.shape)}, its reference {tuple(reference.shape)}: both "
            "must see the same batch and share a vocabulary."
        )


def _check_rows(first: Tensor, *others: Tensor) -> None:
    """All [batch], of one length, with at least one row."""
    shapes = [tuple(each.shape) for each in (first, *others)]
    if first.dim() != 1 or len(set(shapes)) > 1:
        raise ModelMismatch(f"Sequence losses take tensors [batch] of one length, not {shapes}.")
    if first.numel() == 0:
        raise InvalidRecords("A loss needs at least one row: the batch is empty.")
