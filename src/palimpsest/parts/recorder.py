"""Recorder: measures a model while it is trained, and leaves no trace in the training.

A run with a recorder ends in the same weights, bit for bit, as the same run without one. It serves
continual learning (accuracy on every task after every step) and unlearning (on forget and retain records).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.modes import evaluating

T = TypeVar("T")


@contextmanager
def undisturbed(model: nn.Module) -> Generator[nn.Module]:
    """Evaluation mode, and everything as it was after: what training needs is not touched.

    Restored are the mode of every module, buffers (batch-norm statistics), the `grad` of every parameter, and
    the random states of torch (CPU, CUDA), numpy and Python.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    numbers, words = np.random.get_state(), random.getstate()
    for parameter, _ in gradients:
        parameter.grad = None
    devices = sorted({parameter.get_device() for parameter, _ in gradients if parameter.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices), evaluating(model):
            yield model
    finally:
        random.setstate(words)
        np.random.set_state(numbers)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


class Recorder(Generic[T]):
    """Calls a measurement every few steps and keeps what it gave.

    Args:
        measure: Called without arguments; may use the model as it likes, as long as it leaves the parameters.
        every: Steps between measurements.

    Raises:
        InvalidHyperparameter: If `every` is below 1.
    """

    def __init__(self, measure: Callable[[], T], every: int = 1):
        if every < 1:
            raise InvalidHyperparameter(f"Measurements are made every 1 or more steps, not {every}.")
        self.measure, self.every = measure, every
        self.steps: list[int] = []
        self.values: list[T] = []

    def after_step(self, model: nn.Module, step: int) -> None:
        """To be called after every optimiser step, with their number so far."""
        if step % self.every == 0:
            self.now(model, step)

    def now(self, model: nn.Module, step: int) -> None:
        """Measure, unless that was done at this step already (at the end of an epoch, say)."""
        if self.steps and self.steps[-1] == step:
            return
        with undisturbed(model):
            value = self.measure()
        self.steps.append(step)
        self.values.append(value)

    def state_dict(self) -> dict[str, Any]:
        """What was measured, for resuming; values must be plain data."""
        return {"steps": list(self.steps), "values": list(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.steps, self.values = list(state["steps"]), list(state["values"])
