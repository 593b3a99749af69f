"""The published protocol of representation-level evaluation (UUEF, arXiv 2503.06991), set by set.

On every set, the forget and retain records, test records of forgotten and of other classes, and downstream
data of the user's: linear CKA to the retrained and to the original model as the mean over batches, and the
accuracy of nearest neighbours on a fixed split, on features and, under its own name, on logits. What is right
is what retrained models show on the same set; a high or a low value says nothing by itself.

Downstream data show transfer: classes forgotten near the downstream task (`forget_list`) cost a retrained
model some of it, and a method that only hides them nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from palimpsest.audit.distance import against_controls, not_run
from palimpsest.audit.feature_sets import FeatureSet, layer_name, sets_of
from palimpsest.audit.probing import RANDOM, seed_spread
from palimpsest.audit.representation import CKA_SPREAD
from palimpsest.audit.set_measures import FEWEST_IN_BATCH, batches_note
from palimpsest.audit.set_measuring import Measuring
from palimpsest.audit.similarity import Kernel, Short, composite, harmonic_mean
from palimpsest.audit.uuef_series import by_layer, picture, table
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter, ModelMismatch
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.intervals import clopper_pearson
from palimpsest.core.scale import judged
from palimpsest.core.unlearner import check_range

UNCHANGED = 1e-6
"""Features whose CKA to the original's is 1 up to this are the original's: what they held, they hold."""
COMPARED = ("forget", "retain")
"""Sets whose CKA counts in AGR, and whose neighbours do unless others are named."""
OURS = "closeness to retrained models, 1 is the same; our aggregation"


@audit("uuef", code="C1", tasks=("classification",), default=False)
@dataclass(frozen=True)
class UUEF:
    """CKA, neighbours and transfer on every set, beside original, retrained and random models.

    A method that changes nothing but the classifier shows the original's features: a CKA of exactly 1 to the
    original on the forget records. That counts as still inside, for a new classifier would read it all. Any
    other closeness to the original tells lineage only. Both only where retrained models differ clearly.

    Deviations from the released code: features are the input of the head (the released neighbours run on the
    outputs, which are reported as `..._knn_logits`); a last batch of fewer than 16 rows joins the one before
    (there it counts fully, whatever it holds); a set of one class has neighbours among its counterpart too,
    since alone it would always be told rightly; beside the biased CKA stands the debiased one. AGL, AGR and H-LR
    are our aggregation: AGL the product over accuracies of 1 - |gap to retrained|; AGR that of CKA to retrained
    on forget and retain records and of 1 - |gap| of the neighbours; H-LR their harmonic mean.

    Attributes:
        downstream: Further sets by name: Records with labels, whose inputs are prepared as the model takes
            them; in recipes a mapping with `data` (a data set by name), `labels`, and its settings.
        batch_size: Rows per batch of CKA, at least 16.
        order: "stored" as published; "mixed" deals the records out at random, alike for all models, which
            matters where they lie sorted by class.
        kernel: "linear" or "rbf".
        short: "merge" a last batch of fewer than 16 rows with the one before, or "drop" it.
        neighbours: k of the nearest neighbours (cosine distance, equal votes).
        split_seed: Of the split into 80 % neighbours and 20 % queries; published: 2.
        retain_share: Share of the retained neighbours that is used (ImageNet: 0.1).
        layer: Module whose pooled output are the features; the input of the head by default.
        agr_sets: Sets whose neighbours count in AGR; forget, retain and the downstream ones by default.
        picture: At most this many records of a group in the picture of the features; 0 draws none.
    """

    downstream: Mapping[str, Any] = field(default_factory=dict[str, Any])
    batch_size: int = 512
    order: Literal["stored", "mixed"] = "stored"
    kernel: Kernel = "linear"
    short: Short = "merge"
    neighbours: int = 5
    split_seed: int = 2
    retain_share: float = 1.0
    layer: str | None = None
    agr_sets: Sequence[str] | None = None
    picture: int = 120

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, FEWEST_IN_BATCH, float("inf"))
        check_range("neighbours", self.neighbours, 1, float("inf"))
        check_range("retain_share", self.retain_share, 0, 1, open_low=True)
        check_range("picture", self.picture, 0, float("inf"))
        for name, value, known in (
            ("order", self.order, ("stored", "mixed")),
            ("kernel", self.kernel, ("linear", "rbf")),
            ("short", self.short, ("merge", "drop")),
        ):
            if value not in known:
                raise InvalidHyperparameter(f"{name} must be one of {', '.join(known)}, not {value!r}.")

    def run(self, evidence: Evidence) -> Outcome:
        """Findings by set and composites; series: the table, CKA by layer, and the picture.

        Raises:
            InvalidAudit: If a model has no such layer, or a set cannot be used; before any work.
        """
        for role in evidence.roles:
            if self.layer is not None:
                layer_name(evidence.model(role), self.layer)
        sets = {item.name: item for item in sets_of(evidence, self.downstream)}
        unknown = sorted(set(self.agr_sets or ()) - set(sets))
        if unknown:
            raise InvalidAudit(f"agr_sets names '{unknown[0]}'; the sets are {', '.join(sets)}.")
        work = Measuring(
            evidence, sets, self.batch_size, self.order, self.kernel, self.short, self.neighbours,
            self.split_seed, self.retain_share, self.layer,
        )  # fmt: skip
        findings: list[Finding] = []
        for name, measure in self._measures(work).items():
            try:
                findings.append(measure(name))
            except (InvalidAudit, ModelMismatch) as problem:
                findings.append(not_run("uuef", name, str(problem)))
        series = {"uuef": table(work), "uuef_layers": by_layer(work)}
        if self.picture:
            series["features"] = picture(work, self.picture)
        return Outcome(tuple(findings), {name: tuple(rows) for name, rows in series.items() if rows})

    def _measures(self, work: Measuring) -> dict[str, Callable[[str], Finding]]:
        """How to come to every finding, by name."""
        found: dict[str, Callable[[str], Finding]] = {}
        for name, item in work.sets.items():
            found[f"{name}_cka_to_retrained"] = partial(_to_retrained, work, item)
            found[f"{name}_cka_to_original"] = partial(_to_original, work, item)
            found[f"{name}_knn"] = partial(_neighbours, work, item, False)
            found[f"{name}_knn_logits"] = partial(_neighbours, work, item, True)
            found[f"{name}_knn_above_random"] = partial(_above_random, work, item)
        chosen = self.agr_sets
        if chosen is None:
            chosen = [name for name, item in work.sets.items() if name in COMPARED or item.downstream]
        return found | dict.fromkeys(("agl", "agr", "h_lr"), partial(_composite, work, tuple(chosen)))


def _about(work: Measuring, item: FeatureSet, other: str) -> str:
    features, batches = work.seen(UNLEARNED, item).features, work.cka_and_batches(item, UNLEARNED, other)[1]
    try:
        debiased = f"debiased {work.cka(item, UNLEARNED, other, True):.3f}"
    except InvalidAudit:
        debiased = "not defined debiased"
    said = batches_note(features, item.labels, work.batch_size, batches)
    return f"mean {work.kernel} CKA of {work.where}, {debiased}; {said}"


def _to_retrained(work: Measuring, item: FeatureSet, name: str) -> Finding:
    value, original, among = against_controls(work.evidence, lambda one, other: work.cka(item, one, other))
    gap = f"; {value - np.mean(among):+.3f} to the retrained among each other" if among else ""
    note = _about(work, item, work.evidence.control_roles[0]) + gap
    n = len(item.records)
    return Finding("uuef", name, value, n=n, original=original, controls=among, note=note)


def _to_original(work: Measuring, item: FeatureSet, name: str) -> Finding:
    if work.evidence.original is None:
        raise InvalidAudit("The original model is not at hand.")
    value = work.cka(item, UNLEARNED, ORIGINAL)
    controls = tuple(work.cka(item, role, ORIGINAL) for role in work.evidence.control_roles)
    gap = f"; {value - np.mean(controls):+.3f} to retrained" if controls else ""
    forget = item.name == "forget"
    finding = Finding(
        "uuef", name, value, n=len(item.records), original=1.0, controls=controls,
        more_is="knowledge" if forget else "neutral", note=_about(work, item, ORIGINAL) + gap,
    )  # fmt: skip
    if not controls:
        return finding
    if forget and value >= 1 - UNCHANGED:
        said = "the features are the original's: only what comes after them was changed"
        finding = replace(finding, bears="inside", note=f"{said}; {finding.note}")
    elif forget:
        finding = replace(finding, bears="lineage")
    return judged(finding, prior=CKA_SPREAD * (1 - float(np.mean(controls))))


def _neighbours(work: Measuring, item: FeatureSet, on_logits: bool, name: str) -> Finding:
    rates = {role: work.knn(item, role, on_logits) for role in work.evidence.roles}
    (rate, n), controls = rates[UNLEARNED], _of_controls(work, rates)
    gap = f"{rate - np.mean(controls):+.3f} to retrained" if controls else "no retrained model"
    beside = work.partner(item)
    among = f", among {item.name} and {beside.name} records" if beside is not None else ""
    said = f"{work.neighbours} neighbours on {'the logits' if on_logits else work.where}{among}"
    forget = item.name == "forget"
    finding = Finding(
        "uuef", name, rate, *clopper_pearson(round(rate * n), n), n,
        more_is="knowledge" if forget else "neutral",
        original=rates[ORIGINAL][0] if ORIGINAL in rates else None, controls=controls,
        bears="inside" if forget and not on_logits else "",
        note=f"{gap}; {_random(work, item, on_logits)}; {said}",
    )  # fmt: skip
    return judged(finding, floor=1 / n, prior=seed_spread(controls)) if forget else finding


def _random(work: Measuring, item: FeatureSet, on_logits: bool) -> str:
    try:
        return f"{work.knn(item, RANDOM, on_logits)[0]:.3f} with random weights"
    except (InvalidAudit, ModelMismatch) as problem:
        return f"no random reference: {problem}"


def _above_random(work: Measuring, item: FeatureSet, name: str) -> Finding:
    floor, n = work.knn(item, RANDOM)
    gains = {role: (work.knn(item, role)[0] - floor, n) for role in work.evidence.roles}
    return Finding(
        "uuef", name, gains[UNLEARNED][0], n=n, controls=_of_controls(work, gains),
        original=gains[ORIGINAL][0] if ORIGINAL in gains else None,
        note=f"neighbours on features less {floor:.3f} with random weights: what training brought",
    )  # fmt: skip


def _of_controls(work: Measuring, values: Mapping[str, tuple[float, int]]) -> tuple[float, ...]:
    return tuple(values[role][0] for role in work.evidence.control_roles)


def _composite(work: Measuring, voted: Sequence[str], name: str) -> Finding:
    answered = [item for item in work.sets.values() if item.part]
    compared = [item for item in answered if item.name in COMPARED]

    def agl(one: str, other: str) -> float:
        return composite([abs(work.accuracy(item, one) - work.accuracy(item, other)) for item in answered])

    def agr(one: str, other: str) -> float:
        votes = [[work.knn(work.sets[name], role)[0] for role in (one, other)] for name in voted]
        gaps = [abs(mine - theirs) for mine, theirs in votes]
        return composite(gaps, [work.cka(item, one, other) for item in compared])

    def both(one: str, other: str) -> float:
        return harmonic_mean(agl(one, other), agr(one, other))

    shown = " and ".join(item.name for item in compared)
    between, what = {
        "agl": (agl, f"accuracies on {', '.join(item.name for item in answered)}"),
        "agr": (agr, f"CKA on {shown}, neighbours on {', '.join(voted)}"),
        "h_lr": (both, "harmonic mean of agl and agr"),
    }[name]
    value, original, among = against_controls(work.evidence, between)
    n = len(work.sets["forget"].records)
    return Finding("uuef", name, value, n=n, original=original, controls=among, note=f"{OURS}: {what}")
