"""The audit of regression: errors, distances to retrained models, membership (checklist A1, A6).

Errors are absolute, in the units of the targets, a mean over targets where there are several. The skill is
1 minus the error as a share of the mean absolute deviation of all training targets from their median: 1 is
perfect, 0 as good as always answering that median. It has the same yardstick on every part, so that losses
of utility can be judged as losses of accuracy are.

A request that empties a range of targets (no retained target lies within that of the forgotten ones) has
test records of its own: those in the range. Their error counts as forgetting, not as utility.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import jensenshannon

from palimpsest.audit.distance import against_controls, not_run
from palimpsest.audit.membership.findings import auc_finding
from palimpsest.audit.membership.population import svc_attack
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.intervals import clopper_pearson, mean_interval
from palimpsest.core.scale import judged
from palimpsest.tasks.regression import Regression as Task

ORIGINAL_SPREAD = 0.25
"""Deviation of the distance from the original between retrainings, as a share of it."""
FEWEST_OTHERS = 2
"""With fewer held-out records membership cannot be asked."""

Values = NDArray[np.float64]
Mask = NDArray[np.bool_]
Compare = Callable[[Values, Values], float]


@audit("regression", code="A1", tasks=("regression",))
@dataclass(frozen=True)
class RegressionErrors:
    """Errors on forget, retain and test records, distances to retrained models, membership.

    A good method raises the error on forget records to the retrained model's, not beyond. Membership is
    asked as published with Deep Regression Unlearning (arXiv 2210.08196): an SVC on the absolute error
    alone, in units of the task's scale, is fitted on training records (those to be forgotten among them)
    against test records; the finding is the share of forget records that it calls members, and the ideal
    is the retrained model's share, not 0. Beside it stands the AUC of the loss on forget records against
    held-out ones (of the same range of targets where a range was forgotten).

    Attributes:
        published: Records a side that the SVC is fitted on, at most.
        bins: Of the histograms of predictions.
    """

    published: int = 2000
    bins: int = 20

    def __post_init__(self) -> None:
        if self.published < 2 or self.bins < 2:
            raise InvalidAudit(f"published and bins must be at least 2: {self}.")

    def run(self, evidence: Evidence) -> Outcome:
        """Errors and skills by part, membership, distances to retrained models and to the original."""
        findings = [*_errors(evidence), *_skills(evidence)]
        findings += [_membership(evidence, self.published), _membership_auc(evidence)]
        if evidence.controls:
            findings += _to_retrained(evidence, self.bins)
        if evidence.original is not None:
            findings += [_to_original(evidence), _max_change(evidence)]
        else:
            findings.append(not_run("regression", "to_original", "the original model is not at hand"))
        return Outcome(tuple(findings), {"prediction_gap": tuple(_gaps(evidence, self.bins))})


def task_of(evidence: Evidence) -> Task:
    """The task, which must be a regression.

    Raises:
        InvalidAudit: If it is another.
    """
    if not isinstance(evidence.task, Task):
        raise InvalidAudit(f"This is measured of regressions, not of {evidence.task.name}.")
    return evidence.task


def targets(evidence: Evidence, part: str) -> Values:
    """Targets of a part in their own units, [records, targets]."""
    records, task = evidence.records(part), task_of(evidence)
    return evidence.remember(("targets", part), lambda: task.all_targets(records), "records")


def predictions(evidence: Evidence, role: str, part: str) -> Values:
    """Predictions of a model in the units of the targets, [records, targets]."""
    outputs = evidence.observe(role, part).logits.double()
    return task_of(evidence).predictions(outputs).numpy()


def errors(evidence: Evidence, role: str, part: str) -> Values:
    """Absolute errors in the units of the targets, [records, targets]."""
    return np.abs(predictions(evidence, role, part) - targets(evidence, part))


def in_forgotten_range(evidence: Evidence, part: str) -> Mask:
    """Which records have targets in a range that the request emptied, [records]; none if it emptied none."""
    wanted = targets(evidence, part)
    if not evidence.has("retain"):
        return np.zeros(len(wanted), bool)
    low, high = targets(evidence, "forget").min(0), targets(evidence, "forget").max(0)
    if _within(targets(evidence, "retain"), low, high).any():
        return np.zeros(len(wanted), bool)
    return _within(wanted, low, high)


def yardstick(evidence: Evidence) -> Values:
    """Mean absolute deviation of all training targets from their median, [targets].

    Raises:
        InvalidAudit: If a target is constant.
    """
    parts = [part for part in ("forget", "retain") if evidence.has(part)]
    trained = np.concatenate([targets(evidence, part) for part in parts])
    deviation = np.abs(trained - np.median(trained, 0)).mean(0)
    if not (deviation > 0).all():
        raise InvalidAudit("a target is the same for all training records: errors have no yardstick")
    return deviation


def wasserstein(one: Values, other: Values) -> float:
    """Wasserstein-1 distance between the distributions of two sets of predictions, a mean over targets.

    Example:
        >>> wasserstein(np.array([[0.0], [1.0]]), np.array([[3.0], [2.0]]))
        2.0
    """
    pairs = zip(one.T, other.T, strict=True)
    return float(np.mean([stats.wasserstein_distance(mine, theirs) for mine, theirs in pairs]))


def js(one: Values, other: Values, bins: int) -> float:
    """Jensen-Shannon divergence in nats between histograms of predictions, a mean over targets.

    The bins are of equal width over the range of both. Equal constants have divergence 0.
    """

    def single(mine: Values, theirs: Values) -> float:
        ends = float(min(mine.min(), theirs.min())), float(max(mine.max(), theirs.max()))
        if ends[0] == ends[1]:
            return 0.0
        first, second = (np.histogram(values, bins, ends)[0] for values in (mine, theirs))
        return float(jensenshannon(first, second) ** 2)

    return float(np.mean([single(a, b) for a, b in zip(one.T, other.T, strict=True)]))


def _within(values: Values, low: Values, high: Values) -> Mask:
    return np.asarray(np.logical_and(values >= low, values <= high).all(axis=1), bool)


def _groups(evidence: Evidence) -> dict[str, tuple[str, Mask]]:
    """Parts of which errors are given, by name, and which of their records count."""
    found = {part: (part, np.ones(len(targets(evidence, part)), bool)) for part in ("forget", "retain")
             if evidence.has(part)}  # fmt: skip
    if evidence.has("test"):
        gone = in_forgotten_range(evidence, "test")
        found.update({"test": ("test", ~gone), "forget_test": ("test", gone)})
    return {name: (part, chosen) for name, (part, chosen) in found.items() if chosen.any()}


def _finding(
    evidence: Evidence,
    name: str,
    rows: dict[str, Values],
    more_is: Literal["knowledge", "utility", "harm", "neutral"] = "neutral",
    bears: Literal["outputs", "utility", ""] = "",
    note: str = "",
) -> Finding:
    """The mean of one value per record and role, with a bootstrap interval."""
    low, high = mean_interval(rows[UNLEARNED], evidence.runtime.numpy("regression", name))
    return Finding(
        "regression", name, float(rows[UNLEARNED].mean()), low, high, len(rows[UNLEARNED]), more_is=more_is,
        original=float(rows[ORIGINAL].mean()) if ORIGINAL in rows else None,
        controls=tuple(float(rows[role].mean()) for role in evidence.control_roles), bears=bears, note=note,
    )  # fmt: skip


def _errors(evidence: Evidence) -> list[Finding]:
    found: list[Finding] = []
    for name, (part, chosen) in _groups(evidence).items():
        rows = {role: errors(evidence, role, part).mean(1)[chosen] for role in evidence.roles}
        finding = _finding(evidence, f"{name}_mae", rows, note="mean absolute error, in units of the target")
        if name.startswith("forget"):
            finding = judged(replace(finding, bears="outputs"), _paired_error(evidence, rows))
        found.append(finding)
    return found


def _paired_error(evidence: Evidence, rows: dict[str, Values]) -> float:
    """Standard error, over records, of original minus mean control."""
    if ORIGINAL not in rows or not evidence.controls:
        return 0.0
    difference = rows[ORIGINAL] - np.mean([rows[role] for role in evidence.control_roles], 0)
    return float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else np.inf


def _skills(evidence: Evidence) -> list[Finding]:
    try:
        unit = yardstick(evidence)
    except InvalidAudit as problem:
        return [not_run("regression", "test_skill", str(problem))]
    note = "1 - error as a share of that of always answering the median of the training targets"
    found: list[Finding] = []
    for name, (part, chosen) in _groups(evidence).items():
        rows = {role: 1 - (errors(evidence, role, part) / unit).mean(1)[chosen] for role in evidence.roles}
        forgotten = name.startswith("forget")
        meaning, bears = ("knowledge", "") if forgotten else ("utility", "utility")
        found.append(_finding(evidence, f"{name}_skill", rows, meaning, bears, note))
    return found


def _membership(evidence: Evidence, limit: int) -> Finding:
    """Share of the forget records that the published attack calls members."""
    if not (evidence.has("retain") and evidence.has("test")):
        return not_run("regression", "membership", "the attack is fitted on retained and test records")
    scale = np.asarray(task_of(evidence).scale, np.float64)

    def rows(role: str, part: str) -> Values:
        return (errors(evidence, role, part) / scale).mean(1, keepdims=True)

    random = evidence.runtime.numpy("regression", "membership")
    counts = [len(evidence.records(part)) for part in ("forget", "retain", "test")]
    size = min(limit, counts[0] + counts[1], counts[2])
    if size < FEWEST_OTHERS:
        return not_run("regression", "membership", f"there are {size} records a side to fit the attack on")
    inside, outside = random.permutation(counts[0] + counts[1])[:size], random.permutation(counts[2])[:size]
    share: dict[str, float] = {}
    for role in evidence.roles:
        train = np.concatenate([rows(role, "forget"), rows(role, "retain")])
        share[role] = 1 - svc_attack(train[inside], rows(role, "test")[outside], rows(role, "forget"))
    low, high = clopper_pearson(round(share[UNLEARNED] * counts[0]), counts[0])
    finding = Finding(
        "regression", "membership", share[UNLEARNED], low, high, counts[0], more_is="knowledge",
        original=share.get(ORIGINAL), controls=tuple(share[role] for role in evidence.control_roles),
        note="share of forget records called member by an SVC on the absolute error, as published; "
             f"fitted on {size} training and {size} test records",
    )  # fmt: skip
    return judged(finding, floor=1 / counts[0])


def _membership_auc(evidence: Evidence) -> Finding:
    """AUC of the loss on forget records against held-out ones."""
    name = "membership_auc"
    if not evidence.has("holdout"):
        return not_run("regression", name, "the split has no holdout part")
    alike = in_forgotten_range(evidence, "holdout")
    chosen = alike if in_forgotten_range(evidence, "forget").any() else np.ones(len(alike), bool)
    if chosen.sum() < FEWEST_OTHERS or len(evidence.records("forget")) < FEWEST_OTHERS:
        return not_run(
            "regression", name, f"there are {int(chosen.sum())} held-out records like the forgotten"
        )
    losses = {
        role: (
            -evidence.observe(role, "forget").loss.double().numpy(),
            -evidence.observe(role, "holdout").loss.double().numpy()[chosen],
        )
        for role in evidence.roles
    }
    try:
        finding = auc_finding("regression", name, losses, "of the loss")
    except InvalidAudit as problem:
        return not_run("regression", name, str(problem))
    return replace(finding, bears="outputs")


def _to_retrained(evidence: Evidence, bins: int) -> list[Finding]:
    """Distances of the predictions on the forget records to those of retrained models."""
    wanted = np.abs(targets(evidence, "forget"))
    known = wanted > 0
    measures: dict[str, tuple[Compare, str]] = {
        "w1_to_retrained": (wasserstein, "Wasserstein-1 distance between distributions of predictions"),
        "js_to_retrained": (
            lambda a, b: js(a, b, bins),
            f"Jensen-Shannon divergence in nats between histograms of {bins} bins",
        ),
        "gap_to_retrained": (lambda a, b: float(np.abs(a - b).mean()), "mean |prediction - retrained's|"),
    }
    if known.any():
        measures["relative_gap_to_retrained"] = (
            lambda a, b: float((np.abs(a - b)[known] / wanted[known]).mean()),
            "mean |prediction - retrained's| as a share of the target",
        )
    n = len(evidence.records("forget"))
    found: list[Finding] = []
    for name, (compare, what) in measures.items():

        def between(one: str, other: str, compare: Compare = compare) -> float:
            return compare(predictions(evidence, one, "forget"), predictions(evidence, other, "forget"))

        value, original, among = against_controls(evidence, between)
        note = f"{what}; on forget records; for controls among each other"
        found.append(
            Finding("regression", name, value, n=n, original=original, controls=among, note=note, ideal=0.0)
        )
    return found


def _to_original(evidence: Evidence) -> Finding:
    """Minus the mean distance of the predictions on the forget records from the original's."""
    first = predictions(evidence, ORIGINAL, "forget")
    rows = {role: -np.abs(predictions(evidence, role, "forget") - first).mean(1) for role in evidence.roles}
    note = "minus the mean |prediction - original's| on the forget records"
    finding = _finding(evidence, "to_original", rows, "knowledge", note=note)
    if not evidence.controls:
        return finding
    finding = replace(finding, bears="lineage")
    usual = float(np.mean(finding.controls))
    return judged(finding, _paired_error(evidence, rows), prior=ORIGINAL_SPREAD * abs(usual))


def _max_change(evidence: Evidence) -> Finding:
    change, n = 0.0, 0
    for part in evidence.split.parts:
        first, mine = (evidence.observe(role, part).logits for role in (ORIGINAL, UNLEARNED))
        change, n = max(change, float((first - mine).abs().max())), n + len(first)
    note = "largest change of an output against the original, over all parts"
    return Finding("regression", "max_change", change, n=n, original=0.0, note=note)


def _gaps(evidence: Evidence, bins: int) -> Sequence[Row]:
    """Histogram of |prediction - retrained's| on the forget records, against the first control."""
    if not evidence.controls:
        return []
    first = predictions(evidence, evidence.control_roles[0], "forget")
    gap = {
        role: np.abs(predictions(evidence, role, "forget") - first).mean(1)
        for role in evidence.roles
        if role != evidence.control_roles[0]
    }
    top = max(float(values.max()) for values in gap.values()) or 1.0
    rows: list[Row] = []
    for role, values in gap.items():
        counts, edges = np.histogram(values, bins, (0, top))
        rows += [
            {"model": role, "low": float(low), "high": float(high), "share": float(count / len(values))}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
    return rows
