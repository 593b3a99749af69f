"""Side effects: accuracy lost, privacy of retained records, being seen to have forgotten (checklist D)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from palimpsest.audit.distance import against_controls, not_run, probabilities
from palimpsest.audit.utility import correct, true_probability
from palimpsest.core.auditing import audit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome
from palimpsest.core.intervals import auc, auc_interval
from palimpsest.core.scale import SEED_SPREAD, lowest_expected

SIGNIFICANT = 0.05
"""p-value below which a loss of accuracy against the original is not chance."""
CLASS_SPREAD, MEMBERSHIP_SPREAD, DETECTION_SPREAD = 0.05, 0.02, 0.15
"""Prior deviations between retrainings: of the worst class, and of the two areas under the curve (digits)."""
FOLDS = 5
FEWEST_ITEMS = 10
"""With fewer forget records a detector has too little to learn from."""
LOG_ODDS = 30.0
"""Log-odds are cut to this size: a probability of 1 in float64 has none."""

Mask = NDArray[np.bool_]
Values = NDArray[np.float64]


@audit("side-effects", code="D1", parts=(), tasks=("classification",))
@dataclass(frozen=True)
class SideEffects:
    """What else changed: accuracy on the rest, exposure of retained records, being told from retraining.

    A finding is called bad only if the model is worse than the original and also worse than what
    retrained models show among each other: retraining costs some accuracy too.
    """

    def run(self, evidence: Evidence) -> Outcome:
        """Accuracy against original and controls (D1); membership of the rest, detectability (D2)."""
        parts = [part for part in ("retain", "test") if evidence.has(part) and _kept(evidence, part).any()]
        findings: list[Finding] = []
        for part in parts:
            findings += [_change(evidence, part), _against_retrained(evidence, part)]
        if parts:
            findings.append(_worst_class(evidence, parts))
        return Outcome((*findings, _exposure(evidence), _detectability(evidence)))


def mcnemar(before: Mask, after: Mask) -> float:
    """Exact two-sided p-value that as many records were lost as won.

    Example:
        >>> before = np.array([True] * 10 + [False] * 5)
        >>> round(mcnemar(before, np.array([False] * 6 + [True] * 4 + [False] * 5)), 4)
        0.0312
    """
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def worst_loss(before: Mask, after: Mask, labels: NDArray[np.int64]) -> tuple[int, float, float]:
    """The class that lost most.

    Args:
        before: Whether the first model is right, [records].
        after: Whether the second is.
        labels: Class of each record.

    Returns:
        (class, change of its accuracy, McNemar's p-value times the number of classes looked at).
    """
    classes = np.unique(labels)
    changes = [float(after[labels == label].mean() - before[labels == label].mean()) for label in classes]
    worst = classes[int(np.argmin(changes))]
    p = mcnemar(before[labels == worst], after[labels == worst])
    return int(worst), min(changes), min(1.0, p * len(classes))


def detector_scores(own: Values, other: Values, folds: NDArray[np.int64]) -> tuple[Values, Values]:
    """Scores of a logistic regression that tells two models' outputs on the same items apart.

    An item is scored by a detector that was fitted without it, for both models.

    Args:
        own: Signals of the model that counts as positive, [items, signals].
        other: Of the other model.
        folds: Fold of each item.

    Returns:
        Scores of the items under the first and under the second model, each [items].
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = np.zeros((2, len(own)))
    for fold in np.unique(folds):
        fit, held = folds != fold, folds == fold
        x = np.concatenate([own[fit], other[fit]])
        y = np.repeat([1, 0], fit.sum())
        detector = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
        scores[:, held] = [detector.decision_function(view[held]) for view in (own, other)]
    return scores[0], scores[1]


def paired_placements(positive: Values, negative: Values) -> Values:
    """One value per item whose mean is the AUC and whose standard error is the AUC's, for paired scores.

    DeLong's placement values of both samples are added item by item, so that what an item does to both
    scores is accounted for.
    """
    n = len(positive)
    together = stats.rankdata(np.concatenate([positive, negative]))
    above = (together[:n] - stats.rankdata(positive)) / n
    below = 1 - (together[n:] - stats.rankdata(negative)) / n
    return above + below - above.mean()


def _kept(evidence: Evidence, part: str) -> Mask:
    """Records of a part that are not of a class forgotten as a whole."""
    return ~evidence.split.like_forgotten(evidence.records(part))


def _right(evidence: Evidence, role: str, part: str) -> Mask:
    return correct(evidence, role, part)[_kept(evidence, part)]


def _change(evidence: Evidence, part: str) -> Finding:
    name = f"{part}_accuracy_change"
    if evidence.original is None:
        return not_run("side-effects", name, "the original model is not at hand")
    right = {role: _right(evidence, role, part) for role in evidence.roles}
    difference = right[UNLEARNED].astype(float) - right[ORIGINAL]
    value, p = float(difference.mean()), mcnemar(right[ORIGINAL], right[UNLEARNED])
    half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.inf
    controls = tuple(float(right[role].mean() - right[ORIGINAL].mean()) for role in evidence.control_roles)
    return Finding(
        "side-effects", name, value, value - half, value + half, len(difference), 0.0, "utility", 0.0,
        controls, judgement=_loss(value, p, controls), note=f"against the original; McNemar's p = {p:.3g}",
    )  # fmt: skip


def _loss(value: float, p: float, controls: tuple[float, ...], prior: float = SEED_SPREAD) -> Judgement:
    """Bad if beyond chance against the original, and beyond the spread of retrainings where there are any."""
    usual = bool(controls) and value >= lowest_expected(controls, prior)
    return Judgement.BAD if value < 0 and p < SIGNIFICANT and not usual else Judgement.INFORMATION


def _against_retrained(evidence: Evidence, part: str) -> Finding:
    name = f"{part}_accuracy_against_retrained"
    if not evidence.controls:
        return not_run("side-effects", name, "there is no retrained model")
    right = {role: _right(evidence, role, part) for role in evidence.roles}
    value, original, among = against_controls(
        evidence, lambda one, other: float(right[one].mean() - right[other].mean())
    )
    p = max(mcnemar(right[role], right[UNLEARNED]) for role in evidence.control_roles)
    note = f"difference to the retrained models; the largest of McNemar's p is {p:.3g}"
    n = len(right[UNLEARNED])
    return Finding(
        "side-effects", name, value, None, None, n, 0.0, "utility", original, among, note=note
    )  # fmt: skip


def _worst_class(evidence: Evidence, parts: list[str]) -> Finding:
    name = "worst_class_drop"
    if evidence.original is None:
        return not_run("side-effects", name, "the original model is not at hand")
    right = {
        role: np.concatenate([_right(evidence, role, part) for part in parts]) for role in evidence.roles
    }
    labels = np.concatenate([evidence.labels(part)[_kept(evidence, part)] for part in parts])
    worst, value, p = worst_loss(right[ORIGINAL], right[UNLEARNED], labels)
    controls = tuple(worst_loss(right[ORIGINAL], right[role], labels)[1] for role in evidence.control_roles)
    note = f"class {worst} on {' and '.join(parts)}, against the original; McNemar's p, all classes = {p:.3g}"
    return Finding(
        "side-effects", name, value, None, None, int((labels == worst).sum()), 0.0, "utility", 0.0, controls,
        judgement=_loss(value, p, controls, CLASS_SPREAD), note=note,
    )  # fmt: skip


def _exposure(evidence: Evidence) -> Finding:
    """Membership of retained records by their loss: a rise over the original is collateral harm."""
    name, parts = "retain_membership_auc", ("retain", "holdout")
    missing = [part for part in parts if not evidence.has(part) or _kept(evidence, part).sum() < 2]
    if missing:
        return not_run("side-effects", name, f"there are no {' and '.join(missing)} records to compare")

    def scores(role: str) -> tuple[Values, Values]:
        member, other = (
            -evidence.observe(role, part).loss.double().numpy()[_kept(evidence, part)] for part in parts
        )
        return member, other

    value = {role: auc(*scores(role)) for role in evidence.roles}
    _, low, high = auc_interval(*scores(UNLEARNED))
    controls = tuple(value[role] for role in evidence.control_roles)
    risen = ORIGINAL in value and low > value[ORIGINAL] and _beyond(low, controls, MEMBERSHIP_SPREAD)
    n = int(_kept(evidence, "retain").sum())
    return Finding(
        "side-effects", name, value[UNLEARNED], low, high, n, "as retrained", "harm",
        value.get(ORIGINAL), controls, judgement=Judgement.BAD if risen else Judgement.INFORMATION,
        note="AUC of the loss, retained records against the holdout",
    )  # fmt: skip


def _beyond(low: float, controls: tuple[float, ...], prior: float) -> bool:
    """Whether a lower bound lies above what a further retraining would show."""
    return not controls or low > -lowest_expected([-value for value in controls], prior)


def _detectability(evidence: Evidence) -> Finding:
    """Can the unlearned model's outputs on the forget records be told from a retrained model's?"""
    name, n = "detectability_auc", len(evidence.records("forget"))
    if not evidence.controls or n < FEWEST_ITEMS:
        why = "there is no retrained model" if not evidence.controls else f"only {n} records to forget"
        return not_run("side-effects", name, why)
    folds = evidence.runtime.numpy("side-effects", "folds").permutation(n) % FOLDS

    def placements(one: str, other: str) -> Values:
        def compute() -> Values:
            return paired_placements(
                *detector_scores(_signals(evidence, one), _signals(evidence, other), folds)
            )

        role = UNLEARNED if UNLEARNED in (one, other) else ORIGINAL
        return evidence.remember(("detectability", one, other), compute, role)

    value, original, among = against_controls(evidence, lambda *pair: float(placements(*pair).mean()))
    items = np.mean([placements(UNLEARNED, role) for role in evidence.control_roles], 0)
    half = 1.96 * float(items.std(ddof=1)) / np.sqrt(n)
    seen = bool(among) and _beyond(value - half, among, DETECTION_SPREAD)
    low, high = max(0.0, value - half), min(1.0, value + half)
    return Finding(
        "side-effects", name, value, low, high, n, "as retrained", "harm", original, among,
        judgement=Judgement.BAD if seen else Judgement.INFORMATION,
        note="AUC of a detector of unlearned against retrained outputs; for controls among each other",
    )  # fmt: skip


def _signals(evidence: Evidence, role: str) -> Values:
    """What a detector sees of an item: log-odds of the true and of the likeliest class, and the entropy."""
    every = probabilities(evidence, role, "forget").numpy()
    chosen = np.stack([true_probability(evidence, role, "forget"), every.max(1)], 1)
    with np.errstate(divide="ignore"):
        odds = (np.log(chosen) - np.log1p(-chosen)).clip(-LOG_ODDS, LOG_ODDS)
    return np.column_stack([odds, stats.entropy(every, axis=1)])
