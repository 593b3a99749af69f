"""Utility and plain forgetting: accuracy on forget, retain and test, per class (checklist A1, D1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.intervals import clopper_pearson, mean_interval
from palimpsest.core.scale import SEED_SPREAD, judged


@audit("utility", code="A1", tasks=("classification",))
@dataclass(frozen=True)
class Utility:
    """Accuracy on forget, retain and test records, per class, beside original and retrained.

    Test records of classes that were forgotten as a whole count as forgetting, not as utility.
    """

    def run(self, evidence: Evidence) -> Outcome:
        """Accuracies with exact intervals; probabilities of the true label with bootstrap intervals."""
        groups = {
            "forget_accuracy": ("forget", None, "knowledge"),
            "retain_accuracy": ("retain", None, "utility"),
            "test_accuracy": ("test", False, "utility"),
            "forget_test_accuracy": ("test", True, "knowledge"),
        }
        findings: list[Finding] = []
        for name, (part, like, meaning) in groups.items():
            if not evidence.has(part):
                continue
            chosen = _group(evidence, part, like)
            if chosen.any():
                findings.append(_accuracy(evidence, name, part, chosen, meaning))
        findings.append(_probability(evidence))
        findings.extend(_worst_class(evidence))
        return Outcome(tuple(findings), {"per_class": tuple(_per_class(evidence))})


def correct(evidence: Evidence, role: str, part: str) -> NDArray[np.bool_]:
    """Whether a model is right, [records].

    Raises:
        InvalidAudit: If the models do not give classes.
    """
    check_classes(evidence)
    predicted = evidence.observe(role, part).logits.argmax(1).numpy()
    return predicted == evidence.labels(part)


def check_classes(evidence: Evidence) -> None:
    """Check that there are classes to be right about.

    Raises:
        InvalidAudit: If the models give numbers.
    """
    if evidence.task.name == "regression":
        raise InvalidAudit("the models give numbers, not classes")


def true_probability(evidence: Evidence, role: str, part: str) -> NDArray[np.float64]:
    """Probability of the true label, [records]."""
    logits = evidence.observe(role, part).logits.double()
    labels = torch.from_numpy(evidence.labels(part).astype(np.int64))
    return logits.softmax(1).gather(1, labels[:, None])[:, 0].numpy()


def _group(evidence: Evidence, part: str, like: bool | None) -> NDArray[np.bool_]:
    records = evidence.records(part)
    if like is None:
        return np.ones(len(records), bool)
    forgotten = evidence.split.like_forgotten(records)
    return forgotten if like else ~forgotten


def _accuracy(evidence: Evidence, name: str, part: str, chosen: NDArray[np.bool_], meaning: Any) -> Finding:
    rate = {role: float(correct(evidence, role, part)[chosen].mean()) for role in evidence.roles}
    n = int(chosen.sum())
    low, high = clopper_pearson(round(rate[UNLEARNED] * n), n)
    finding = Finding(
        "utility",
        name,
        rate[UNLEARNED],
        low,
        high,
        n,
        more_is=meaning,
        original=rate.get(ORIGINAL),
        controls=tuple(rate[role] for role in evidence.control_roles),
    )
    return (
        judged(replace(finding, bears="outputs"), floor=1 / n, prior=SEED_SPREAD)
        if meaning == "knowledge"
        else replace(finding, bears="utility")
    )


def _probability(evidence: Evidence) -> Finding:
    values = {role: true_probability(evidence, role, "forget") for role in evidence.roles}
    low, high = mean_interval(values[UNLEARNED], evidence.runtime.numpy("utility"))
    return judged(
        Finding(
            "utility",
            "forget_probability",
            float(values[UNLEARNED].mean()),
            low,
            high,
            len(values[UNLEARNED]),
            more_is="knowledge",
            original=float(values[ORIGINAL].mean()) if ORIGINAL in values else None,
            controls=tuple(float(values[role].mean()) for role in evidence.control_roles),
            bears="outputs",
            note="mean probability of the true label",
        ),
        prior=SEED_SPREAD,
    )


def _worst_class(evidence: Evidence) -> list[Finding]:
    """The largest loss of accuracy within one retained class, against the lower of original and controls."""
    parts = [part for part in ("retain", "test") if evidence.has(part)]
    if not parts or not evidence.controls:
        return []
    kept = {part: _group(evidence, part, False) for part in parts}
    labels = np.concatenate([evidence.labels(part)[kept[part]] for part in parts])
    classes, index = np.unique(labels, return_inverse=True)
    if not len(classes):
        return []
    counts = np.bincount(index)
    rates = {
        role: np.bincount(
            index, np.concatenate([correct(evidence, role, part)[kept[part]] for part in parts])
        )
        / counts
        for role in evidence.roles
    }
    controls = np.stack([rates[role] for role in evidence.control_roles])

    def change(rate: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
        reference = others.mean(0)
        return rate - (np.minimum(reference, rates[ORIGINAL]) if ORIGINAL in rates else reference)

    changes = change(rates[UNLEARNED], controls)
    left_out = [
        float(change(controls[i], np.delete(controls, i, 0)).min())
        for i in range(len(controls))
        if len(controls) > 1
    ]
    worst = int(changes.argmin())
    return [
        Finding(
            "utility",
            "worst_class_change",
            float(changes[worst]),
            n=int(counts[worst]),
            ideal=0.0,
            more_is="utility",
            controls=tuple(left_out) or (0.0,),
            bears="utility",
            note=f"class {classes[worst]}",
        )
    ]


def _per_class(evidence: Evidence) -> list[Row]:
    rows: list[Row] = []
    for part in ("test", "forget", "retain"):
        if not evidence.has(part):
            continue
        labels = evidence.labels(part)
        for role in evidence.roles:
            right = correct(evidence, role, part)
            for label in np.unique(labels):
                mine = labels == label
                rows.append(
                    {
                        "class": str(label),
                        "part": part,
                        "model": role,
                        "accuracy": float(right[mine].mean()),
                        "n": int(mine.sum()),
                    }
                )
    return rows
