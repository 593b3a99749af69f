"""Loss-free Selective Synaptic Dampening: SSD with importances that need no label and no loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, unlearner
from palimpsest.forget.classifier.ssd import check_dampening, dampen_model, full_importance
from palimpsest.parts.importance import Importance, Measure, measure_importance


@unlearner(
    "lfssd",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    paper=Paper("Loss-Free Machine Unlearning", "ICLR 2024 Tiny Papers", "2402.19308"),
    search={"alpha": Span(1, 100, log=True), "dampening": Span(0.1, 1)},
)
@dataclass(frozen=True)
class LFSSD:
    """Dampen the parameters to which the outputs for the forget set are most sensitive; no labels.

    As SSD, with the diagonal Fisher replaced by the mean absolute gradient of ||f(x)||^2, the squared
    norm of the outputs. Use it when the labels of the forget records are lost or must not be looked at.
    Magnitudes instead of squares make the ratios smaller, so a smaller alpha selects as much: with
    "per-sample" averaging it is bounded by |D| / |D_f| again, and 2 to 3 suits the digits.

    Deviations: the pass over D is shuffled by default (`shuffle`), as in SSD.

    Attributes:
        alpha: Selection weighting, above 0.
        dampening: Dampening constant (lambda), at least 0; 0 sets selected parameters to zero.
        sensitivity: "batch-mean" (the published code) takes gradients of batch means, "per-sample" of
            every example.
        batch_size: Of both passes; part of the definition with "batch-mean".
        shuffle: Whether the pass over the full training set is shuffled.
        full_importance: Importances of the full training set measured before, or a file of them; then the
            retained data are not needed.
    """

    alpha: float = 10.0
    dampening: float = 1.0
    sensitivity: Literal["batch-mean", "per-sample"] = "batch-mean"
    batch_size: int = 64
    shuffle: bool = True
    full_importance: Importance | str | Path | None = None

    def __post_init__(self) -> None:
        check_dampening(self.alpha, self.dampening)
        if self.sensitivity not in ("batch-mean", "per-sample"):
            raise InvalidHyperparameter(
                f"sensitivity must be 'batch-mean' or 'per-sample', not {self.sensitivity!r}."
            )
        _ = self.measure

    @property
    def measure(self) -> Measure:
        """How importances are measured."""
        return Measure("output", self.sensitivity, self.batch_size, self.shuffle)

    @property
    def supplies(self) -> frozenset[Need]:
        """Stored importances stand for the retained data."""
        return frozenset({Need.RETAIN_DATA} if self.full_importance is not None else ())

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model with dampened parameters; no label is read.

        Raises:
            MissingNeed: If neither retained records nor stored importances are at hand.
            ModelMismatch, NonFinite: If stored importances do not fit, or outputs are no tensor.
        """
        student = runtime.place(copy.deepcopy(model))
        full = full_importance(student, self.full_importance, self.measure, split, task, runtime)
        in_order = Measure("output", self.sensitivity, self.batch_size, shuffle=False)
        forget = measure_importance(student, split.forget, task, runtime, in_order)
        return dampen_model(student, full, forget, self.alpha, self.dampening)
