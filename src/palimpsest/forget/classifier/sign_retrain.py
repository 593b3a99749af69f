"""Retraining by the sign of the gradient: the exact lower level of the search for worst-case forget sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import nn

from palimpsest.core.errors import MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import unlearner
from palimpsest.forget.classifier.sign_finetune import PAPER, Mode, check_sign_settings, descend_by_sign
from palimpsest.parts.reinitialise import reinitialised


@unlearner(
    "sign-retrain",
    needs={Need.MODEL, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    paper=PAPER,
    search={"lr": Span(1e-4, 3e-3, log=True), "epochs": Span(2, 10, integer=True)},
)
@dataclass(frozen=True)
class SignRetrain:
    """Train fresh weights on the retained records by the sign of the gradient.

    `sign-finetune` from a random start: every module is initialised anew (checked: no trained parameter
    survives), so nothing of the forget records is left, whatever else is said of the result. As a method
    of its own prefer `retrain`, which repeats the original training; this one is the lower level of
    `palimpsest worst-case` that is exact unlearning and still needs no implicit gradient. It costs a
    training per upper step, and needs a larger upper learning rate than `sign-finetune`, or more steps,
    since the losses of a short training differ less from record to record.

    With weights, records of weight 1 run through the network too and enter batch norm's statistics in
    training mode, as in the published code; given a request, they do not.

    Attributes:
        lr: Length of a step in every parameter.
        epochs: Passes over the records.
        batch_size: Records per step.
        mode: "train", or "eval" to leave batch norm's fresh statistics and dropout alone.
    """

    lr: float = 1e-3
    epochs: int = 10
    batch_size: int = 64
    mode: Mode = "train"

    def __post_init__(self) -> None:
        check_sign_settings(self.lr, self.epochs, self.batch_size, self.mode)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A model that never saw the forget records.

        Raises:
            MissingNeed: If the retained records are not at hand.
            NonFiniteLoss: If training diverges.
        """
        if split.retain is None:
            raise MissingNeed("Sign-gradient retraining needs the retained records.")
        return self.unlearn_weighted(model, split.retain, np.zeros(len(split.retain)), task, runtime)

    def unlearn_weighted(
        self,
        model: nn.Module,
        records: Records,
        weights: Sequence[float] | Float[np.ndarray, " records"],
        task: Task,
        runtime: Runtime,
    ) -> nn.Module:
        """Fresh weights, trained on all records by 1 minus their weights (1: to be forgotten)."""
        fresh = runtime.place(reinitialised(model, runtime))
        return descend_by_sign(
            fresh, records, weights, task, runtime, self.lr, self.epochs, self.batch_size, self.mode
        )
