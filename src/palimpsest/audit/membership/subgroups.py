"""Attacks on parts of the records: per class, the hardest tenth, and the records that were retained."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from palimpsest.audit.membership.evidence_scores import same_draw, signals_of
from palimpsest.audit.membership.findings import (
    ByRole,
    as_harm,
    auc_finding,
)
from palimpsest.audit.membership.matching import Match, hardest, match
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Row
from palimpsest.core.intervals import auc, auc_interval
from palimpsest.core.scale import judged

FEWEST_PER_CLASS = 5
FEWEST_HARDEST = 10
HARDEST = 0.1


def per_class_rows(evidence: Evidence, pair: Match, scores: Mapping[str, ByRole]) -> list[Row]:
    """AUC of every attack on every model within every class that has two records a side."""
    rows: list[Row] = []
    mine, theirs = evidence.labels("forget")[pair.members], evidence.labels("holdout")[pair.others]
    for attack, by_role in scores.items():
        for role, (members, others) in by_role.items():
            for label in np.unique(mine):
                a, b = members[mine == label], others[theirs == label]
                if min(len(a), len(b)) < 2:
                    continue
                _, low, high = auc_interval(a, b)
                row: Row = {"attack": attack, "class": str(label), "model": role, "auc": auc(a, b)}
                rows.append({**row, "low": low, "high": high, "members": len(a), "others": len(b)})
    return rows


def worst_class(evidence: Evidence, pair: Match, attack: str, scores: ByRole) -> list[Finding]:
    """The class whose members stand out most; the maximum over classes is biased alike for all models.

    Nothing is found with fewer than two classes of at least 5 records a side.
    """
    mine, theirs = evidence.labels("forget")[pair.members], evidence.labels("holdout")[pair.others]
    sizes = {label: min((mine == label).sum(), (theirs == label).sum()) for label in np.unique(mine)}
    classes = [label for label, size in sizes.items() if size >= FEWEST_PER_CLASS]
    if len(classes) < 2:
        return []

    def within(label: object, role: str) -> tuple[np.ndarray, np.ndarray]:
        members, others = scores[role]
        return members[mine == label], others[theirs == label]

    worst = {role: max(classes, key=lambda label: auc(*within(label, role))) for role in scores}
    value = {role: auc(*within(label, role)) for role, label in worst.items()}
    members, others = within(worst[UNLEARNED], UNLEARNED)
    error, low, high = auc_interval(members, others)
    finding = Finding(
        "membership",
        f"worst_class_{attack}_auc",
        value[UNLEARNED],
        low,
        high,
        n=len(members) + len(others),
        more_is="knowledge",
        original=value.get(ORIGINAL),
        controls=tuple(value[role] for role in evidence.control_roles),
        note=f"class {worst[UNLEARNED]}, the worst of {len(classes)} (biased upwards, alike for all models)",
    )
    return [judged(finding, sampling=error)]


def hardest_records(evidence: Evidence, pair: Match, attack: str) -> list[Finding]:
    """The attack on the hardest tenth of forget records, against the hardest tenth of the non-members.

    Difficulty is the loss under the controls, none of which was trained on either side: chosen by the
    attacked model's own loss, the two sides would differ by the choice alone. Where a tenth is fewer than
    10 records, a larger share is taken on both sides alike. Needs a control.
    """
    share = max(HARDEST, FEWEST_HARDEST / min(len(pair.members), len(pair.others)))
    if not evidence.controls or share > 0.5:
        return []
    chosen = {}
    for part, where in (("forget", pair.members), ("holdout", pair.others)):
        losses = [-signals_of(evidence, role, part, where)["loss"] for role in evidence.control_roles]
        chosen[part] = where[hardest(np.mean(losses, axis=0), share)]
    scores = {
        role: (
            signals_of(evidence, role, "forget", chosen["forget"])[attack],
            signals_of(evidence, role, "holdout", chosen["holdout"])[attack],
        )
        for role in evidence.roles
    }
    note = f"hardest {share:.0%} of either side under the controls"
    return [auc_finding("membership", f"hardest_{attack}_auc", scores, note)]


def retained(evidence: Evidence, attack: str) -> list[Finding]:
    """The attack on retained records: privacy of the rest must not get worse than retraining leaves it."""
    if not evidence.has("retain"):
        return []
    kept = np.flatnonzero(~evidence.split.like_forgotten(evidence.records("holdout")))
    pair = match(
        evidence.labels("retain"), evidence.labels("holdout")[kept], same_draw(evidence, "match retain")
    )
    if min(len(pair.members), len(pair.others)) < 2:
        return []
    scores = {
        role: (
            signals_of(evidence, role, "retain", pair.members)[attack],
            signals_of(evidence, role, "holdout", kept[pair.others])[attack],
        )
        for role in evidence.roles
    }
    finding = auc_finding("membership", f"retain_{attack}_auc", scores, "retained records as members")
    note = f"retained records as members: {len(pair.members)} against {len(pair.others)} held-out records"
    return [as_harm(finding, scores, note)]
