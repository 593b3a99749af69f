"""Benign fine-tuning: does the forgotten come back by training on retained records alone (checklist B3)?"""

from __future__ import annotations

from dataclasses import dataclass

from palimpsest.audit.attacks.further_training import FurtherTraining, trained_on
from palimpsest.audit.attacks.tuning import step_batches
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Outcome
from palimpsest.core.records import Batch


@audit(
    "benign-finetuning",
    code="B3",
    cost=Cost.ATTACK,
    parts=("forget", "retain"),
    tasks=("classification", "regression", "language"),
    budgets={"language": {"steps": 20, "every": 10, "batch_size": 16, "limit": 100, "share": 0.25}},
)
@dataclass(frozen=True)
class BenignFinetuning(FurtherTraining):
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
        share: Of the recipe's learning rate, where that is taken.
    """

    steps: int = 40
    every: int = 4
    batch_size: int = 64

    def run(self, evidence: Evidence) -> Outcome:
        """Forget accuracy at the end and over the steps, gain, and retain accuracy at the end."""
        on = f"{self.batch_size} retained records each"
        how = self.on("benign-finetuning", "benign", on)
        return trained_on(evidence, self, self.batches(evidence), how)

    def batches(self, evidence: Evidence) -> list[Batch]:
        """The retained records of the steps, the same for every model."""
        random = evidence.runtime.numpy("benign fine-tuning")
        return step_batches(evidence, evidence.records("retain"), self.steps, self.batch_size, random)
