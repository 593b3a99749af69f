"""Anamnesis: how many steps of training bring a forgotten range of targets back (checklist B1)?"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from palimpsest.audit.attacks.knowledge import not_run
from palimpsest.audit.regression import in_forgotten_range
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.scale import judged
from palimpsest.core.unlearner import check_range

SPREAD = 0.3
"""Deviation of the number of steps between retrainings, as a share of it."""


@audit("anamnesis", code="B1", cost=Cost.ATTACK, parts=("forget", "retain"), tasks=("regression",))
@dataclass(frozen=True)
class Anamnesis:
    """Train copies of all models on all training records and count the steps until the forgotten is back.

    The anamnesis index of Deep Regression Unlearning (arXiv 2210.08196): mini-batches of the full training
    set until the loss on unseen records like the forgotten ones is within `margin` of the original's,
    checked after every batch; AIN = steps of the model over steps of a retrained one. 1 is ideal; far below,
    the model had not forgotten; far above, it stands out as one that was made to forget. Counts saturate at
    the budget. On the scale K the number of steps is 0 for the original, and K = 1 - AIN.

    Records like the forgotten ones are test records in the range of targets that was forgotten; where no
    range was, the forget records themselves. Original, model and controls get the same batches.

    Deviations: copies are trained; the released code trains the models themselves.

    Attributes:
        lr: Learning rate of Adam.
        batch_size: Records per step.
        epochs: Budget: passes over the training records.
        margin: Share of the original's loss by which the model's may exceed it.
        limit: The loss is measured on at most this many records.
    """

    lr: float = 1e-3
    batch_size: int = 64
    epochs: int = 10
    margin: float = 0.05
    limit: int = 500

    def __post_init__(self) -> None:
        check_range("lr", self.lr, 0, 1e6, open_low=True)
        check_range("margin", self.margin, 0, 1e6)
        if self.batch_size < 2 or self.epochs < 1 or self.limit < 1:
            raise InvalidHyperparameter(
                "batch_size must be at least 2, epochs and limit at least 1, not "
                f"{self.batch_size}, {self.epochs} and {self.limit}."
            )

    def run(self, evidence: Evidence) -> Outcome:
        """Steps of the model on the scale K, and the index against the controls."""
        if evidence.original is None:
            return not_run("anamnesis", "steps", "the original model, whose loss is the goal, is not at hand")
        watched, what = self._watched(evidence)
        before = evidence.runtime.place(evidence.original)
        goal = (1 + self.margin) * _loss(before, watched, evidence)
        steps = {
            role: evidence.remember(
                (self, "steps"), partial(self._steps, evidence, role, watched, goal), role
            )
            for role in evidence.roles
        }
        controls = tuple(float(steps[role]) for role in evidence.control_roles)
        most = self.epochs * self._per_epoch(evidence)
        late = [role for role, count in steps.items() if count >= most]
        note = f"batches of {self.batch_size} to a loss of {goal:.3g} on {what}" + (
            f"; not reached within {most} by {', '.join(late)}" if late else ""
        )
        finding = Finding(
            "anamnesis", "steps", float(steps[UNLEARNED]), n=len(watched), original=float(steps[ORIGINAL]),
            controls=controls, note=note, bears="inside" if controls else "",
        )  # fmt: skip
        if not controls:
            return Outcome((finding,))
        usual = float(np.mean(controls))
        ratio = {role: count / usual for role, count in steps.items()} if usual else {}
        index = Finding(
            "anamnesis", "index", ratio.get(UNLEARNED), n=len(watched), ideal=1.0, original=ratio.get(ORIGINAL),
            controls=tuple(ratio[role] for role in evidence.control_roles if role in ratio),
            note="steps over the retrained models' mean",
        )  # fmt: skip
        if not usual:
            index = replace(index, note="a retrained model is as close from the start: there is no index")
        return Outcome((judged(finding, floor=1.0, prior=SPREAD * usual), index))

    def _watched(self, evidence: Evidence) -> tuple[Records, str]:
        """The records that the loss is measured on, and what they are."""
        records, what = evidence.records("forget"), "the forget records"
        if evidence.has("test") and in_forgotten_range(evidence, "test").any():
            records = evidence.records("test").select(in_forgotten_range(evidence, "test"))
            what = "test records in the forgotten range"
        if len(records) > self.limit:
            chosen = evidence.runtime.numpy("anamnesis sample").permutation(len(records))[: self.limit]
            records = records.select(np.sort(chosen))
        return records, what

    def _per_epoch(self, evidence: Evidence) -> int:
        return -(-len(evidence.split.train) // self.batch_size)

    def _steps(self, evidence: Evidence, role: str, watched: Records, goal: float) -> int:
        """Batches until the goal is met; the budget if it never is."""
        model = evidence.runtime.place(copy.deepcopy(evidence.model(role)))
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        optimizer = torch.optim.Adam(model.parameters(), self.lr)
        order = evidence.runtime.generator("anamnesis order")
        seen = list(evidence.runtime.batches(watched, evidence.task))
        steps = 0
        with evidence.runtime.seeded("anamnesis"):
            for _ in range(self.epochs):
                batches = evidence.runtime.batches(
                    evidence.split.train, evidence.task, self.batch_size, order
                )
                for batch in batches:
                    if _mean_loss(model, seen, evidence) <= goal:
                        return steps
                    if not _descend(model, optimizer, batch, evidence):
                        return self.epochs * self._per_epoch(evidence)
                    steps += 1
        return steps


def _descend(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, evidence: Evidence) -> bool:
    """One step in training mode; False if the loss is not finite, and then nothing is applied.

    A single record, of which batch norm has no statistics, is learned in evaluation mode.
    """
    model.train(len(batch["id"]) > 1)
    loss = evidence.task.loss_per_example(model, batch).mean()
    if not torch.isfinite(loss):
        return False
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return True


def _loss(model: nn.Module, records: Records, evidence: Evidence) -> float:
    return _mean_loss(model, list(evidence.runtime.batches(records, evidence.task)), evidence)


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: list[Batch], evidence: Evidence) -> float:
    with evaluating(model):
        losses = [evidence.task.loss_per_example(model, batch) for batch in batches]
    return float(torch.cat(losses).mean())
