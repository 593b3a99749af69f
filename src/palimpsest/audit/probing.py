"""Probes of the features: can the forgotten still be read out of them (checklist C1)?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.distance import not_run, random_network
from palimpsest.audit.similarity import knn_predictions
from palimpsest.audit.utility import check_classes
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.intervals import clopper_pearson
from palimpsest.core.scale import judged

SEED_SPREAD = {"linear": 0.1, "neighbours": 0.13, "few_shot_linear": 0.13, "few_shot_neighbours": 0.13}
"""Prior deviation of a probe's accuracy p between retrainings, as a share of sqrt(p (1 - p)) (ten classes of
the digits, small CNN, five retrainings each)."""
INVERSE_PENALTY = 0.1
"""C of the logistic regression: one value for all models, since a search would cost more than the probe."""
SHUFFLES = 3
"""How often the labels of the control task are shuffled."""
LOGIT = 1e4
"""Logits are cut to this size: a class masked by -inf leaves a direction that can be compared."""
QUERIES = 0.2
"""Share of the training records whose neighbours `neighbour_accuracy` looks for among the others."""
RANDOM = "random"
"""Role of a randomly initialised network."""

Rows = NDArray[np.float64]
Labels = NDArray[np.int64]
Places = dict[str, Labels]
"""Positions of records, by part of the split."""
Reader = Callable[[Rows, Labels, Rows], Labels]
"""Given rows and labels to fit on, and further rows: the labels of these."""


@audit("probe", code="C1", parts=("forget", "retain"), tasks=("classification",))
@dataclass(frozen=True)
class Probe:
    """Fit small readers on the features and test them on forget records that they were not fitted on.

    A reader of a class that was forgotten as a whole needs labelled examples of it, which retained records
    are not. The full readers take the holdout's records of such classes, on which no model was trained,
    beside all retained records. The few-shot readers take `shots` records of every class, those of
    forgotten classes from the forget records (tested on the others): what an attacker with a handful of
    examples can do, as a mean over several draws. Where no class is forgotten as a whole, all readers are
    fitted on retained records alone. On easy data good features let even a retrained model's probe
    succeed; then the probe has no range and is invalid.

    Attributes:
        shots: Records per class that few-shot readers are fitted on.
        draws: How often they are drawn.
        neighbours: k of the nearest neighbours (cosine distance).
        most: The full readers use at most this many retained records.
    """

    shots: int = 5
    draws: int = 5
    neighbours: int = 5
    most: int = 1000

    def __post_init__(self) -> None:
        if min(self.shots, self.draws, self.neighbours) < 1 or self.most < 10:
            raise InvalidHyperparameter("shots, draws and neighbours must be at least 1, most at least 10.")

    def run(self, evidence: Evidence) -> Outcome:
        """Accuracy of the probes on forget records, and the selectivity of the linear one."""
        probes: dict[str, tuple[Reader, Callable[[Evidence], list[Places]]]] = {
            "linear": (read_linearly, self._full),
            "neighbours": (self._vote, self._full),
            "few_shot_linear": (read_linearly, self._few),
            "few_shot_neighbours": (self._vote, self._few),
        }
        found: list[Finding] = []
        for name, (read, draw) in probes.items():
            try:
                found.append(self._finding(evidence, name, read, draw(evidence)))
                if name == "linear":
                    found.append(self._selectivity(evidence, draw(evidence)))
            except InvalidAudit as problem:
                found.append(not_run("probe", name, str(problem)))
        return Outcome(tuple(found))

    def _full(self, evidence: Evidence) -> list[Places]:
        """Retained records, and the holdout's of forgotten classes."""
        order = evidence.runtime.numpy("probe", "retain").permutation(len(evidence.records("retain")))
        places = {"retain": np.sort(order[: self.most])}
        if evidence.split.forgotten_labels:
            known = set(evidence.labels("holdout")) if evidence.has("holdout") else set[int]()
            missing = [label for label in evidence.split.forgotten_labels if label not in known]
            if missing:
                raise InvalidAudit(f"There is no holdout with examples of class {missing[0]} to fit on.")
            places["holdout"] = np.flatnonzero(evidence.split.like_forgotten(evidence.records("holdout")))
        return [places]

    def _few(self, evidence: Evidence) -> list[Places]:
        """`shots` records of every class, `draws` times."""
        random, draws = evidence.runtime.numpy("probe", "few"), list[Places]()
        gone = evidence.split.forgotten_labels
        for _ in range(self.draws):
            retain = _per_class(evidence.labels("retain"), self.shots, random)
            forget = _per_class(evidence.labels("forget"), self.shots, random, gone)
            draws.append({"retain": retain, "forget": forget})
        return draws

    def _rates(self, evidence: Evidence, name: str, read: Reader, fits: Sequence[Places]) -> dict[str, float]:
        """Accuracy on the forget records that were not fitted on, mean over the fits, by role."""

        def rate(role: str) -> float:
            rates: list[float] = []
            for fit in fits:
                x = np.concatenate([view(evidence, role, part)[where] for part, where in fit.items()])
                y = np.concatenate([evidence.labels(part)[where] for part, where in fit.items()])
                test = _tested(evidence, fit)
                guess = read(x, y, view(evidence, role, "forget")[test])
                rates.append(float((guess == evidence.labels("forget")[test]).mean()))
            return float(np.mean(rates))

        return {
            role: evidence.remember((self, name), lambda role=role: rate(role), role)
            for role in evidence.roles
        }

    def _finding(self, evidence: Evidence, name: str, read: Reader, fits: Sequence[Places]) -> Finding:
        n = min(len(_tested(evidence, fit)) for fit in fits)
        if n < 2:
            raise InvalidAudit(f"Only {n} forget records are left to test on.")
        value = self._rates(evidence, name, read, fits)
        low, high = clopper_pearson(round(value[UNLEARNED] * n), n)
        sizes = ", ".join(f"{len(where)} {part}" for part, where in fits[0].items() if len(where))
        draws = f", mean of {len(fits)} draws" if len(fits) > 1 else ""
        finding = Finding(
            "probe", name, value[UNLEARNED], low, high, n, more_is="knowledge", original=value.get(ORIGINAL),
            controls=tuple(value[role] for role in evidence.control_roles), bears="inside",
            note=f"fitted on {sizes} records{draws}",
        )  # fmt: skip
        return judged(finding, floor=1 / n, prior=seed_spread(finding.controls, SEED_SPREAD[name]))

    def _vote(self, x: Rows, y: Labels, rows: Rows) -> Labels:
        return knn_predictions(x, y, rows, min(self.neighbours, len(x)))

    def _selectivity(self, evidence: Evidence, fits: Sequence[Places]) -> Finding:
        """Accuracy of the linear probe above that of the same one fitted on shuffled labels."""

        def chance(times: int) -> dict[str, float]:
            def read(x: Rows, y: Labels, rows: Rows) -> Labels:
                order = evidence.runtime.numpy("probe", "shuffle", times).permutation(len(y))
                return read_linearly(x, y[order], rows)

            return self._rates(evidence, f"shuffled labels {times}", read, fits)

        linear = self._rates(evidence, "linear", read_linearly, fits)
        shuffled = [chance(times) for times in range(SHUFFLES)]
        luck = {role: float(np.mean([rates[role] for rates in shuffled])) for role in linear}
        gain = {role: linear[role] - luck[role] for role in linear}
        return Finding(
            "probe",
            "selectivity",
            gain[UNLEARNED],
            n=len(_tested(evidence, fits[0])),
            more_is="knowledge",
            original=gain.get(ORIGINAL),
            controls=tuple(gain[role] for role in evidence.control_roles),
            note=f"linear probe less the same on shuffled labels, {luck[UNLEARNED]:.3f}",
        )


def seed_spread(accuracies: Sequence[float], share: float = SEED_SPREAD["neighbours"]) -> float:
    """Prior deviation of a probe's accuracy between retrainings: least near 0 and 1, as of any rate."""
    rate = float(np.clip(np.mean(accuracies), 0.02, 0.98)) if len(accuracies) else 0.5
    return share * float(np.sqrt(rate * (1 - rate)))


def read_linearly(x: Rows, y: Labels, rows: Rows) -> Labels:
    """Predictions of a multinomial logistic regression on standardised features, classes weighted alike."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    reader = LogisticRegression(C=INVERSE_PENALTY, max_iter=500, tol=1e-3, class_weight="balanced")
    return make_pipeline(StandardScaler(), reader).fit(x, y).predict(rows)


def neighbour_accuracy(
    evidence: Evidence, role: str, k: int = 5, on_logits: bool = False
) -> dict[str, tuple[float, int]]:
    """How often k nearest neighbours tell the class of training records: (accuracy, queries) by part.

    A fifth of the forget and of the retained records are the queries, the same ones for all models, the
    others the neighbours.

    Args:
        evidence: With the forget records; retained ones are used if they are at hand.
        role: Of the model, or `RANDOM` for a randomly initialised network.
        k: Number of neighbours.
        on_logits: Look at the outputs instead of the features.

    Raises:
        InvalidAudit: If a model shows no features, there are too few records or classes, or no classes at all.
    """
    check_classes(evidence)
    parts = [part for part in ("forget", "retain") if evidence.has(part)]
    fit: Places = {}
    query: Places = {}
    for part in parts:
        n = len(evidence.records(part))
        order = evidence.runtime.numpy("neighbours", part).permutation(n)
        query[part], fit[part] = np.split(order, [max(1, round(QUERIES * n))])
    labels = np.concatenate([evidence.labels(part)[fit[part]] for part in parts])
    if len(labels) < k or len(np.unique(labels)) < 2:
        raise InvalidAudit(
            f"{len(labels)} records of {len(np.unique(labels))} classes are no set of neighbours."
        )

    def compute() -> dict[str, tuple[float, int]]:
        rows = {part: view(evidence, role, part, on_logits) for part in parts}
        bank = np.concatenate([rows[part][fit[part]] for part in parts])
        found: dict[str, tuple[float, int]] = {}
        for part in parts:
            guess = knn_predictions(bank, labels, rows[part][query[part]], k)
            right = guess == evidence.labels(part)[query[part]]
            found[part] = float(right.mean()), len(right)
        return found

    owner = UNLEARNED if role == UNLEARNED else ORIGINAL
    return evidence.remember(("neighbours", k, on_logits, role), compute, owner)


def view(evidence: Evidence, role: str, part: str, on_logits: bool = False) -> Rows:
    """Features (or logits) of a part, [records, dim].

    Raises:
        InvalidAudit: If the model shows none, or they are infinite.
    """
    seen = random_network(evidence, part) if role == RANDOM else evidence.observe(role, part)
    rows = seen.logits.clamp(-LOGIT, LOGIT) if on_logits else seen.features
    if rows is None:
        raise InvalidAudit(f"The {role} model shows no layer before its outputs.")
    found: Rows = rows.double().numpy()
    if not np.isfinite(found).all():
        raise InvalidAudit(f"The features of the {role} model hold NaN or Inf.")
    return found


def _tested(evidence: Evidence, fit: Places) -> Labels:
    """Positions of the forget records that a probe was not fitted on."""
    return np.setdiff1d(np.arange(len(evidence.records("forget"))), fit.get("forget", np.empty(0, np.int64)))


def _per_class(
    labels: NDArray[np.int64], count: int, random: np.random.Generator, classes: Sequence[int] | None = None
) -> Labels:
    """Positions of `count` random records of every class (of those given)."""
    order = random.permutation(len(labels))
    wanted = np.unique(labels) if classes is None else classes
    chosen = [order[labels[order] == label][:count] for label in wanted]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)
