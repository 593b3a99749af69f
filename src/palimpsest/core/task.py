"""Task: all that differs between domains, behind a few calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.records import Batch, Records


@dataclass(frozen=True)
class Observation:
    """What one forward pass showed of a batch.

    Attributes:
        logits: The model's outputs, [batch, ...]; of language models, whose outputs over a whole vocabulary
            would not fit into memory, the log-probabilities of the labelled tokens, [batch, tokens].
        loss: Loss per example, [batch].
        features: Representation right before the head, [batch, dim]; None where no layer can be seen.
        layers: Pooled activations of inner layers in the order of execution, each [batch, dim].
        tokens: Measurements per token of language models, each [batch, tokens], 0 beyond the end.
    """

    logits: Tensor
    loss: Float[Tensor, " batch"]
    features: Float[Tensor, "batch dim"] | None = None
    layers: dict[str, Float[Tensor, "batch dim"]] = field(default_factory=dict[str, Tensor])
    tokens: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@runtime_checkable
class Task(Protocol):
    """A domain. A method that uses only these calls works in every domain.

    `logits` and `loss_per_example` keep the graph, so that methods can differentiate them; `observe`
    is the one pass that audits share.
    """

    @property
    def name(self) -> str:
        """Short name of the domain ("classification", ...)."""
        ...

    def collate(self, items: Sequence[dict[str, Any]]) -> Batch:
        """Make a batch from records."""
        ...

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's outputs for a batch, [batch, ...]."""
        ...

    def loss_of_logits(self, logits: Tensor, batch: Batch) -> Float[Tensor, " batch"]:
        """Loss per example, given the outputs."""
        ...

    def loss_per_example(self, model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """Loss per example, [batch]."""
        ...

    def features(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch dim"]:
        """Representation right before the head, [batch, dim]."""
        ...

    def observe(self, model: nn.Module, batch: Batch) -> Observation:
        """Logits, losses, features and layers of a batch in one forward pass, without gradients."""
        ...

    def check(self, model: nn.Module, records: Records, labels: bool = True) -> None:
        """Raise if the model's outputs or the records do not fit the task; labels may be left out."""
        ...
