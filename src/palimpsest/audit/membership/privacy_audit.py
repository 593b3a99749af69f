"""The privacy-score audit: unlearned against retrained model on the forget records (checklist A6, D2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.audit.membership.evidence_scores import feature_matrix, same_draw, signals_of
from palimpsest.audit.membership.findings import NORMAL, widened_interval
from palimpsest.audit.membership.population import CROSSFIT_WIDENING, crossfit
from palimpsest.audit.membership.privacy_score import bootstrap_privacy_scores, worst_case_privacy_score
from palimpsest.audit.membership.rates import Scores
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome
from palimpsest.core.intervals import auc
from palimpsest.core.scale import judged

SCORE_SPREAD = 0.05
"""Deviation of the privacy score between pairs of retrainings (digits, small CNN: 0.03)."""
DETECTION_SPREAD = 0.06
"""The same for the AUC of telling two models apart (0.05 to 0.07)."""
DRAWS = 200

Pair = tuple[str, str]
Measured = np.float64 | NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A measure of two models, taken between unlearned, original and controls.

    Attributes:
        unlearned: Mean over the controls of the measure (unlearned, control).
        original: The same for the original model, if it is at hand.
        controls: For each control the mean over the other controls; empty with a single one.
    """

    unlearned: Measured
    original: Measured | None
    controls: list[Measured]


@audit("privacy-score", code="A6", parts=("forget",), tasks=("classification",))
@dataclass(frozen=True)
class PrivacyScore:
    """Whether the unlearned model can be told from a retrained one by its outputs on the forget records.

    `score` is the worst-case privacy score of Unlearning Comparator, `detectability` the AUC of a
    cross-fitted classifier on all signals (checklist D2), each as the mean over the controls. Neither is
    a measure of knowledge: a model that forgot too much is as easy to tell as one that kept everything.
    And even a retrained model is told from a retrained model of another seed, the more so the fewer the
    records, because the best of many thresholds is taken. So the ideal is neither 1 nor 0.5 but what two
    retrainings give each other; that is what `controls` holds, and K is 0 there and 1 at the original.

    Attributes:
        thresholds: Per feature and direction of the privacy score.
        folds: Of the classifier.
    """

    thresholds: int = 51
    folds: int = 5

    def __post_init__(self) -> None:
        if self.thresholds < 2 or self.folds < 2:
            raise InvalidAudit(f"thresholds and folds must be at least 2: {self}.")

    def run(self, evidence: Evidence) -> Outcome:
        """Both measures, of the unlearned and the original model against every control."""
        if not evidence.controls:
            why = "needs a retrained model"
            return Outcome((Finding("privacy-score", "score", None, judgement=Judgement.NOT_RUN, note=why),))
        return Outcome((self._score(evidence), *self._detectability(evidence)))

    def _score(self, evidence: Evidence) -> Finding:
        def logits(pair: Pair) -> tuple[Tensor, Tensor]:
            return evidence.observe(pair[0], "forget").logits, evidence.observe(pair[1], "forget").logits

        def score(pair: Pair) -> Measured:
            return np.float64(worst_case_privacy_score(*logits(pair), thresholds=self.thresholds))

        def resampled(pair: Pair) -> Measured:
            random = same_draw(evidence, "bootstrap")
            return bootstrap_privacy_scores(*logits(pair), random, DRAWS, self.thresholds)

        found, drawn = _against_controls(evidence, score), _against_controls(evidence, resampled)
        error = float(np.std(drawn.unlearned, ddof=1))
        sampling = 0.0
        if drawn.original is not None and drawn.controls:
            sampling = float(np.std(drawn.original - np.mean(drawn.controls, axis=0), ddof=1))
        value = float(found.unlearned)
        finding = self._finding(
            evidence,
            "score",
            found,
            (max(0.0, value - NORMAL * error), min(1.0, value + NORMAL * error)),
            f"{self.thresholds} thresholds; 1 = not to be told from retraining",
        )
        return judged(finding, sampling=sampling, prior=SCORE_SPREAD)

    def _detectability(self, evidence: Evidence) -> list[Finding]:
        n = len(evidence.records("forget"))
        if n < self.folds:
            return []

        def compute(pair: Pair) -> tuple[Scores, Scores]:
            sides = [feature_matrix(signals_of(evidence, role, "forget")) for role in pair]
            # A record is in the same fold under both models, so that no fit has seen it under the other.
            groups = np.arange(n), np.arange(n)
            return crossfit(sides[0], sides[1], same_draw(evidence, "detectability"), self.folds, groups)

        def scores(pair: Pair) -> tuple[Scores, Scores]:
            key = ("detectability", self.folds, pair)
            return evidence.remember(key, partial(compute, pair), pair[0])

        found = _against_controls(evidence, lambda pair: np.float64(auc(*scores(pair))))
        ends = [
            widened_interval(*scores((UNLEARNED, role)), CROSSFIT_WIDENING) for role in evidence.control_roles
        ]
        interval = (float(np.mean([low for low, _ in ends])), float(np.mean([high for _, high in ends])))
        note = "AUC of telling outputs on the forget records from a retrained model's"
        return [
            judged(self._finding(evidence, "detectability", found, interval, note), prior=DETECTION_SPREAD)
        ]

    def _finding(
        self, evidence: Evidence, name: str, found: Comparison, interval: tuple[float, float], note: str
    ) -> Finding:
        alone = "" if found.controls else "; one control only: what retrainings give each other is unknown"
        return Finding(
            "privacy-score",
            name,
            float(found.unlearned),
            *interval,
            n=len(evidence.records("forget")),
            more_is="neutral",
            original=None if found.original is None else float(found.original),
            controls=tuple(float(value) for value in found.controls),
            note=note + alone,
        )


def _against_controls(evidence: Evidence, measure: Callable[[Pair], Measured]) -> Comparison:
    controls = evidence.control_roles

    def mean(role: str) -> Measured:
        return np.mean([measure((role, control)) for control in controls], axis=0)

    between = {pair: measure(pair) for pair in combinations(controls, 2)}
    others = [
        np.mean([value for pair, value in between.items() if role in pair], axis=0)
        for role in controls
        if len(controls) > 1
    ]
    return Comparison(mean(UNLEARNED), None if evidence.original is None else mean(ORIGINAL), others)
