"""Checks that tasks share: inputs without NaN, and a model that takes a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import ModelMismatch, NonFinite
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records


def check_inputs(field: str, batch: Batch, records: Records) -> None:
    """Check all inputs that lie in memory, else those of the batch.

    Raises:
        NonFinite: If one holds NaN or Inf, naming the first record.
    """
    tensors = records.tensors
    inputs = tensors[field] if tensors else batch[field]
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and not torch.isfinite(inputs).all():
        finite = torch.isfinite(inputs).flatten(1).all(1)
        names = np.asarray(records.ids, dtype=object)[: len(inputs)][~finite.cpu().numpy()]
        raise NonFinite(f"{len(names)} records hold NaN or Inf inputs, the first with id {names[0]!r}.")


def first_outputs(model: nn.Module, batch: Batch, field: str, run: Callable[[Batch], Any]) -> Any:
    """What the model gives for a batch, wherever it lies, in evaluation mode.

    Args:
        model: To run.
        batch: On any device.
        field: With the inputs, for the message.
        run: From a batch on the model's device to its outputs.

    Raises:
        ModelMismatch: If it fails on it.
    """
    place = next(iter(model.parameters()), torch.empty(0)).device
    moved = {key: value.to(place) if isinstance(value, Tensor) else value for key, value in batch.items()}
    try:
        with torch.no_grad(), evaluating(model):
            return run(moved)
    except (RuntimeError, ValueError, TypeError, IndexError) as problem:
        shape = tuple(batch[field].shape) if isinstance(batch[field], Tensor) else "no tensor"
        raise ModelMismatch(f"The model fails on a batch of shape {shape}: {problem}") from problem
