"""Retraining from scratch without the forget records: the gold standard that all is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from palimpsest.core.errors import MissingNeed
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import unlearner
from palimpsest.parts.reinitialise import fresh_start
from palimpsest.parts.training import TrainingRecipe, fit, recipe_of


@unlearner("retrain", needs={Need.MODEL, Need.RETAIN_DATA, Need.TRAINING_RECIPE})
@dataclass(frozen=True)
class Retrain:
    """Train a fresh model on the retained records only.

    Every module is initialised anew (checked: no trained parameter survives) and trained with the
    original recipe; a pretrained language model starts from its pretrained weights again. This is exact
    unlearning at full cost, and the control of every audit.

    Attributes:
        recipe: How to train; by default the recipe that `palimpsest.train` recorded on the model.
    """

    recipe: TrainingRecipe | None = None

    @property
    def supplies(self) -> frozenset[Need]:
        """Needs that the settings meet by themselves."""
        return frozenset({Need.TRAINING_RECIPE} if self.recipe else ())

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A model that never saw the forget records."""
        recipe = self.recipe or recipe_of(model)
        if recipe is None or split.retain is None:
            raise MissingNeed("Retraining needs the retained records and a training recipe.")
        return fit(fresh_start(model, runtime), split.retain, task, runtime, recipe)
