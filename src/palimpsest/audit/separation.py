"""Class separation: is a forgotten class still a class inside (checklist C1, ours)?

A network that was trained on a class pulls its records together and pushes them away from all other
classes, layer by layer. One that never saw the class has no reason to: its records fall in between. A
method that only silences the output leaves the pull in place, in the features or in a layer below, where
this audit sees it. Unlike similarity to the original it says nothing of a model's lineage: a retraining
from the same initial weights lies among the other retrainings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.auditing import audit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome, Row
from palimpsest.core.scale import judged

SEED_SPREAD = 0.25
"""Deviation of the separation between retrainings, as a share of its value (digits, small CNN)."""


@audit("separation", code="C1", parts=("forget", "retain"), tasks=("classification",))
@dataclass(frozen=True)
class Separation:
    """How far a forgotten class stands apart from the retained classes, in every hidden layer.

    Only for classes forgotten as a whole: of others the retrained model knows just as much.
    """

    def run(self, evidence: Evidence) -> Outcome:
        """One finding per hidden layer, and one for the layer in which most is left."""
        labels = evidence.split.forgotten_labels
        if not labels:
            return _not_run("no class is forgotten as a whole")
        measured = {role: separations(evidence, role) for role in evidence.roles}
        depths = min(len(values) for values in measured.values())
        if depths == 0:
            return _not_run("a model shows no hidden layer")
        # Layers are matched from the head downwards: a wrapper may hide the first ones, never the last.
        aligned = {role: list(values.items())[-depths:] for role, values in measured.items()}
        n = int(np.isin(evidence.labels("forget"), labels).sum())
        findings = [_finding(aligned, position, n) for position in range(depths)]
        rows: list[Row] = [
            {"model": role, "layer": layer, "order": order, "separation": value}
            for role, layers in aligned.items()
            for order, (layer, value) in enumerate(layers)
        ]
        return Outcome((*findings, *_strongest(findings)), {"separation": tuple(rows)})


def class_separation(
    forgotten: Float[Tensor, "records dim"],
    retained: Float[Tensor, "others dim"],
    labels: NDArray[np.int64],
) -> float:
    """Squared distance from a class's mean to the nearest retained class's mean, over its own variance.

    Vectors are scaled to unit length first, so that the scale of a layer does not matter.

    Args:
        forgotten: Representations of the forgotten class.
        retained: Representations of retained records.
        labels: Their classes, [others].

    Returns:
        At least 0; 0 also for representations that are all alike.
    """
    own = F.normalize(forgotten.double(), dim=1)
    others = F.normalize(retained.double(), dim=1)
    _, index = np.unique(labels, return_inverse=True)
    classes = torch.from_numpy(index)
    count = int(classes.max()) + 1
    sums = torch.zeros(count, others.shape[1], dtype=torch.float64).index_add_(0, classes, others)
    means = sums / torch.bincount(classes, minlength=count)[:, None]
    scatter = float(own.var(0, unbiased=False).sum())
    apart = float(((means - own.mean(0)) ** 2).sum(1).min())
    return apart / scatter if scatter > 1e-12 else 0.0


def separations(evidence: Evidence, role: str) -> dict[str, float]:
    """Class separation by layer, mean over the forgotten classes: hidden layers, then the features."""
    forget, retain = evidence.observe(role, "forget"), evidence.observe(role, "retain")
    names = list(forget.layers)[:-1]
    views = {name: (forget.layers[name], retain.layers[name]) for name in names}
    if forget.features is not None and retain.features is not None:
        views["features"] = (forget.features, retain.features)
    own, other = evidence.labels("forget"), evidence.labels("retain")
    gone = evidence.split.forgotten_labels
    return {
        name: float(np.mean([class_separation(mine[own == label], theirs, other) for label in gone]))
        for name, (mine, theirs) in views.items()
    }


def _finding(aligned: dict[str, list[tuple[str, float]]], position: int, n: int) -> Finding:
    value = {role: layers[position][1] for role, layers in aligned.items()}
    controls = tuple(value[role] for role in value if role not in (ORIGINAL, UNLEARNED))
    finding = Finding(
        "separation",
        aligned[UNLEARNED][position][0],
        value[UNLEARNED],
        n=n,
        more_is="knowledge",
        original=value.get(ORIGINAL),
        controls=controls,
    )
    return judged(finding, prior=SEED_SPREAD * float(np.mean(controls))) if controls else finding


def _strongest(findings: list[Finding]) -> list[Finding]:
    """The valid layer with the highest K, as the finding that the verdict reads."""
    valid = [finding for finding in findings if finding.valid and finding.k is not None]
    if not valid:
        return []
    best = max(valid, key=lambda finding: finding.k or 0.0)
    note = f"layer '{best.name}', of {len(valid)} in which the probe is valid"
    return [replace(best, name="strongest", bears="inside", note=note)]


def _not_run(why: str) -> Outcome:
    return Outcome((Finding("separation", "strongest", None, judgement=Judgement.NOT_RUN, note=why),))
