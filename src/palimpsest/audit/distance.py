"""Distance of the outputs to those of retrained models, and to the original's (checklist A1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit, ModelMismatch
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence, observe_all
from palimpsest.core.finding import Finding, Judgement, Outcome
from palimpsest.core.intervals import mean_interval
from palimpsest.core.scale import judged
from palimpsest.core.task import Observation
from palimpsest.parts.distillation import js_divergence
from palimpsest.parts.reinitialise import reinitialised

SEED_SPREAD = 0.25
"""Deviation of the divergence from the original between retrainings, as a share of it (digits)."""
FINITE = 1e30
"""Logits are cut to this size: beyond it a probability is 0 or 1 anyway, and no infinity gives NaN."""
Probabilities = Float[Tensor, "records classes"]
PerRecord = Callable[[Tensor, Tensor], NDArray[np.float64]]


@audit("distance", code="A1", tasks=("classification",))
@dataclass(frozen=True)
class Distance:
    """How far the outputs are from those of models retrained without the forget records.

    Every distance is the mean over the controls; beside it stands the distance of the controls among each
    other, because two honest retrainings differ too.

    Attributes:
        zrf: Whether to compute the zero-retrain-forgetting score, which needs a randomly initialised
            network (one more forward pass over the forget records).
    """

    zrf: bool = True

    def run(self, evidence: Evidence) -> Outcome:
        """Agreement, divergence, activation distance, completeness, ZRF, closeness to the original."""
        findings: list[Finding] = []
        for part in ("forget", "retain", "test"):
            if evidence.has(part):
                findings += [_to_retrained(evidence, part, name) for name in MEASURES]
        if evidence.controls:
            findings.append(_completeness(evidence))
        if evidence.original is not None:
            findings += [_to_original(evidence), _max_change(evidence)]
        else:
            findings.append(not_run("distance", "js_to_original", "the original model is not at hand"))
        if self.zrf:
            findings.append(_zrf(evidence))
        return Outcome(tuple(findings))


def agreement(p: Probabilities, q: Probabilities) -> NDArray[np.float64]:
    """1 where both predict the same class, else 0, [records]."""
    return (p.argmax(1) == q.argmax(1)).double().numpy()


def js(p: Probabilities, q: Probabilities) -> NDArray[np.float64]:
    """Jensen-Shannon divergence in nats, [records]."""
    return js_divergence(p, q, "none").numpy()


def activation_distance(p: Tensor, q: Tensor) -> NDArray[np.float64]:
    """Euclidean distance of probabilities or features, [records] (Golatkar et al. 2021, arXiv 2012.13431).

    Raises:
        InvalidAudit: If the widths differ.
    """
    if p.shape != q.shape:
        raise InvalidAudit(f"Features of shape {tuple(p.shape)} and {tuple(q.shape)} have no distance.")
    return (p - q).norm(dim=1).numpy()


def completeness(p: Probabilities, q: Probabilities) -> float:
    """Jaccard index of the two sets of (record, predicted class): 1 if all predictions agree."""
    return float(_jaccard(agreement(p, q).mean()))


def zrf(
    probabilities: Probabilities,
    reference_probabilities: Probabilities,
    reduction: Literal["elementwise", "batchmean"] = "elementwise",
) -> float:
    """Zero-retrain forgetting: 1 - divergence from a randomly initialised network (arXiv 2205.08096).

    Args:
        probabilities: Of the model.
        reference_probabilities: Of the random network.
        reduction: "elementwise" is the published code's: the divergences of the mixture from either, averaged
            over records and classes (-inf where only one of the two gives a class no probability at all).
            "batchmean" is the Jensen-Shannon divergence as defined, averaged over records.
    """
    if reduction == "elementwise":
        return 1 - float(js_divergence(probabilities, reference_probabilities, "mean", from_mixture=True))
    return 1 - float(js_divergence(probabilities, reference_probabilities, "batchmean"))


def against_controls(
    evidence: Evidence, between: Callable[[str, str], float]
) -> tuple[float, float | None, tuple[float, ...]]:
    """A comparison of two models, with the controls as partners.

    Args:
        evidence: The models.
        between: The comparison, given two roles.

    Returns:
        Mean over the controls for the unlearned model, the same for the original (None if it is not at
        hand), and the comparisons of the controls among each other (none for a single one).

    Raises:
        InvalidAudit: If there is no control.
    """
    controls = evidence.control_roles
    if not controls:
        raise InvalidAudit("There is no retrained model to compare with.")
    value = float(np.mean([between(UNLEARNED, role) for role in controls]))
    original = None
    if evidence.original is not None:
        original = float(np.mean([between(ORIGINAL, role) for role in controls]))
    return value, original, tuple(between(*pair) for pair in combinations(controls, 2))


def random_network(evidence: Evidence, part: str) -> Observation:
    """What a randomly initialised network of the same architecture shows of a part; computed once.

    Raises:
        ModelMismatch: If the architecture cannot be initialised anew.
    """
    role = ORIGINAL if evidence.original is not None else UNLEARNED

    def observe() -> Observation:
        runtime = evidence.runtime.with_seed(evidence.runtime.derive("random network"))
        fresh = reinitialised(evidence.model(role), runtime)
        return observe_all(fresh, evidence.records(part), evidence.task, runtime)

    return evidence.remember(("random network", part), observe, role)


def not_run(audit: str, name: str, why: str) -> Finding:
    """The finding of what could not be measured."""
    return Finding(audit, name, None, judgement=Judgement.NOT_RUN, note=why)


MEASURES: dict[str, PerRecord] = {
    "agreement": agreement,
    "js": js,
    "activation_distance": activation_distance,
    "feature_distance": activation_distance,
}
"""Distances per record; the last is of the features, the others of the probabilities."""


def probabilities(evidence: Evidence, role: str, part: str) -> Probabilities:
    """Probabilities of all classes, in float64."""
    return _softmax(evidence.observe(role, part))


def _softmax(seen: Observation) -> Probabilities:
    return seen.logits.double().clamp(-FINITE, FINITE).softmax(1)


def _features(evidence: Evidence, role: str, part: str) -> Tensor:
    found = evidence.observe(role, part).features
    if found is None:
        raise InvalidAudit(f"The {role} model shows no layer before its outputs.")
    return found.double()


def _jaccard(agreeing: NDArray[np.float64]) -> NDArray[np.float64]:
    """Predictions in common over all predictions, n a / (2 n - n a), for a share a that agrees."""
    return agreeing / (2 - agreeing)


def _rows(evidence: Evidence, name: str, part: str, one: str, other: str) -> NDArray[np.float64]:
    """A distance between two models, [records]."""

    def compute() -> NDArray[np.float64]:
        view = _features if name == "feature_distance" else probabilities
        return MEASURES[name](view(evidence, one, part), view(evidence, other, part))

    owner = UNLEARNED if UNLEARNED in (one, other) else ORIGINAL
    return evidence.remember(("distance", name, part, one, other), compute, owner)


def _to_retrained(evidence: Evidence, part: str, name: str) -> Finding:
    key, note = f"{part}_{name}", "to the retrained models; for controls among each other"
    if name == "feature_distance":
        note = f"Euclidean, {note}; the units of two trainings are in no common order"
    try:
        value, original, among = against_controls(
            evidence, lambda one, other: float(_rows(evidence, name, part, one, other).mean())
        )
    except InvalidAudit as problem:
        return not_run("distance", key, str(problem))
    rows = np.mean([_rows(evidence, name, part, UNLEARNED, role) for role in evidence.control_roles], 0)
    low, high = mean_interval(rows, evidence.runtime.numpy("distance", key))
    return Finding("distance", key, value, low, high, len(rows), original=original, controls=among, note=note)


def _completeness(evidence: Evidence) -> Finding:
    def agreeing_in(one: str, other: str) -> NDArray[np.float64]:
        return _rows(evidence, "agreement", "forget", one, other)

    value, original, among = against_controls(
        evidence, lambda one, other: float(_jaccard(agreeing_in(one, other).mean()))
    )
    agreeing = np.stack([agreeing_in(UNLEARNED, role) for role in evidence.control_roles], 1)
    n, random = len(agreeing), evidence.runtime.numpy("distance", "completeness")
    drawn = random.multinomial(n, np.full(n, 1 / n), size=1000) / n @ agreeing
    low, high = np.quantile(_jaccard(drawn).mean(1), [0.025, 0.975])
    note = "Jaccard index of predictions with the retrained models'; for controls among each other"
    ends = float(low), float(high)
    return Finding(
        "distance", "forget_completeness", value, *ends, n, original=original, controls=among, note=note
    )


def _to_original(evidence: Evidence) -> Finding:
    first = probabilities(evidence, ORIGINAL, "forget")
    rows = {role: js(probabilities(evidence, role, "forget"), first) for role in evidence.roles}
    controls = tuple(-float(rows[role].mean()) for role in evidence.control_roles)
    low, high = mean_interval(-rows[UNLEARNED], evidence.runtime.numpy("distance", "original"))
    note = "minus the Jensen-Shannon divergence from the original's outputs on the forget records"
    value, n = 0.0 - float(rows[UNLEARNED].mean()), len(first)
    finding = Finding(
        "distance", "js_to_original", value, low, high, n, more_is="knowledge", original=0.0,
        controls=controls, bears="lineage" if controls else "", note=note,
    )  # fmt: skip
    if not controls:
        return finding
    sampling = float(np.mean([rows[role] for role in evidence.control_roles], 0).std() / np.sqrt(n))
    return judged(finding, sampling, prior=SEED_SPREAD * abs(float(np.mean(controls))))


def _max_change(evidence: Evidence) -> Finding:
    change, n = 0.0, 0
    for part in evidence.split.parts:
        first, mine = probabilities(evidence, ORIGINAL, part), probabilities(evidence, UNLEARNED, part)
        change, n = max(change, float((first - mine).abs().max())), n + len(first)
    note = "largest change of a probability against the original, over all parts"
    return Finding("distance", "max_change", change, n=n, original=0.0, note=note)


def _zrf(evidence: Evidence) -> Finding:
    try:
        taught = _softmax(random_network(evidence, "forget"))
    except ModelMismatch as problem:
        return not_run("distance", "zrf", str(problem))
    seen = {role: probabilities(evidence, role, "forget") for role in evidence.roles}
    low, high = mean_interval(1 - js(seen[UNLEARNED], taught), evidence.runtime.numpy("distance", "zrf"))
    value = {role: zrf(own, taught, "batchmean") for role, own in seen.items()}
    note = "1 - Jensen-Shannon divergence from a randomly initialised network, on the forget records"
    controls = tuple(value[role] for role in evidence.control_roles)
    return Finding(
        "distance", "zrf", value[UNLEARNED], low, high, len(taught), original=value.get(ORIGINAL),
        controls=controls, note=note,
    )  # fmt: skip
