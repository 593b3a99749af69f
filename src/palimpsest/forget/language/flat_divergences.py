"""FLAT's f-divergences between a template answer and the answer to forget, and its loss of token probabilities.

Wang et al. 2025, "LLM Unlearning via Loss Adjustment with Only Forget Data", arXiv 2410.11143. The variational
form of a divergence, g*(P_e) - f*(g*(P_f)), is maximised; here its negative a(P_e) - c(P_f) is the loss, with
P_e and P_f the mean probabilities (not log-likelihoods) of the tokens of the template and the forgotten answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, ModelMismatch, UnknownName
from palimpsest.parts.tokens import Labels, Logits, scored, token_counts, token_losses

Probability = Float[Tensor, ""]
TokenReduction = Literal["answer", "padded"]


@dataclass(frozen=True)
class Divergence:
    """One f-divergence as a loss.

    Attributes:
        template: a(P_e), the part of the template answer's mean token probability.
        forgotten: c(P_f), the part of the forgotten answer's.
        right_way: Whether the loss falls as the template becomes likelier and the forgotten answer less so.
            Three of the published eight do not: minimising them lowers the template's probability.
    """

    template: Callable[[Tensor], Tensor]
    forgotten: Callable[[Tensor], Tensor]
    right_way: bool = True

    def loss(self, template: Probability, forgotten: Probability) -> Float[Tensor, ""]:
        """a(P_e) - c(P_f), to be minimised."""
        return self.template(template) - self.forgotten(forgotten)


DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(lambda e: -e, lambda f: -torch.exp(f - 1)),
    "total-variation": Divergence(lambda e: -torch.tanh(e) / 2, lambda f: -torch.tanh(f) / 2),
    "jensen-shannon": Divergence(
        lambda e: F.softplus(-e) - math.log(2), lambda f: math.log(2) - f - F.softplus(-f)
    ),
    "pearson": Divergence(lambda e: -e, lambda f: -f - f**2 / 4),
    "jeffrey": Divergence(lambda e: -e, lambda f: -f - f**2 / 4 - f**3 / 16),
    "reverse-kl": Divergence(torch.exp, lambda f: 1 + f, right_way=False),
    "squared-hellinger": Divergence(torch.expm1, lambda f: -torch.expm1(-f), right_way=False),
    "neyman": Divergence(torch.expm1, lambda f: 2 * torch.sqrt(1 - f) - 2, right_way=False),
}
"""The eight published ones, by name."""


def divergence_named(name: str, allow_reversed: bool = False) -> Divergence:
    """The divergence of that name.

    Args:
        name: A key of `DIVERGENCES`.
        allow_reversed: Also give those that push the wrong way.

    Raises:
        UnknownName: If there is none of that name; suggests the nearest.
        InvalidHyperparameter: If it pushes the wrong way and that was not asked for.
    """
    if name not in DIVERGENCES:
        raise UnknownName("divergence", name, DIVERGENCES)
    if not (DIVERGENCES[name].right_way or allow_reversed):
        good = ", ".join(key for key, each in DIVERGENCES.items() if each.right_way)
        raise InvalidHyperparameter(
            f"Minimising '{name}' as published makes the template answer less likely. Use one of {good}, or "
            "say allow_reversed=True."
        )
    return DIVERGENCES[name]


def mean_probability(
    logits: Logits, labels: Labels, reduction: TokenReduction = "answer"
) -> Float[Tensor, ""]:
    """Mean probability of the true next token.

    Args:
        logits: Of the model.
        labels: Of one answer per row.
        reduction: "answer": mean over the scored tokens of the batch. "padded": divided by all
            batch * (tokens - 1) positions, as in the official code: the result, and with it the learning
            rate that fits, then depends on the length to which the batch is padded.

    Raises:
        InvalidRecords: If a row has no scored token, naming it.
        InvalidHyperparameter: If the reduction is unknown.
    """
    if reduction not in ("answer", "padded"):
        raise InvalidHyperparameter(f"reduction must be 'answer' or 'padded', not {reduction!r}.")
    losses, mask = token_losses(logits, labels), scored(labels)
    counts = token_counts(labels)
    if counts.numel() == 0 or bool((counts == 0).any()):
        rows = torch.nonzero(counts == 0).flatten().tolist()
        raise InvalidRecords(
            f"Rows {rows} of {len(counts)} have no answer token: they were cut off, or are empty."
        )
    total = (-losses).exp().masked_fill(~mask, 0.0).sum()
    return total / (counts.sum() if reduction == "answer" else mask.numel())


def flat_loss(
    forget_logits: Logits,
    forget_labels: Labels,
    template_logits: Logits,
    template_labels: Labels,
    divergence: Divergence | str = "total-variation",
    reduction: TokenReduction = "answer",
) -> Float[Tensor, ""]:
    """FLAT's loss: a(P_e) - c(P_f), with gradients into both forward passes.

    Args:
        forget_logits: On question + answer to forget.
        forget_labels: Its labels.
        template_logits: On the same questions + template answers.
        template_labels: Their labels.
        divergence: From `divergence_named`, or a name.
        reduction: See `mean_probability`.

    Raises:
        ModelMismatch: If the two batches differ in their number of rows.
        InvalidRecords: If a row has no answer token.
    """
    if len(forget_labels) != len(template_labels):
        raise ModelMismatch(
            f"Every question needs one template answer: {len(forget_labels)} answers to forget, "
            f"{len(template_labels)} templates."
        )
    used = divergence_named(divergence) if isinstance(divergence, str) else divergence
    template = mean_probability(template_logits, template_labels, reduction)
    return used.loss(template, mean_probability(forget_logits, forget_labels, reduction))
