"""The membership audit: population attacks on forget records against held-out ones (checklist A6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from palimpsest.audit.membership.evidence_scores import feature_matrix, same_draw, signals_of
from palimpsest.audit.membership.exchangeability import exchangeability_finding
from palimpsest.audit.membership.findings import ByRole, auc_finding, leak_finding, tpr_finding
from palimpsest.audit.membership.matching import Match, match
from palimpsest.audit.membership.population import CROSSFIT_WIDENING, crossfit
from palimpsest.audit.membership.published import published_attacks
from palimpsest.audit.membership.rates import roc, thinned
from palimpsest.audit.membership.subgroups import hardest_records, per_class_rows, retained, worst_class
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome, Row

THRESHOLD_ATTACKS = ("loss", "confidence", "entropy", "modified_entropy")
HEADLINE = "loss"
"""The attack that the verdict reads: one-sided, with nothing fitted, and the steadiest between seeds."""
LOGISTIC_SPREAD = 0.04
"""Deviation of the cross-fitted AUC between retrainings (digits, small CNN: 0.03 to 0.035)."""
BINS = 20


@audit("membership", code="A6", parts=("forget", "holdout"), tasks=("classification",))
@dataclass(frozen=True)
class Membership:
    """Membership inference without shadow models, on members and non-members of equal difficulty.

    Members are the forget records, non-members held-out records with the same labels in the same
    proportions. Threshold attacks on loss, confidence, entropy and modified entropy, and a cross-fitted
    logistic attack on all signals, give AUC and true positive rates at low false positive rates. The loss
    ranks records as the confidence does, so these two agree by construction; the logistic attack finds
    its own direction, so that over-forgotten records raise it as well.

    Attributes:
        rates: False positive rates at which true positive rates are given.
        folds: Of the logistic attack and of the check for exchangeability.
        published: Records a side for the attacks as printed with SalUn and SSD; 0 leaves them out.
    """

    rates: tuple[float, ...] = (0.01, 0.001)
    folds: int = 5
    published: int = 1000

    def __post_init__(self) -> None:
        if self.folds < 2 or self.published < 0 or not all(0 < rate < 1 for rate in self.rates):
            raise InvalidAudit(f"folds must be at least 2, published at least 0, rates in (0, 1): {self}.")

    def run(self, evidence: Evidence) -> Outcome:
        """AUC and rates of every attack, on all records, per class, on the hardest and on the retained."""
        pair = match(evidence.labels("forget"), evidence.labels("holdout"), same_draw(evidence, "match"))
        if min(len(pair.members), len(pair.others)) < self.folds:
            return _not_run(pair)
        scores = self._attacks(evidence, pair)
        note = (
            f"{pair.dropped} members without a held-out record of their label left out"
            if pair.dropped
            else ""
        )
        findings: list[Finding] = []
        for name, by_role in scores.items():
            fitted = {"prior": LOGISTIC_SPREAD, "widening": CROSSFIT_WIDENING} if name == "logistic" else {}
            finding = auc_finding("membership", f"{name}_auc", by_role, note, **fitted)
            findings.append(replace(finding, bears="outputs") if name == HEADLINE else finding)
            findings += [
                tpr_finding("membership", f"{name}_tpr_at_{rate:g}", by_role, rate) for rate in self.rates
            ]
        findings.append(leak_finding("membership", "leak", scores[HEADLINE]))
        findings += worst_class(evidence, pair, HEADLINE, scores[HEADLINE])
        findings += hardest_records(evidence, pair, HEADLINE)
        findings += retained(evidence, HEADLINE)
        findings.append(exchangeability_finding(evidence, pair, self.folds))
        if self.published:
            findings += published_attacks(evidence, self.published)
        series = {
            "roc": tuple(_curves(scores)),
            "confidence": tuple(_histograms(evidence, pair)),
            "membership_per_class": tuple(per_class_rows(evidence, pair, scores)),
        }
        return Outcome(tuple(findings), series)

    def _attacks(self, evidence: Evidence, pair: Match) -> dict[str, ByRole]:
        """Scores of all attacks, by attack and role."""
        sides = {
            role: (
                signals_of(evidence, role, "forget", pair.members),
                signals_of(evidence, role, "holdout", pair.others),
            )
            for role in evidence.roles
        }
        scores: dict[str, ByRole] = {
            name: {role: (mine[name], theirs[name]) for role, (mine, theirs) in sides.items()}
            for name in THRESHOLD_ATTACKS
        }
        scores["logistic"] = {
            role: crossfit(
                feature_matrix(mine), feature_matrix(theirs), same_draw(evidence, "folds"), self.folds
            )
            for role, (mine, theirs) in sides.items()
        }
        return scores


def _curves(scores: Mapping[str, ByRole]) -> list[Row]:
    """ROC curves; the confidence's is the loss's."""
    return [
        {"attack": attack, "model": role, "fpr": x, "tpr": y}
        for attack, by_role in scores.items()
        if attack != "confidence"
        for role, sides in by_role.items()
        for x, y in thinned(*roc(*sides))
    ]


def _histograms(evidence: Evidence, pair: Match) -> list[Row]:
    """Distribution of the probability of the true label, on both sides."""
    edges = np.linspace(0, 1, BINS + 1)
    rows: list[Row] = []
    for role in evidence.roles:
        for part, where in (("forget", pair.members), ("holdout", pair.others)):
            probability = signals_of(evidence, role, part, where)["probability"]
            counts, _ = np.histogram(np.clip(probability, 0, 1), edges)
            rows += [
                {
                    "model": role,
                    "part": part,
                    "low": float(low),
                    "high": float(high),
                    "share": float(count / len(probability)),
                }
                for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
            ]
    return rows


def _not_run(pair: Match) -> Outcome:
    why = f"too few to compare: {len(pair.members)} members and {len(pair.others)} held-out records of their labels"
    return Outcome((Finding("membership", f"{HEADLINE}_auc", None, judgement=Judgement.NOT_RUN, note=why),))
