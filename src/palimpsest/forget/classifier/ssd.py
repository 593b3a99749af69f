"""Selective Synaptic Dampening: shrink the weights that matter more to the forget set than to the rest."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch, NonFinite
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.importance import Importance, squared_gradients


@unlearner(
    "ssd",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA},
    paper=Paper(
        "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
        "AAAI 2024",
        "2308.07707",
    ),
)
@dataclass(frozen=True)
class SSD:
    """Dampen the parameters that the forget set uses disproportionately; no training at all.

    Two passes of diagonal Fisher information, over the full training set D (forget records included) and
    over the forget set; then every parameter with I_forget > alpha * I_full is multiplied by
    min(dampening * I_full / I_forget, 1). Use it when requests must be answered in seconds; it can
    collapse on some classes, so audit it.

    Which alpha suits depends on the Fisher: with per-sample squares I_forget / I_full <= |D| / |D_f|,
    so an alpha above that selects nothing; with batch means of shuffled batches the ratio can be far
    larger (card `ssd`). The default pass over D is shuffled.

    Attributes:
        alpha: Selection weighting, above 0.
        dampening: Dampening constant (lambda), at least 0; 0 sets selected parameters to zero.
        fisher: "batch-mean" (the published code) or "per-sample".
        batch_size: Of both passes; part of the definition with "batch-mean".
        shuffle: Whether the pass over D is shuffled. The published code reads class after class in
            class forgetting, which selects fewer parameters at the same alpha.
        full_importance: Importances of D computed at training time; then the retained data are not needed.
    """

    alpha: float = 10.0
    dampening: float = 1.0
    fisher: Literal["batch-mean", "per-sample"] = "batch-mean"
    batch_size: int = 64
    shuffle: bool = True
    full_importance: Importance | None = None

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0, float("inf"), open_low=True)
        check_range("dampening", self.dampening, 0, float("inf"))
        if self.fisher not in ("batch-mean", "per-sample"):
            raise InvalidHyperparameter(f"fisher must be 'batch-mean' or 'per-sample', not {self.fisher!r}.")

    @property
    def supplies(self) -> frozenset[Need]:
        """Stored importances stand for the retained data."""
        return frozenset({Need.RETAIN_DATA} if self.full_importance is not None else ())

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model with dampened parameters."""
        student = runtime.place(copy.deepcopy(model))
        full = self.full_importance
        if full is None:
            if split.retain is None:
                raise MissingNeed(
                    "SSD needs the retained records, or full_importance computed from them before."
                )
            order = runtime.generator("ssd order") if self.shuffle else None
            batches = runtime.batches(split.train, task, self.batch_size, shuffle=order)
            full = squared_gradients(student, batches, task, self.fisher)
        batches = runtime.batches(split.forget, task, self.batch_size)
        forget = squared_gradients(student, batches, task, self.fisher)
        parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        check_importance(full, parameters)
        with torch.no_grad():
            for name, dampened in dampen(parameters, full, forget, self.alpha, self.dampening).items():
                parameters[name].copy_(dampened)
        return student


def dampen(
    parameters: dict[str, Tensor], full: Importance, forget: Importance, alpha: float, dampening: float
) -> dict[str, Tensor]:
    """Equations 5 and 6: parameters after selection and dampening, by name, each of its own shape.

    Args:
        parameters: Before.
        full: Importance for the full training set.
        forget: Importance for the forget set.
        alpha: A parameter is selected if forget > alpha * full (strictly).
        dampening: Selected ones are multiplied by min(dampening * full / forget, 1).
    """
    after: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        selected = forget[name] > alpha * full[name]
        factor = (dampening * full[name] / torch.where(selected, forget[name], 1.0)).clamp(max=1.0)
        after[name] = torch.where(selected, parameter * factor, parameter)
    return after


def check_importance(importance: Importance, parameters: dict[str, Tensor]) -> None:
    """Check that importances fit the parameters.

    Raises:
        ModelMismatch: If names or shapes differ.
        NonFinite: If a value is NaN or Inf.
    """
    if not parameters:
        raise ModelMismatch("The model has no trainable parameters to dampen.")
    for name, parameter in parameters.items():
        if name not in importance or importance[name].shape != parameter.shape:
            raise ModelMismatch(f"The stored importances do not fit the model at parameter '{name}'.")
        if not torch.isfinite(importance[name]).all():
            raise NonFinite(f"The stored importances of '{name}' hold NaN or Inf.")
