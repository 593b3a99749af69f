"""Measurements for the claims of influence approximation unlearning."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from palimpsest.core.errors import InvalidRecords, MissingNeed
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.forget import forget
from palimpsest.parts.gradients import length, mean_gradient
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.parts.training import fit, recipe_of
from palimpsest.study.claims.measuring import Setting, measurement

DECAY = 1e-2
"""L2 regularisation of the logistic regression: DECAY / 2 * ||theta||^2 is added to the mean loss."""
FORGOTTEN = 0.15
"""A class counts as forgotten below this accuracy on its test records."""
Optimizer = Literal["adam", "sgd"]
LEARNING_RATES: dict[Optimizer, tuple[float, ...]] = {
    "adam": (1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 7e-3, 1e-2),
    "sgd": (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0),
}
"""Searched from small to large."""


@measurement("iau.optimizer-steps")
def optimizer_steps(setting: Setting) -> float:
    """How many optimiser steps the method takes, counted by torch."""
    steps: list[torch.optim.Optimizer] = []

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.append(optimizer)

    handle = register_optimizer_step_pre_hook(count)
    try:
        forget(setting.original, setting.split, "iau", setting.task, runtime=setting.runtime)
    finally:
        handle.remove()
    return float(len(steps))


@measurement("iau.correction-gain-adam")
def correction_gain_adam(setting: Setting) -> float:
    """Test accuracy on kept classes with the correction minus without, at Adam's first rate that forgets."""
    return _correction_gain(setting, "adam")


@measurement("iau.correction-gain-sgd")
def correction_gain_sgd(setting: Setting) -> float:
    """The same for plain SGD."""
    return _correction_gain(setting, "sgd")


@measurement("iau.correction-gain-ten-steps")
def correction_gain_ten_steps(setting: Setting) -> float:
    """The same for ten steps of Adam at a tenth of the rates."""
    return _correction_gain(setting, "adam", steps=10)


@measurement("iau.convex-cosine")
def convex_cosine(setting: Setting) -> float:
    """Cosine of the plain gradient step with the way from the optimum to the retrained optimum."""
    convex = Convex(setting)
    return _cosine(convex.step("sgd", 1.0), convex.way)


@measurement("iau.convex-cosine-adam")
def convex_cosine_adam(setting: Setting) -> float:
    """The same for the step of a fresh Adam, which is nearly a sign."""
    convex = Convex(setting)
    return _cosine(convex.step("adam", 1e-3), convex.way)


@measurement("iau.convex-shortening")
def convex_shortening(setting: Setting) -> float:
    """Share of the distance to the retrained optimum that the best step along the direction saves."""
    convex = Convex(setting)
    direction = convex.step("sgd", 1.0)
    best = (direction @ convex.way) / (direction @ direction) * direction
    return 1 - float((convex.way - best).norm() / convex.way.norm())


@measurement("iau.influence-rise")
def influence_rise(setting: Setting) -> float:
    """Rise of the mean forget loss of a logistic regression by the exact influence step H^-1 g / n."""
    convex = Convex(setting)
    return convex.rise(convex.influence_step())


@measurement("iau.step-rise")
def step_rise(setting: Setting) -> float:
    """The same by the method's plain gradient step, made as long as the influence step."""
    convex = Convex(setting)
    lr = float(convex.influence_step().norm() / convex.step("sgd", 1.0).norm())
    return convex.rise(convex.step("sgd", lr))


@measurement("iau.restriction-mean-ratio")
def restriction_mean_ratio(setting: Setting) -> float:
    """Mean length of single training records' gradients, with gradient restriction over without."""
    restricted, plain = (_gradient_lengths(model, setting) for model in _restricted_and_plain(setting))
    return float(restricted.mean() / plain.mean())


@measurement("iau.restriction-tail-ratio")
def restriction_tail_ratio(setting: Setting) -> float:
    """The same for the 99th percentile."""
    restricted, plain = (_gradient_lengths(model, setting) for model in _restricted_and_plain(setting))
    return float(np.quantile(restricted, 0.99) / np.quantile(plain, 0.99))


@measurement("iau.restriction-accuracy-gain")
def restriction_accuracy_gain(setting: Setting) -> float:
    """Test accuracy with gradient restriction minus without."""
    restricted, plain = (_accuracies(model, setting)[0] for model in _restricted_and_plain(setting))
    return restricted - plain


class Convex:
    """A regularised logistic regression on a request's records, at its optimum before and after.

    Args:
        setting: Whose split and task are used; its model is not.
    """

    def __init__(self, setting: Setting):
        self.split, self.task, self.runtime = setting.split, setting.task, setting.runtime
        start = _Logistic(self.split.train, setting.runtime)
        self.model = _optimum(start, self.split.train, self.task, self.runtime)
        retrained = _optimum(start, _retained(self.split), self.task, self.runtime)
        self.way = _flat(retrained) - _flat(self.model)

    def step(self, optimizer: Optimizer, lr: float) -> Tensor:
        """How the method moves the parameters."""
        after = forget(
            self.model, self.split, "iau", self.task, runtime=self.runtime, lr=lr, optimizer=optimizer
        )
        return _flat(after) - _flat(self.model)

    def influence_step(self) -> Tensor:
        """H^-1 g / n: Hessian H of the regularised mean loss over all n records, summed forget gradient g."""
        everything = _batch(self.split.train, self.task, self.runtime)
        gone = mean_gradient(self.model, self.runtime.batches(self.split.forget, self.task), self.task)
        summed = len(self.split.forget) * torch.cat([part.flatten() for part in gone.values()])
        parameters = list(self.model.parameters())
        loss = _regularised(self.model, everything, self.task)
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        rows = [
            torch.cat([part.flatten() for part in torch.autograd.grad(one, parameters, retain_graph=True)])
            for one in torch.cat([part.flatten() for part in first])
        ]
        return torch.linalg.solve(torch.stack(rows), summed) / len(self.split.train)

    def rise(self, step: Tensor) -> float:
        """By how much a step raises the mean loss of the forget records."""
        batch = _batch(self.split.forget, self.task, self.runtime)
        moved = copy.deepcopy(self.model)
        nn.utils.vector_to_parameters(_flat(self.model) + step, moved.parameters())
        with torch.no_grad():
            before, after = (self.task.loss_per_example(model, batch).mean() for model in (self.model, moved))
        return float(after - before)


class _Logistic(nn.Module):
    """Multinomial logistic regression in double precision, all parameters zero."""

    def __init__(self, records: Records, runtime: Runtime):
        super().__init__()
        classes = int(records.column("label").max()) + 1
        self.head = nn.Linear(records[0]["input"].numel(), classes, dtype=torch.float64)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        runtime.place(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(x.flatten(1).double())


def _optimum(start: nn.Module, records: Records, task: Task, runtime: Runtime) -> nn.Module:
    """The minimum of the regularised mean loss, by L-BFGS."""
    model, batch = copy.deepcopy(start), _batch(records, task, runtime)
    solver = torch.optim.LBFGS(
        model.parameters(), max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        solver.zero_grad()
        loss = _regularised(model, batch, task)
        loss.backward()
        return float(loss.detach())

    solver.step(closure)
    return model


def _regularised(model: nn.Module, batch: Batch, task: Task) -> Tensor:
    squares = torch.stack([parameter.square().sum() for parameter in model.parameters()])
    return task.loss_per_example(model, batch).mean() + DECAY / 2 * squares.sum()


def _batch(records: Records, task: Task, runtime: Runtime) -> Batch:
    """All records as one batch."""
    return next(runtime.batches(records, task, len(records)))


def _flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def _cosine(one: Tensor, two: Tensor) -> float:
    return float(one @ two / (one.norm() * two.norm()))


def _correction_gain(setting: Setting, optimizer: Optimizer, steps: int = 1) -> float:
    """Minus infinity if no rate forgets: then nothing was shown."""
    for lr in LEARNING_RATES[optimizer]:
        kept, gone = _accuracies(_stepped(setting, optimizer, lr / steps, steps, True), setting)
        if gone <= FORGOTTEN:
            return kept - _accuracies(_stepped(setting, optimizer, lr / steps, steps, False), setting)[0]
    return float("-inf")


def _stepped(setting: Setting, optimizer: Optimizer, lr: float, steps: int, correction: bool) -> nn.Module:
    return forget(
        setting.original, setting.split, "iau", setting.task, runtime=setting.runtime,
        optimizer=optimizer, lr=lr, steps=steps, correction=correction,
    )  # fmt: skip


@torch.no_grad()
def _accuracies(model: nn.Module, setting: Setting) -> tuple[float, float]:
    """Test accuracy on kept classes and on those forgotten as a whole (NaN if there is none)."""
    test = setting.split.test
    if test is None:
        raise InvalidRecords("The claim needs test records.")
    batch = _batch(test, setting.task, setting.runtime)
    predicted = setting.task.logits(model, batch).argmax(1).cpu().numpy()
    right, gone = predicted == test.column("label"), setting.split.like_forgotten(test)
    return float(right[~gone].mean()), float(right[gone].mean()) if gone.any() else float("nan")


def _restricted_and_plain(setting: Setting) -> tuple[nn.Module, nn.Module]:
    """Two models from one start: trained as the original was, and without its gradient restriction."""
    recipe = recipe_of(setting.original)
    if recipe is None or recipe.gradient_restriction == 0:
        raise MissingNeed("The claim needs an original that was trained with gradient restriction.")
    start = reinitialised(setting.original, setting.runtime)
    restricted, plain = (
        fit(copy.deepcopy(start), setting.split.train, setting.task, setting.runtime, how)
        for how in (recipe, replace(recipe, gradient_restriction=0.0))
    )
    return restricted, plain


def _gradient_lengths(model: nn.Module, setting: Setting) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Length of every training record's own gradient, [records]."""
    singles = setting.runtime.batches(setting.split.train, setting.task, 1)
    return np.array([length(mean_gradient(model, [single], setting.task)) for single in singles])


def _retained(split: ForgetSplit) -> Records:
    if split.retain is None:
        raise MissingNeed("The claim needs retained records.")
    return split.retain
