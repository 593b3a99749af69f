"""Selective Synaptic Dampening: shrink the weights that matter more to the forget set than to the rest."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.importance import (
    Importance,
    Measure,
    check_importance,
    measure_importance,
)
from palimpsest.parts.importance_file import load_importance
from palimpsest.parts.parameters import trainable


@unlearner(
    "ssd",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    paper=Paper(
        "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
        "AAAI 2024",
        "2308.07707",
    ),
    search={"alpha": Span(1, 100, log=True), "dampening": Span(0.1, 1)},
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
    larger. No alpha suits every class: over the ten digits (small CNN, one class each) the published 10
    forgets all ten and keeps between 0.17 and 0.97 of the test accuracy on the others; 30 keeps 0.94 or
    more for nine, and forgets eight. A per-sample Fisher wants 2 to 3.

    Deviations: the pass over D is shuffled by default (`shuffle`).

    Attributes:
        alpha: Selection weighting, above 0.
        dampening: Dampening constant (lambda), at least 0; 0 sets selected parameters to zero.
        fisher: "batch-mean" (the published code) or "per-sample".
        batch_size: Of both passes; part of the definition with "batch-mean".
        shuffle: Whether the pass over D is shuffled. The published code reads class after class in
            class forgetting, which selects fewer parameters at the same alpha.
        full_importance: Importances of D measured at training time (`measure_importance`), or a file of
            `save_importance`; then the retained data are not needed. A file says how it was measured and
            is refused if that differs from `fisher`, `batch_size` and `shuffle`.
        forget_importance: Importances of the forget set, likewise, but measured in order
            (`Measure(shuffle=False)`). Measured class by class at training time they answer the request for a
            class without a single pass over records, in a small fraction of a percent of retraining. It is the
            caller's word that they are of this forget set.
    """

    alpha: float = 10.0
    dampening: float = 1.0
    fisher: Literal["batch-mean", "per-sample"] = "batch-mean"
    batch_size: int = 64
    shuffle: bool = True
    full_importance: Importance | str | Path | None = None
    forget_importance: Importance | str | Path | None = None

    def __post_init__(self) -> None:
        check_dampening(self.alpha, self.dampening)
        if self.fisher not in ("batch-mean", "per-sample"):
            raise InvalidHyperparameter(f"fisher must be 'batch-mean' or 'per-sample', not {self.fisher!r}.")
        _ = self.measure

    @property
    def measure(self) -> Measure:
        """How importances are measured."""
        return Measure("loss", self.fisher, self.batch_size, self.shuffle)

    @property
    def supplies(self) -> frozenset[Need]:
        """Stored importances stand for the data that they were measured on."""
        full = STORED if self.full_importance is not None else frozenset()
        return full | ({Need.FORGET_LABELS} if self.forget_importance is not None else frozenset())

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A copy of the model with dampened parameters.

        Raises:
            MissingNeed: If neither retained records nor stored importances are at hand.
            ModelMismatch, NonFinite: If stored importances do not fit.
        """
        student = runtime.place(copy.deepcopy(model))
        full = full_importance(student, self.full_importance, self.measure, split, task, runtime)
        in_order = Measure("loss", self.fisher, self.batch_size, shuffle=False)
        if self.forget_importance is None:
            forget = measure_importance(student, split.forget, task, runtime, in_order)
        else:
            forget = stored_importance(student, self.forget_importance, in_order, runtime)
        return dampen_model(student, full, forget, self.alpha, self.dampening)


STORED = frozenset({Need.RETAIN_DATA, Need.RETAIN_LABELS})
"""What stored importances of the full training set stand for."""


def check_dampening(alpha: float, dampening: float) -> None:
    """Check the two constants.

    Raises:
        InvalidHyperparameter: If alpha is not above 0, or dampening below 0.
    """
    check_range("alpha", alpha, 0, float("inf"), open_low=True)
    check_range("dampening", dampening, 0, float("inf"))


def full_importance(
    model: nn.Module,
    stored: Importance | str | Path | None,
    measure: Measure,
    split: ForgetSplit,
    task: Task,
    runtime: Runtime,
) -> Importance:
    """Importances of the full training set D: the stored ones, checked, or measured now.

    Raises:
        MissingNeed: If there are none and the retained records are not at hand.
        ModelMismatch: If they do not fit the model, or a file was measured otherwise than `measure`.
        NonFinite, UnreadableCheckpoint: If values or the file are damaged.
    """
    if stored is None:
        if split.retain is None:
            raise MissingNeed(
                "Dampening compares with the full training set: pass the retained records, or "
                "full_importance measured before."
            )
        return measure_importance(model, split.train, task, runtime, measure)
    return stored_importance(model, stored, measure, runtime)


def stored_importance(
    model: nn.Module, stored: Importance | str | Path, measure: Measure, runtime: Runtime
) -> Importance:
    """Importances that were measured before, checked.

    Raises:
        ModelMismatch: If they do not fit the model, or a file was measured otherwise than `measure`.
        NonFinite, UnreadableCheckpoint: If values or the file are damaged.
    """
    if isinstance(stored, str | Path):
        path = stored
        stored, measured = load_importance(path)
        if not measure.comparable_with(measured):
            raise ModelMismatch(f"The importances in {path} were measured as {measured}, not as {measure}.")
    check_importance(stored, model)
    return {name: value.to(runtime.torch_device) for name, value in stored.items()}


@torch.no_grad()
def dampen_model(
    model: nn.Module, full: Importance, forget: Importance, alpha: float, dampening: float
) -> nn.Module:
    """Dampen the trainable parameters of a model that the caller owns; tied ones once.

    Raises:
        ModelMismatch, NonFinite: If importances do not fit; nothing is changed then.
    """
    parameters = trainable(model)
    check_importance(full, model, "full")
    check_importance(forget, model, "forget")
    for name, after in dampen(parameters, full, forget, alpha, dampening).items():
        parameters[name].copy_(after)
    return model


def dampen(
    parameters: Mapping[str, Tensor],
    full: Importance,
    forget: Importance,
    alpha: float,
    dampening: float,
    cap: float = 1.0,
) -> dict[str, Tensor]:
    """Equations 5 and 6: parameters after selection and dampening, by name, each of its own shape.

    Args:
        parameters: Before.
        full: Importance for the full training set.
        forget: Importance for the forget set.
        alpha: A parameter is selected if forget > alpha * full (strictly).
        dampening: Selected ones are multiplied by min(dampening * full / forget, cap).
        cap: 1 in the paper, so that no weight grows.
    """
    after: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        selected = forget[name] > alpha * full[name]
        factor = (dampening * full[name] / torch.where(selected, forget[name], 1.0)).clamp(max=cap)
        after[name] = torch.where(selected, parameter * factor, parameter)
    return after
