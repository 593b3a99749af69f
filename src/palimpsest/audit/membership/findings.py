"""From the scores of an attack under every model to findings.

Scores come by role, each a pair (members, non-members) of the same records in the same order, so that what
is common to all models cancels in the error of their differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from palimpsest.audit.membership.rates import STABLE, Scores, range_error, resolvable, tpr_at
from palimpsest.core.evidence import ORIGINAL, UNLEARNED
from palimpsest.core.finding import Finding, Judgement
from palimpsest.core.intervals import auc, auc_interval, clopper_pearson
from palimpsest.core.scale import judged, lowest_expected

SEED_SPREAD = 0.02
"""Deviation of an AUC between retrainings of different seeds (digits, small CNN: 0.011 to 0.021)."""
NORMAL = 1.96

ByRole = Mapping[str, tuple[Scores, Scores]]


def controls_of(roles: Sequence[str]) -> list[str]:
    """The roles that are retrained controls."""
    return [role for role in roles if role not in (ORIGINAL, UNLEARNED)]


def auc_finding(
    audit: str,
    name: str,
    scores: ByRole,
    note: str = "",
    prior: float = SEED_SPREAD,
    widening: float = 1.0,
) -> Finding:
    """AUC of members against non-members with DeLong's interval, judged on the scale K.

    Args:
        audit: Name of the audit.
        name: Of the finding.
        scores: By role; at least two records a side.
        note: To print beside it.
        prior: Deviation between retrainings, as known before.
        widening: Of all standard errors; above 1 for scores that are not independent.
    """
    members, others = scores[UNLEARNED]
    value = {role: auc(*sides) for role, sides in scores.items()}
    controls = controls_of(list(scores))
    low, high = widened_interval(members, others, widening)
    if high < 0.5:
        note = _join(note, "below 0.5: members stand out as less certain, which tells them apart too")
    finding = Finding(
        audit,
        name,
        value[UNLEARNED],
        low,
        high,
        n=len(members) + len(others),
        more_is="knowledge",
        original=value.get(ORIGINAL),
        controls=tuple(value[role] for role in controls),
        note=_join(note, f"{len(members)} members, {len(others)} non-members"),
    )
    return judged(finding, sampling=widening * _original_error(scores), prior=prior)


def widened_interval(members: Scores, others: Scores, widening: float = 1.0) -> tuple[float, float]:
    """DeLong's 95 % interval of an AUC, its error multiplied by `widening`."""
    error, _, _ = auc_interval(members, others)
    value, half = auc(members, others), NORMAL * widening * error
    return max(0.0, value - half), min(1.0, value + half)


def tpr_finding(audit: str, name: str, scores: ByRole, alpha: float) -> Finding:
    """True positive rate at a false positive rate of at most alpha, with its exact interval.

    With fewer than 1/alpha non-members the rate does not exist: the finding has no value and is invalid.
    """
    members, others = scores[UNLEARNED]
    if not resolvable(len(others), alpha):
        note = f"not resolvable: {len(others)} non-members, {math.ceil(1 / alpha)} are needed for {alpha:g}"
        return Finding(
            audit, name, None, more_is="knowledge", valid=False, judgement=Judgement.INVALID, note=note
        )
    found = {role: tpr_at(*sides, alpha) for role, sides in scores.items()}
    controls = controls_of(list(scores))
    mine = found[UNLEARNED]
    low, high = clopper_pearson(int(mine.hit.sum()), len(members))
    fpr_low, fpr_high = clopper_pearson(mine.false, mine.others)
    note = f"false positives {mine.false} of {mine.others}, rate in [{fpr_low:.4f}, {fpr_high:.4f}]"
    if len(others) < STABLE / alpha:
        note = _join(note, f"unstable: fewer than {STABLE / alpha:.0f} non-members")
    finding = Finding(
        audit,
        name,
        mine.rate,
        low,
        high,
        n=len(members),
        more_is="knowledge",
        original=found[ORIGINAL].rate if ORIGINAL in found else None,
        controls=tuple(found[role].rate for role in controls),
        note=note,
    )
    sampling = 0.0
    if ORIGINAL in found and controls:
        gap = found[ORIGINAL].hit - np.mean([found[role].hit for role in controls], axis=0)
        sampling = float(gap.std(ddof=1) / math.sqrt(len(gap))) if len(gap) > 1 else math.inf
    return judged(finding, sampling=sampling, floor=1 / len(members))


def leak_finding(audit: str, name: str, scores: ByRole) -> Finding:
    """|AUC - 0.5|: how far members can be told apart in either direction, against the controls.

    Over-forgotten records score below non-members; that is a leak which the AUC's K shows as a success.
    """
    gap = {role: abs(auc(*sides) - 0.5) for role, sides in scores.items()}
    members, others = scores[UNLEARNED]
    return judged_by_controls(
        Finding(
            audit,
            name,
            gap[UNLEARNED],
            n=len(members) + len(others),
            more_is="harm",
            original=gap.get(ORIGINAL),
            controls=tuple(gap[role] for role in controls_of(list(scores))),
            note="|AUC - 0.5|: a leak in either direction",
        ),
        control_error(scores),
    )


def judged_by_controls(
    finding: Finding, error: float, prior: float = SEED_SPREAD, above_original: bool = False
) -> Finding:
    """A harm judged by the controls alone: separated if above all that a further retraining would show.

    Args:
        finding: With `more_is="harm"`.
        error: Standard error of value - mean control from the finite number of records.
        prior: Deviation between retrainings, as known before.
        above_original: Whether the value must exceed the original's too: harm that was not there before.
    """
    if finding.value is None or not finding.controls:
        return finding
    highest = -lowest_expected([-value for value in finding.controls], prior)
    worse = finding.value > highest and finding.value - float(np.mean(finding.controls)) > NORMAL * error
    if above_original and finding.original is not None:
        worse = worse and finding.value > finding.original
    return replace(finding, judgement=Judgement.SEPARATED if worse else Judgement.AS_RETRAINED)


def control_error(scores: ByRole) -> float:
    """Paired standard error of AUC(unlearned) - mean AUC(controls); infinite without controls."""
    controls = controls_of(list(scores))
    return range_error(scores[UNLEARNED], [scores[role] for role in controls]) if controls else math.inf


def _original_error(scores: ByRole) -> float:
    controls = controls_of(list(scores))
    if ORIGINAL not in scores or not controls:
        return 0.0
    return range_error(scores[ORIGINAL], [scores[role] for role in controls])


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
