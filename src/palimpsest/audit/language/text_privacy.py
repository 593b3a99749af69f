"""Privacy of the texts that stay, and being seen to have forgotten (checklist D2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.distance import against_controls
from palimpsest.audit.language.asked import language_of
from palimpsest.audit.language.fact_rates import not_run
from palimpsest.audit.language.text_membership import FEWEST, alike
from palimpsest.audit.language.token_signals import detector_features, signals_of
from palimpsest.audit.membership.findings import as_harm, auc_finding
from palimpsest.audit.side_effects import (
    DETECTION_SPREAD,
    FEWEST_ITEMS,
    FOLDS,
    detector_scores,
    paired_placements,
)
from palimpsest.core.auditing import audit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome
from palimpsest.core.scale import lowest_expected

K = 0.2


@audit("text-privacy", code="D2", parts=("forget",), tasks=("language",))
@dataclass(frozen=True)
class TextPrivacy:
    """Are retained texts more exposed than before, and do forgotten ones stand out from a retrained model's?

    Exposure is the LOSS attack on retained texts against held-out ones: a rise over the original that
    retrained models do not show is harm done to others. Detectability is the area under the curve of a
    logistic detector of unlearned against retrained outputs on the same forgotten texts, each scored by a
    detector that was fitted on other subjects; near 1/2 nobody can tell that something was forgotten.
    """

    def run(self, evidence: Evidence) -> Outcome:
        """Exposure of the rest and detectability."""
        language_of(evidence)
        return Outcome((_exposure(evidence), _detectability(evidence)))


def _exposure(evidence: Evidence) -> Finding:
    name = "retain_membership_auc"
    if not (evidence.has("retain") and evidence.has("holdout")):
        return not_run("text-privacy", name, "there are no retained or no held-out texts").findings[0]
    members, others = alike(evidence.records("retain"), evidence.records("holdout"))
    if min(len(members), len(others)) < FEWEST:
        return not_run("text-privacy", name, "no held-out texts are like the retained ones").findings[0]
    scores = {
        role: (
            signals_of(evidence, role, "retain", K)["loss"][members],
            signals_of(evidence, role, "holdout", K)["loss"][others],
        )
        for role in evidence.roles
    }
    note = f"AUC of the loss, {len(members)} retained texts against {len(others)} held-out ones"
    return as_harm(auc_finding("text-privacy", name, scores), scores, note)


def _detectability(evidence: Evidence) -> Finding:
    name, n = "detectability_auc", len(evidence.records("forget"))
    if not evidence.controls or n < FEWEST_ITEMS:
        why = f"only {n} forgotten texts" if evidence.controls else "there is no retrained model"
        return not_run("text-privacy", name, why).findings[0]
    folds = _folds(evidence)

    def placements(one: str, other: str) -> NDArray[np.float64]:
        def compute() -> NDArray[np.float64]:
            views = [detector_features(evidence, role, "forget") for role in (one, other)]
            return paired_placements(*detector_scores(views[0], views[1], folds))

        role = UNLEARNED if UNLEARNED in (one, other) else ORIGINAL
        return evidence.remember(("text detectability", one, other), compute, role)

    value, original, among = against_controls(evidence, lambda *pair: float(placements(*pair).mean()))
    items = np.mean([placements(UNLEARNED, role) for role in evidence.control_roles], 0)
    half = 1.96 * float(items.std(ddof=1)) / np.sqrt(n)
    usual = among or (0.5,)
    seen = value - half > -lowest_expected([-each for each in usual], DETECTION_SPREAD)
    return Finding(
        "text-privacy", name, value, max(0.0, value - half), min(1.0, value + half), n, "as retrained", "harm",
        original, among, judgement=Judgement.BAD if seen else Judgement.INFORMATION,
        note="AUC of a detector of unlearned against retrained outputs; for controls among each other",
    )  # fmt: skip


def _folds(evidence: Evidence) -> NDArray[np.int64]:
    """Fold of every forgotten text; texts of one subject together where there are enough subjects."""
    records = evidence.records("forget")
    random = evidence.runtime.numpy("text-privacy", "folds")
    if records.has_column("subject"):
        names, at = np.unique([str(name) for name in records.column("subject")], return_inverse=True)
        if len(names) >= 2:
            return (random.permutation(len(names)) % min(FOLDS, len(names)))[at]
    return random.permutation(len(records)) % FOLDS
