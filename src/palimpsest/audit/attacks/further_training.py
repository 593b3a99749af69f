"""Go on training every model alike, as it is served, and watch the forget records."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import nn

from palimpsest.audit.attacks.curves import Curve, curve_rows
from palimpsest.audit.attacks.knowledge import Watched, gain, known, measured, not_run
from palimpsest.audit.attacks.tuning import Budget, tune
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.records import Batch
from palimpsest.core.unlearner import check_range
from palimpsest.parts.training import recipe_of

DEFAULT_RATE = 1e-3
"""Learning rate of Adam where neither a rate is given nor a training recipe known."""


@dataclass(frozen=True)
class FurtherTraining:
    """Settings of audits that train every model further.

    Attributes:
        steps: Descent steps.
        every: Measure after every so many steps.
        batch_size: Records per step.
        optimizer: "adam" or "sgd", with `lr`; None takes the recipe that the original was trained with.
        lr: Learning rate; None takes the recipe's, or 0.001 where there is none.
        limit: At most this many forget records are measured.
        share: Of the recipe's learning rate, where that is taken: its peak was meant for a start with warm-up.
    """

    steps: int = 40
    every: int = 4
    batch_size: int = 16
    optimizer: Literal["adam", "sgd"] | None = None
    lr: float | None = None
    limit: int = 500
    share: float = 1.0

    def __post_init__(self) -> None:
        _ = self.budget
        check_range("batch_size", self.batch_size, 1, float("inf"))
        check_range("limit", self.limit, 1, float("inf"))
        check_range("share", self.share, 0, 1, open_low=True)
        if self.lr is not None:
            check_range("lr", self.lr, 0, float("inf"), open_low=True)

    @property
    def budget(self) -> Budget:
        """Steps and optimizer."""
        return Budget(self.steps, self.every, self.optimizer or "adam")

    def on(self, audit: str, curve: str, what: str) -> Further:
        """How training goes on, and on what."""
        return Further(audit, curve, what, self)


@dataclass(frozen=True)
class Further:
    """How training goes on.

    Attributes:
        audit: Whose findings are made, and whose curves in the series `relearning`.
        curve: Name of the curves.
        on: What is trained on, in words.
        settings: Budget and learning rate.
    """

    audit: str
    curve: str
    on: str
    settings: FurtherTraining


def trained_on(evidence: Evidence, key: object, batches: Sequence[Batch], how: Further) -> Outcome:
    """Forget accuracy at the end and over the steps, gain, and retain accuracy at the end.

    Args:
        evidence: Its models are copied; original and controls are tuned once.
        key: Under which their curves are remembered: the audit's settings.
        batches: One per step, the same for every model; fewer are used in turn.
        how: Settings and words.
    """
    watched = Watched.part(evidence, "forget", how.settings.limit)
    utility = Watched.part(evidence, "retain", how.settings.limit) if evidence.has("retain") else None

    def attacked(role: str) -> tuple[Curve, float | None]:
        model = _copy(evidence, role)
        curve = tune(
            model, _optimizer(evidence, model, how), batches, watched, evidence.task, how.settings.budget
        )
        return curve, None if utility is None else float(utility.right(model).mean())

    curves: dict[str, Curve] = {}
    rates: dict[str, float] = {}
    for role in evidence.roles:
        try:
            curves[role], rate = evidence.remember(key, partial(attacked, role), role)
        except InvalidAudit as reason:
            return not_run(how.audit, "final", f"the {role} model cannot be tuned: {reason}")
        if rate is not None:
            rates[role] = rate
    findings = _findings(evidence, curves, rates, how)
    rows = [row for role, curve in curves.items() for row in curve_rows(how.curve, role, [curve])]
    return Outcome(tuple(findings), {"relearning": tuple(rows)})


def _copy(evidence: Evidence, role: str) -> nn.Module:
    model = copy.deepcopy(evidence.model(role))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return evidence.runtime.place(model).eval()


def _optimizer(evidence: Evidence, model: nn.Module, how: Further) -> torch.optim.Optimizer:
    recipe = recipe_of(evidence.original) if evidence.original is not None else None
    if how.settings.optimizer is not None or how.settings.lr is not None or recipe is None:
        return how.settings.budget.optimizer_of(model, how.settings.lr or DEFAULT_RATE)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidAudit("it has no parameters that could be tuned")
    optimizer = recipe.build_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] *= how.settings.share
    return optimizer


def _findings(
    evidence: Evidence, curves: Mapping[str, Curve], rates: Mapping[str, float], how: Further
) -> list[Finding]:
    diverged = [role for role, curve in curves.items() if curve.diverged]
    note = f"{how.settings.budget.steps} steps on {how.on}" + (
        f"; the loss diverged for {', '.join(diverged)}" if diverged else ""
    )
    last = {role: curve.right[-1] for role, curve in curves.items()}
    mean = {role: curve.right[1:].astype(np.float64).mean(0) for role, curve in curves.items()}
    final = known(evidence, how.audit, "final", last, note, bears="inside")
    findings = [
        final,
        *gain(evidence, final),
        known(evidence, how.audit, "area", mean, f"mean accuracy over the steps; {note}"),
    ]
    if rates:
        findings.append(measured(evidence, how.audit, "retain_accuracy", rates, f"after {note}", "utility"))
    return findings
