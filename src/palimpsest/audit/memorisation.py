"""Memorisation of labelled answers under teacher forcing: exact, extraction strength, probability.

Definitions of OpenUnlearning (arXiv 2506.12618): of the tokens y_1..y_L of an answer, how many are the
model's first choice (exact memorisation), and how late must the answer be given for the rest to follow
(extraction strength; Carlini et al. 2021 ask for it by free generation, which is another measure). All
functions take padded batches; a row without a token that counts gives NaN and is left out of a mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.audit.membership.language_signals import without_last
from palimpsest.core.errors import InvalidAudit, NonFinite
from palimpsest.parts.tokens import check_tokens, mean_losses, scored, token_counts

Logits = Float[Tensor, "batch tokens vocabulary"]
Labels = Int[Tensor, "batch tokens"]
Hits = Bool[Tensor, "batch tokens-1"]
PerText = Float[Tensor, " batch"]


@dataclass(frozen=True)
class Memorisation:
    """What a model knows by heart of every answer of a batch.

    Attributes:
        exact: Share of tokens that are the model's first choice; NaN without tokens.
        strength: Extraction strength; NaN without tokens.
        probability: exp(-mean token loss), over all labelled tokens; NaN without tokens.
        tokens: Tokens behind `exact` and `strength`.
    """

    exact: PerText
    strength: PerText
    probability: PerText
    tokens: Int[Tensor, " batch"]


def memorisation(
    logits: Logits, labels: Labels, drop_last: bool = True, as_released: bool = False
) -> Memorisation:
    """All measures of a batch from one forward pass.

    Args:
        logits: Of a causal model, unshifted.
        labels: Hugging Face's: -100 on the prompt and on padding.
        drop_last: Leave the last labelled token, the end of the answer, out of `exact` and `strength`.
        as_released: Extraction strength with the floor 1/L of the released code.

    Raises:
        NonFinite: If logits of labelled tokens hold NaN.
    """
    hits, mask = token_hits(logits, labels, drop_last)
    return Memorisation(
        exact_memorisation(hits, mask),
        extraction_strength(hits, mask, as_released),
        verbatim_probability(logits, labels),
        mask.sum(1),
    )


def token_hits(logits: Logits, labels: Labels, drop_last: bool = True) -> tuple[Hits, Hits]:
    """Which labelled tokens are the first choice after the true tokens before them, and which count."""
    check_tokens(logits, labels)
    mask = scored(labels)
    if torch.isnan(logits[:, :-1][mask]).any():
        raise NonFinite("The logits of labelled tokens hold NaN: the model is broken, not forgetful.")
    hits = (logits[:, :-1].argmax(2) == labels[:, 1:]) & mask
    return hits, without_last(mask) if drop_last else mask


def exact_memorisation(hits: Hits, mask: Hits) -> PerText:
    """Share of the counted tokens that are hits: from 0 to 1.

    Example:
        >>> hits, mask = torch.tensor([[True, False, True]]), torch.tensor([[True, True, True]])
        >>> exact_memorisation(hits, mask)
        tensor([0.6667], dtype=torch.float64)
    """
    _check(hits, mask)
    return (hits & mask).sum(1).double() / mask.sum(1)


def extraction_strength(hits: Hits, mask: Hits, as_released: bool = False) -> PerText:
    """1 - k / L with k the fewest first tokens that must be given for all the others to be hits.

    Args:
        hits: First choices that are right.
        mask: Tokens that count, L in a row.
        as_released: Never below 1/L, and 0 without tokens: the released code does not look at the last
            token of an answer that it misses everywhere.

    Example:
        >>> hits, mask = torch.tensor([[True, False, True]]), torch.tensor([[True, True, True]])
        >>> extraction_strength(hits, mask)
        tensor([0.3333], dtype=torch.float64)
    """
    _check(hits, mask)
    length = mask.sum(1)
    position = mask.cumsum(1) * (mask & ~hits)
    given = F.pad(position, (1, 0)).amax(1)
    if as_released:
        given = torch.minimum(given, (length - 1).clamp(min=0))
        return torch.where(length > 0, 1 - given / length.clamp(min=1).double(), 0.0)
    return 1 - given.double() / length


def lowest_strength(tokens: Int[Tensor, " batch"], as_released: bool = False) -> PerText:
    """The smallest extraction strength that answers of these lengths can have: 0, or 1/L as released."""
    return 1 / tokens.double() if as_released else torch.zeros_like(tokens, dtype=torch.float64)


def verbatim_probability(logits: Logits, labels: Labels) -> PerText:
    """exp(-mean token loss) of every answer, end included: its length-normalised probability."""
    losses = mean_losses(logits, labels).double()
    return torch.where(token_counts(labels) > 0, (-losses).exp(), torch.nan)


def mean_over_texts(values: PerText) -> tuple[float, int]:
    """Mean over the texts that have a value, and how many have none.

    Raises:
        InvalidAudit: If no text has one.
    """
    known = values[~torch.isnan(values)]
    if not len(known):
        raise InvalidAudit("No answer has a token that counts: nothing can be averaged.")
    return float(known.double().mean()), len(values) - len(known)


def _check(hits: Hits, mask: Hits) -> None:
    if hits.dim() != 2 or hits.shape != mask.shape:
        raise InvalidAudit(
            f"Hits [batch, tokens] need a mask of their shape, not {tuple(hits.shape)} and {tuple(mask.shape)}."
        )
