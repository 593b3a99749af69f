"""Digits with 15 % random labels, which a network can only memorise: membership is there to be found."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import palimpsest as pal
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import unlearner
from palimpsest.models import build_model
from palimpsest.parts.training import TrainingRecipe, fit

RECIPE = TrainingRecipe(epochs=60, lr=3e-3, batch_size=32)


def noisy_digits(seed: int = 0, count: int = 1797) -> pal.Records:
    random = np.random.default_rng(seed)
    digits = pal.load_data("digits").select(random.permutation(1797)[:count])
    images = digits.tensors["input"]
    labels = digits.column("label").copy()
    wrong = random.random(count) < 0.15
    labels[wrong] = random.integers(0, 10, wrong.sum())
    return pal.Records(TensorDataset(images, torch.from_numpy(labels)))


def small_mlp(seed: int = 0) -> nn.Module:
    return build_model("mlp", (1, 8, 8), 10, seed=seed, width=128, depth=1)


@unlearner("test-identity", needs={Need.MODEL})
@dataclass(frozen=True)
class Identity:
    """Return a copy."""

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        return copy.deepcopy(model)


@unlearner("test-retain-tuning", needs={Need.MODEL, Need.RETAIN_DATA})
@dataclass(frozen=True)
class RetainTuning:
    """Train on with the retained records only."""

    epochs: int = 60

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        recipe = TrainingRecipe(epochs=self.epochs, lr=3e-3, batch_size=32)
        return fit(copy.deepcopy(model), split.retain, task, runtime, recipe)
