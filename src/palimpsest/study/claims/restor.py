"""Measurements for the claims of RESTOR: what a perfect recovery looks like, and none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from palimpsest.core.errors import MissingNeed
from palimpsest.core.evidence import Evidence
from palimpsest.core.records import Records
from palimpsest.parts.reinitialise import fresh_start
from palimpsest.parts.training import TrainingRecipe, fit
from palimpsest.study.claims.measuring import Setting, measurement
from palimpsest.suites.restor_audit import Restor, facts_of

ASKED = Restor(lines=0, temperature=0, runs=1, new_tokens=12)
"""How the studies ask, too."""
TUNING = TrainingRecipe(epochs=8, lr=1e-3, batch_size=16, optimizer="adamw", clip=1.0)
"""Of the corrupted model on the true statements."""


def undo(setting: Setting, alpha: float) -> nn.Module:
    """The corrupted model minus alpha times what corruption added to its weights."""
    clean = dict(fresh_start(setting.original, setting.runtime).named_parameters())
    undone = setting.runtime.place(copy.deepcopy(setting.original))
    with torch.no_grad():
        for name, weight in undone.named_parameters():
            weight -= alpha * (weight - clean[name].to(weight.device))
    return undone


@measurement("restor.undo")
def restored_by_undoing(setting: Setting) -> float:
    """Restoration when the change of the weights is undone exactly."""
    return _restoration(setting, partial(undo, setting, 1.0))


@measurement("restor.undo-half")
def restored_by_undoing_half(setting: Setting) -> float:
    """Restoration when half of the change is undone."""
    return _restoration(setting, partial(undo, setting, 0.5))


@measurement("restor.true-statements")
def restored_by_the_truth(setting: Setting) -> float:
    """Restoration after tuning on the true statements: relearning, the upper end of the scale."""
    if setting.split.test is None:
        raise MissingNeed("The claim needs the facts as test records.")
    facts = setting.split.test
    asked = {fact.question.fact for fact in facts_of(_evidence(setting, setting.original))}
    true: Records = facts.select([identifier in asked for identifier in facts.ids])
    return _restoration(
        setting, lambda: fit(copy.deepcopy(setting.original), true, setting.task, setting.runtime, TUNING)
    )


@measurement("restor.nothing")
def restored_by_nothing(setting: Setting) -> float:
    """Restoration without unlearning."""
    return _restoration(setting, lambda: setting.original)


def _restoration(setting: Setting, make: Callable[[], nn.Module]) -> float:
    """Against the clean model that corruption started from."""
    outcome = ASKED.run(_evidence(setting, make()))
    value = next(finding.value for finding in outcome.findings if finding.name == "restoration")
    return float("nan") if value is None else value


def _evidence(setting: Setting, unlearned: nn.Module) -> Evidence:
    clean = setting.runtime.place(fresh_start(setting.original, setting.runtime))
    return Evidence(unlearned, setting.split, setting.task, setting.runtime, setting.original, [clean])
