"""Several language models answering as one: their next-token logits combined, to score text and to generate alike.

Used by unlearning from logit difference (ULD), by "Who's Harry Potter?" and for offsets: `forward` combines at
every position, and `generate` is that of transformers (greedy, sampling, beams, batches with padding on the
left), with keys and values of every model kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.unlearner import check_range
from palimpsest.forget.language.wrapped import Call, Wrapped, ask, logits_beside
from palimpsest.parts.logit_combination import AnyLogits, logit_difference, offset_logits, whp_logits
from palimpsest.parts.tokens import token_mean


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


class Combined(Wrapped):
    """One causal model out of several; they are used, not copied.

    Hidden states and attentions are those of the wrapped model, which is found as `inner` (the others as
    `others`): whoever holds the result can take it out.

    Args:
        inner: The model that is wrapped; its configuration is that of the result.
        others: The other models, in the order that the combination takes them.
        combination: How logits are combined.

    Raises:
        InvalidHyperparameter: If the combination takes another number of models.
        ModelMismatch: If the models are no Hugging Face causal models, or of different vocabularies.
    """

    def __init__(self, inner: nn.Module, others: Sequence[nn.Module], combination: Combination):
        super().__init__(inner)
        if 1 + len(others) != combination.models:
            raise InvalidHyperparameter(
                f"{type(combination).__name__} combines {combination.models} models, not {1 + len(others)}."
            )
        sizes = [vocabulary_of(model) for model in (inner, *others)]
        if len(set(sizes)) > 1:
            raise ModelMismatch(
                f"Models can be combined token by token only if they share a vocabulary, not {sizes}."
            )
        self.combination = combination
        self.names = tuple(f"beside_{number}" for number in range(len(others)))
        for name, model in zip(self.names, others, strict=True):
            self.add_module(name, model)
        self.train(inner.training)

    @property
    def others(self) -> list[nn.Module]:
        """The models that are combined with the wrapped one."""
        return [self.get_submodule(name) for name in self.names]

    def answer(self, call: Call) -> Any:
        """The wrapped model's output with combined logits, and the loss that follows from them."""
        further = dict(call.further)
        labels = further.pop("labels", None)
        call = call.change(further=further)
        output = ask(self.inner, call)
        beside = [logits_beside(self.get_submodule(name), call, name) for name in self.names]
        output["logits"] = self.combination.logits(output.logits, *beside, generating=call.generating)
        if labels is not None:
            output["loss"] = token_mean(output["logits"], labels)
        return output


def vocabulary_of(model: nn.Module) -> int:
    """Number of tokens that a causal model gives logits for.

    Raises:
        ModelMismatch: If it is no Hugging Face model with a head over tokens.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(model, "config", None) is None:
        raise ModelMismatch(
            f"{type(model).__name__} is no Hugging Face causal model: it has no configuration or no output head."
        )
    return int(head.weight.shape[0])
