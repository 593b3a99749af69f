"""The lower level: unlearning with given weights, and the losses of what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from palimpsest.core.errors import NonFiniteLoss
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Unlearner
from palimpsest.forget import forget
from palimpsest.parts.record_weights import row_finder
from palimpsest.study.worst_case.items import Items
from palimpsest.study.worst_case.selection import top

BY_SIGNS = ("sign-finetune", "sign-retrain")
"""Methods whose result does not depend on the weights to first order."""


@runtime_checkable
class Weighted(Protocol):
    """A method that can forget by degrees: it takes one weight per record, 1 for those to be forgotten."""

    def unlearn_weighted(
        self,
        model: nn.Module,
        records: Records,
        weights: Sequence[float] | Float[np.ndarray, " records"],
        task: Task,
        runtime: Runtime,
    ) -> nn.Module:
        """A new model; never changes the one it is given."""
        ...


@dataclass(frozen=True)
class LowerLevel:
    """Unlearning with given weights: always from the original model."""

    model: nn.Module
    records: Records
    task: Task
    method: Unlearner
    items: Items
    m: int

    def unlearn(self, w: Float[np.ndarray, " items"], runtime: Runtime) -> nn.Module:
        """theta_u(w): from w itself if the method takes weights, else from its top-m set."""
        if isinstance(self.method, Weighted):
            weights = w[self.items.of_record]
            return self.method.unlearn_weighted(self.model, self.records, weights, self.task, runtime)
        return forget(self.model, self.split(w), self.method, self.task, runtime=runtime)

    def split(self, w: Float[np.ndarray, " items"]) -> ForgetSplit:
        """The top-m set of w as a request."""
        gone = self.items.records_of(top(w, self.m))
        return ForgetSplit(self.records.select(gone), self.records.select(~gone), description="the top m")


def record_losses(
    model: nn.Module, records: Records, task: Task, runtime: Runtime, mode: str = "eval"
) -> Float[np.ndarray, " records"]:
    """Loss of every record, in the order of the records.

    Args:
        model: Its modes are restored; in mode "train" batch norm's running statistics move.
        records: To read.
        task: The domain.
        runtime: Seed (of dropout, in mode "train") and device.
        mode: "eval", or "train": batch norm normalises by the batch, dropout drops.

    Raises:
        NonFiniteLoss: If a loss is NaN or Inf, naming records.
    """
    rows, losses = row_finder(records), torch.zeros(len(records), dtype=torch.float64)
    size = runtime.batch_size
    while mode == "train" and len(records) > 1 and len(records) % size == 1:
        size += 1  # batch norm has no statistics of a single record
    model = runtime.place(model)
    with torch.no_grad(), evaluating(model), runtime.seeded("worst-case losses"):
        model.train(mode == "train")
        for batch in runtime.batches(records, task, size):
            found = task.loss_per_example(model, batch).double().cpu()
            if not torch.isfinite(found).all():
                bad = [name for name, ok in zip(batch["id"], torch.isfinite(found), strict=True) if not ok]
                raise NonFiniteLoss(f"The unlearned model's loss is NaN or Inf on records {bad[:3]}.")
            losses[rows(batch).cpu()] = found
    return losses.numpy()
