"""Later learning: does the forgotten re-emerge while the model learns something new (checklist E3)?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from palimpsest.audit.attacks.further_training import FurtherTraining, trained_on
from palimpsest.audit.attacks.tuning import step_batches
from palimpsest.audit.language.asked import language_of
from palimpsest.audit.language.unrelated_finetuning import unrelated_texts
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.records import Records
from palimpsest.core.scale import scale

LEARNT = 200
"""At most so many unrelated texts are learned where there is no holdout."""


@audit(
    "later-learning",
    code="E3",
    cost=Cost.ATTACK,
    tasks=("language",),
    budgets={"language": {"steps": 40, "every": 10, "batch_size": 16, "limit": 100, "share": 0.25}},
)
@dataclass(frozen=True)
class LaterLearning(FurtherTraining):
    """Train every model on new data that has nothing to do with the request, and follow K over the steps.

    A served model goes on learning; what was only pushed aside can come back on the way. The new data are the
    holdout's facts about subjects that no model knows, or unrelated texts where there is no holdout. Training is
    that of the original's recipe. The retained facts are forgotten on the way too, by all models alike: K sets
    off the forgotten ones against what original and controls then know of them.

    Attributes:
        steps: Descent steps, T.
        every: Measure after every so many steps.
        batch_size: Records per step.
        optimizer: "adam" or "sgd", with `lr`; None takes the recipe that the original was trained with.
        lr: Learning rate; None takes the recipe's, or 0.001 where there is none.
        limit: At most this many forget records are measured.
        share: Of the recipe's learning rate, where that is taken.
    """

    steps: int = 100
    every: int = 10
    batch_size: int = 16

    def run(self, evidence: Evidence) -> Outcome:
        """Forget accuracy at the end and over the steps, gain, re-emergence, and the curve K(T)."""
        language_of(evidence)
        random = evidence.runtime.numpy("later learning")
        new = self._new(evidence, random)
        batches = step_batches(evidence, new, self.steps, self.batch_size, random)
        on = "facts about subjects of the holdout" if evidence.has("holdout") else "unrelated texts"
        how = self.on("later-learning", "later", on)
        outcome = trained_on(evidence, self, batches, how)
        rows = [dict(row) for row in outcome.series.get("relearning", ())]
        if not rows:
            return outcome
        curve = self._curve(evidence, rows, outcome.findings[0].n)
        ks = [row["k"] for row in curve if isinstance(row["k"], float)]
        findings = list(outcome.findings)
        if len(ks) > 1:
            note = "largest rise of K above its value before the first step"
            findings.append(
                Finding(
                    "later-learning",
                    "re_emergence",
                    max(ks) - ks[0],
                    ideal=0.0,
                    more_is="knowledge",
                    note=note,
                )
            )
        return replace(outcome, findings=tuple(findings), series={**outcome.series, "later": tuple(curve)})

    def _new(self, evidence: Evidence, random: np.random.Generator) -> Records:
        return evidence.records("holdout") if evidence.has("holdout") else unrelated_texts(LEARNT, random)

    def _curve(self, evidence: Evidence, rows: list[Row], n: int) -> list[Row]:
        """Accuracy of all models and K of the unlearned one after every measured step; K None where invalid."""
        curve: list[Row] = []
        for step in self.budget.measured_at:
            at = {str(row["model"]): float(row["accuracy"] or 0.0) for row in rows if row["step"] == step}
            k = None
            if evidence.original is not None and evidence.controls:
                controls = [at[role] for role in evidence.control_roles]
                scaled = scale(at[UNLEARNED], at[ORIGINAL], controls, floor=1 / n)
                k = scaled.k if scaled.valid else None
            curve.append({"step": step, "k": k, **at})
        return curve
