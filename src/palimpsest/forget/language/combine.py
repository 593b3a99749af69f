"""Several language models answering as one: their next-token logits combined, to score text and to generate alike.

Used by unlearning from logit difference (ULD), by "Who's Harry Potter?" and for offsets. What is given back
is a Hugging Face causal model: `forward` combines at every position, and `generate` is that of transformers
(greedy, sampling, beams, batches with padding on the left), with keys and values of every model kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, MissingDependency, ModelMismatch
from palimpsest.core.unlearner import check_range
from palimpsest.parts.logit_combination import AnyLogits, logit_difference, offset_logits, whp_logits


class Combination(Protocol):
    """How the logits of several models become those of one, with its settings as fields of a frozen dataclass."""

    models: ClassVar[int]
    """How many models are combined, the wrapped one included."""

    def logits(self, *logits: AnyLogits, generating: bool = False) -> AnyLogits:
        """The combined logits.

        Args:
            *logits: Of the wrapped model, then of the others.
            generating: Whether a token is about to be chosen, rather than a text scored.
        """
        ...


@dataclass(frozen=True)
class Difference:
    """Subtract an assistant that knows what is to be forgotten (ULD).

    Attributes:
        alpha: Share of the assistant's logits that is subtracted; 0 gives the wrapped model exactly.
        relative_top: Tokens that the wrapped model finds less likely than this share of its likeliest (and
            that are not among this share of the vocabulary) keep their logit where text is scored, and are
            excluded from generation. None combines all tokens.
    """

    models: ClassVar[int] = 2
    alpha: float = 1.0
    relative_top: float | None = 0.1

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0, math.inf)
        if self.relative_top is not None:
            check_range("relative_top", self.relative_top, 0, 1, open_low=True)

    def logits(self, *logits: AnyLogits, generating: bool = False) -> AnyLogits:
        """Target minus alpha times assistant."""
        target, assistant = logits
        if self.alpha == 0:
            return target
        excluded = "exclude" if generating else "keep"
        return logit_difference(target, assistant, self.alpha, self.relative_top, excluded)


@dataclass(frozen=True)
class Reinforced:
    """Lower what a further trained model raises ("Who's Harry Potter?").

    Attributes:
        alpha: How much of the rise is subtracted.
    """

    models: ClassVar[int] = 2
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0, math.inf)

    def logits(self, *logits: AnyLogits, generating: bool = False) -> AnyLogits:
        """Base minus alpha times what the reinforced model has above it."""
        base, reinforced = logits
        return whp_logits(base, reinforced, self.alpha)


@dataclass(frozen=True)
class Offset:
    """Add what unlearning changed in a smaller model (offset unlearning): wrapped, tuned, untuned.

    Attributes:
        weight: Of the change.
    """

    models: ClassVar[int] = 3
    weight: float = 1.0

    def logits(self, *logits: AnyLogits, generating: bool = False) -> AnyLogits:
        """Target plus the change of the small model."""
        target, tuned, untuned = logits
        return offset_logits(target, tuned, untuned, self.weight)


def combined(inner: nn.Module, others: Sequence[nn.Module], combination: Combination) -> nn.Module:
    """One causal model out of several; they are used, not copied.

    Hidden states and attentions are those of the wrapped model, which is found as `inner` (the others as
    `others`): whoever holds the result can take it out.

    Args:
        inner: The model that is wrapped; its configuration becomes that of the result.
        others: The other models, in the order that the combination takes them.
        combination: How logits are combined.

    Raises:
        MissingDependency: Without transformers.
        InvalidHyperparameter: If the combination takes another number of models.
        ModelMismatch: If the models are not Hugging Face causal models of one vocabulary.
    """
    if 1 + len(others) != combination.models:
        raise InvalidHyperparameter(
            f"{type(combination).__name__} combines {combination.models} models, not {1 + len(others)}."
        )
    sizes = [vocabulary_of(model) for model in (inner, *others)]
    if len(set(sizes)) > 1:
        raise ModelMismatch(
            f"Models can be combined token by token only if they share a vocabulary, not {sizes}."
        )
    try:
        from palimpsest.forget.language._combined_model import CombinedModel
    except ImportError as missing:
        raise MissingDependency("transformers", "language") from missing
    return CombinedModel(inner, others, combination)


def vocabulary_of(model: nn.Module) -> int:
    """Number of tokens that a causal model gives logits for.

    Raises:
        ModelMismatch: If it is no Hugging Face model with a head over tokens.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not hasattr(model, "config"):
        raise ModelMismatch(
            f"{type(model).__name__} is no Hugging Face causal model: it has no configuration or no output head."
        )
    return int(head.weight.shape[0])
