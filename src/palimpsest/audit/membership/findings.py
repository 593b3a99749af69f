"""From the scores of an attack under every model to findings.

Scores come by role, each a pair (members, non-members) of the same records in the same order, so that what
is common to all models cancels in the error of their differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from palimpsest.audit.membership.rates import STABLE, Scores, accuracy_at, range_error, resolvable, tpr_at
from palimpsest.core.evidence import ORIGINAL, UNLEARNED
from palimpsest.core.finding import Finding, Judgement
from palimpsest.core.intervals import auc, auc_interval, clopper_pearson
from palimpsest.core.scale import deviation, judged, lowest_expected

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


def accuracy_finding(audit: str, name: str, scores: ByRole, threshold: float, note: str = "") -> Finding:
    """Balanced accuracy of calling scores at or above a threshold member; the threshold comes from elsewhere."""
    found = {role: accuracy_at(*sides, threshold) for role, sides in scores.items()}
    value, low, high = found[UNLEARNED]
    members, others = scores[UNLEARNED]
    finding = Finding(
        audit,
        name,
        value,
        low,
        high,
        n=len(members) + len(others),
        more_is="knowledge",
        original=found[ORIGINAL][0] if ORIGINAL in found else None,
        controls=tuple(found[role][0] for role in controls_of(list(scores))),
        note=note,
    )
    return judged(finding, sampling=_accuracy_error(scores, threshold), prior=SEED_SPREAD)


def gap_finding(audit: str, name: str, scores: ByRole, prior: float = SEED_SPREAD) -> Finding | None:
    """AUC minus the mean AUC of the retrained models, all on the same records; None without one.

    The interval holds both the error of finitely many records (paired) and what retrainings differ among
    each other: 0 inside means that the model may be one of them.
    """
    controls = [auc(*scores[role]) for role in controls_of(list(scores))]
    if not controls:
        return None
    center = float(np.mean(controls))
    gap = {role: auc(*sides) - center for role, sides in scores.items()}
    spread, freedom = deviation(controls, prior)
    error = math.hypot(control_error(scores), spread * math.sqrt(1 + 1 / len(controls)))
    half = float(stats.t.ppf(0.975, freedom)) * error
    value = gap[UNLEARNED]
    apart = Judgement.SEPARATED if value > half else Judgement.BEYOND if value < -half else None
    members, others = scores[UNLEARNED]
    return Finding(
        audit,
        name,
        value,
        value - half,
        value + half,
        n=len(members) + len(others),
        ideal=0.0,
        original=gap.get(ORIGINAL),
        judgement=apart or Judgement.AS_RETRAINED,
        note="AUC minus the mean of the retrained models",
    )


def gain_finding(audit: str, name: str, scores: ByRole, plain: ByRole, note: str) -> Finding:
    """AUC of an attack minus that of a plainer one on the same records, with its paired interval."""
    value = {role: auc(*scores[role]) - auc(*plain[role]) for role in scores}
    error = range_error(scores[UNLEARNED], [plain[UNLEARNED]])
    members, others = scores[UNLEARNED]
    return Finding(
        audit,
        name,
        value[UNLEARNED],
        value[UNLEARNED] - NORMAL * error,
        value[UNLEARNED] + NORMAL * error,
        n=len(members) + len(others),
        original=value.get(ORIGINAL),
        controls=tuple(value[role] for role in controls_of(list(scores))),
        note=note,
    )


def as_harm(finding: Finding, scores: ByRole, note: str) -> Finding:
    """A finding on records that were not to be forgotten: more leak than retraining leaves is harm."""
    plain = replace(
        finding,
        more_is="harm",
        k=None,
        k_low=None,
        k_high=None,
        valid=None,
        judgement=Judgement.INFORMATION,
        note=note,
    )
    return judged_by_controls(plain, control_error(scores), above_original=True)


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


def _accuracy_error(scores: ByRole, threshold: float) -> float:
    """Paired standard error of accuracy(original) - mean accuracy(controls)."""
    controls = controls_of(list(scores))
    if ORIGINAL not in scores or not controls:
        return 0.0
    variance = 0.0
    for side in (0, 1):
        called = {role: (sides[side] >= threshold).astype(float) for role, sides in scores.items()}
        apart = called[ORIGINAL] - np.mean([called[role] for role in controls], axis=0)
        variance += float(apart.var(ddof=1)) / len(apart) if len(apart) > 1 else math.inf
    return math.sqrt(variance) / 2


def _original_error(scores: ByRole) -> float:
    controls = controls_of(list(scores))
    if ORIGINAL not in scores or not controls:
        return 0.0
    return range_error(scores[ORIGINAL], [scores[role] for role in controls])


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
