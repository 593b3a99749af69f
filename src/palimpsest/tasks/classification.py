"""Classification: one label per record, one logit per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from palimpsest.core.errors import InvalidLabels, ModelMismatch
from palimpsest.core.records import Batch, Records
from palimpsest.core.task import Observation
from palimpsest.parts.activations import capture, features_with_graph
from palimpsest.tasks._checking import check_inputs, first_outputs
from palimpsest.tasks.registry import task


@task("classification")
@dataclass(frozen=True)
class Classification:
    """Single-label classification with cross-entropy.

    Works with any model whose output for `batch[input]` is a tensor of logits [batch, classes], or an
    object with a `logits` attribute (Hugging Face image classifiers).

    Attributes:
        classes: Number of classes; by default as many as the model has logits.
        input: Field of a record that the model is given.
        label: Field with the integer label.
        head: Name of the module whose input are the features; by default the last linear layer.
        layers: Names of the layers that representation audits look at; by default the weight layers.
    """

    classes: int | None = None
    input: str = "input"
    label: str = "label"
    head: str | None = None
    layers: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """Short name of the domain."""
        return "classification"

    def collate(self, items: Sequence[dict[str, Any]]) -> Batch:
        """Stack fields; numpy arrays become tensors, integer labels a long tensor."""
        batch: Batch = {
            key: default_collate([item[key] for item in items]) for key in items[0] if key != "id"
        }
        batch["id"] = [item["id"] for item in items]
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Outputs before the softmax, with their graph."""
        output = model(batch[self.input])
        return getattr(output, "logits", output)

    def loss_of_logits(self, logits: Float[Tensor, "batch classes"], batch: Batch) -> Float[Tensor, " batch"]:
        """Cross-entropy per example, in nats."""
        return F.cross_entropy(logits, batch[self.label].long(), reduction="none")

    def loss_per_example(self, model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        """Cross-entropy per example, in nats, with its graph."""
        return self.loss_of_logits(self.logits(model, batch), batch)

    def features(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch dim"]:
        """Input of the head (the penultimate representation), with its graph."""
        return features_with_graph(model, lambda: self.logits(model, batch), self.head)

    @torch.no_grad()
    def observe(self, model: nn.Module, batch: Batch) -> Observation:
        """Logits, losses, features and pooled layers in one forward pass."""
        with capture(model, self.layers, self.head) as seen:
            logits = self.logits(model, batch)
        return Observation(logits, self.loss_of_logits(logits, batch), seen.head_input, dict(seen.layers))

    def check(self, model: nn.Module, records: Records, labels: bool = True) -> None:
        """Check labels, inputs and the model's outputs on a first batch, before any work.

        Raises:
            InvalidLabels: If there are no labels, or they are not integers in [0, classes).
            NonFinite: If inputs hold NaN or Inf.
            ModelMismatch: If outputs are not a finite tensor [batch, classes].
        """
        if not labels:
            records = records.without(self.label)
        batch = records.batch(np.arange(min(8, len(records))), self.collate)
        self._check_fields(batch, labels)
        check_inputs(self.input, batch, records)
        logits = first_outputs(model, batch, self.input, lambda moved: self.logits(model, moved))
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(batch["id"]):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelMismatch(
                f"Classification needs logits of shape [batch, classes]; the model gave {shape} for a batch of "
                f"{len(batch['id'])}."
            )
        if logits.shape[1] < 2:
            raise ModelMismatch(
                f"Classification needs at least 2 classes; the model gives {logits.shape[1]} logit."
            )
        if torch.isnan(logits).any():
            raise ModelMismatch("The model gives NaN logits.")
        if self.classes is not None and logits.shape[1] != self.classes:
            raise ModelMismatch(
                f"The task has {self.classes} classes, the model gives {logits.shape[1]} logits."
            )
        if labels:
            self._check_labels(records, batch, logits.shape[1])

    def _check_fields(self, batch: Batch, labels: bool) -> None:
        for name in (self.input, self.label) if labels else (self.input,):
            if name not in batch:
                kind = InvalidLabels if name == self.label else ModelMismatch
                have = sorted(set(batch) - {"id", "index"})
                role = "label" if name == self.label else "input"
                raise kind(
                    f"Records have no field '{name}' (they have {have}): set Classification({role}=...)."
                )

    def _check_labels(self, records: Records, batch: Batch, classes: int) -> None:
        if records.has_column("label") and self.label == "label":
            labels = records.column("label")
        else:
            labels = torch.as_tensor(batch[self.label]).cpu().numpy()
        if labels.dtype.kind not in "iu":
            raise InvalidLabels(
                f"Labels must be integers, they are {labels.dtype} (the first is {labels[0]!r})."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise InvalidLabels(
                f"Labels run from {low} to {high}; the model knows classes 0 to {classes - 1}."
            )
