"""Benign fine-tuning: does the forgotten come back by training on retained records alone (checklist B3)?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import nn

from palimpsest.audit.attacks.curves import Curve, curve_rows
from palimpsest.audit.attacks.knowledge import Watched, gain, known, measured, not_run
from palimpsest.audit.attacks.tuning import Budget, step_batches, tune
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.records import Batch
from palimpsest.core.unlearner import check_range
from palimpsest.parts.training import recipe_of

DEFAULT_RATE = 1e-3
"""Learning rate of Adam where neither a rate is given nor a training recipe known."""


@audit(
    "benign-finetuning",
    code="B3",
    cost=Cost.ATTACK,
    parts=("forget", "retain"),
    tasks=("classification", "regression", "language"),
)
@dataclass(frozen=True)
class BenignFinetuning:
    """Go on training every model on retained records and watch the forget records.

    Whoever fine-tunes a served model for a purpose of their own does this without any bad intention, so
    the models are taken as they are, with wrappers. Every model gets the same records in the same order.
    Knowledge that was merely pushed aside can return: Łucki et al. (arXiv 2409.18025) for language models;
    for vision classifiers retain-only tuning lifted forget accuracy from about one half to nearly all
    while retrained models stayed (arXiv 2505.22310).

    Attributes:
        steps: Descent steps.
        every: Measure after every so many steps.
        batch_size: Retained records per step.
        optimizer: "adam" or "sgd", with `lr`; None takes the recipe that the original was trained with.
        lr: Learning rate; None takes the recipe's, or 0.001 where there is none.
        limit: At most this many forget records are measured.
    """

    steps: int = 40
    every: int = 4
    batch_size: int = 64
    optimizer: Literal["adam", "sgd"] | None = None
    lr: float | None = None
    limit: int = 500

    def __post_init__(self) -> None:
        _ = self.budget
        check_range("batch_size", self.batch_size, 1, float("inf"))
        check_range("limit", self.limit, 1, float("inf"))
        if self.lr is not None:
            check_range("lr", self.lr, 0, float("inf"), open_low=True)

    @property
    def budget(self) -> Budget:
        """Steps and optimizer."""
        return Budget(self.steps, self.every, self.optimizer or "adam")

    def run(self, evidence: Evidence) -> Outcome:
        """Forget accuracy at the end and over the steps, gain, and retain accuracy at the end."""
        batches = self.batches(evidence)
        watched = Watched.part(evidence, "forget", self.limit)
        utility = Watched.part(evidence, "retain", self.limit)

        def attacked(role: str) -> tuple[Curve, float]:
            model = self._copy(evidence, role)
            optimizer = self._optimizer(evidence, model)
            curve = tune(model, optimizer, batches, watched, evidence.task, self.budget)
            return curve, float(utility.right(model).mean())

        curves: dict[str, Curve] = {}
        rates: dict[str, float] = {}
        for role in evidence.roles:
            try:
                curves[role], rates[role] = evidence.remember(self, partial(attacked, role), role)
            except InvalidAudit as reason:
                return not_run("benign-finetuning", "final", f"the {role} model cannot be tuned: {reason}")
        findings = self._findings(evidence, curves, rates)
        rows = [row for role, curve in curves.items() for row in curve_rows("benign", role, [curve])]
        return Outcome(tuple(findings), {"relearning": tuple(rows)})

    def batches(self, evidence: Evidence) -> list[Batch]:
        """The retained records of the steps, the same for every model."""
        random = evidence.runtime.numpy("benign fine-tuning")
        return step_batches(evidence, evidence.records("retain"), self.steps, self.batch_size, random)

    def _copy(self, evidence: Evidence, role: str) -> nn.Module:
        model = copy.deepcopy(evidence.model(role))
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return evidence.runtime.place(model).eval()

    def _optimizer(self, evidence: Evidence, model: nn.Module) -> torch.optim.Optimizer:
        recipe = recipe_of(evidence.original) if evidence.original is not None else None
        if self.optimizer is not None or self.lr is not None or recipe is None:
            return self.budget.optimizer_of(model, self.lr or DEFAULT_RATE)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InvalidAudit("it has no parameters that could be tuned")
        return recipe.build_optimizer(model)

    def _findings(
        self, evidence: Evidence, curves: Mapping[str, Curve], rates: Mapping[str, float]
    ) -> list[Finding]:
        diverged = [role for role, curve in curves.items() if curve.diverged]
        note = f"{self.steps} steps on {self.batch_size} retained records each" + (
            f"; the loss diverged for {', '.join(diverged)}" if diverged else ""
        )
        last = {role: curve.right[-1] for role, curve in curves.items()}
        mean = {role: curve.right[1:].astype(np.float64).mean(0) for role, curve in curves.items()}
        final = known(evidence, "benign-finetuning", "final", last, note, bears="inside")
        area = known(evidence, "benign-finetuning", "area", mean, f"mean accuracy over the steps; {note}")
        after = measured(evidence, "benign-finetuning", "retain_accuracy", rates, f"after {note}", "utility")
        return [final, *gain(evidence, final), area, after]
