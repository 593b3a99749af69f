"""Similarity of representations to the original and to retrained models (checklist C1; arXiv 2503.06991)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from palimpsest.audit.distance import against_controls, not_run
from palimpsest.audit.probing import RANDOM, neighbour_accuracy, seed_spread
from palimpsest.audit.similarity import composite, harmonic_mean, matched_names
from palimpsest.audit.utility import correct
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter, ModelMismatch
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.intervals import clopper_pearson
from palimpsest.core.scale import judged
from palimpsest.parts.cka import linear_cka

CKA_SPREAD = 0.25
"""Deviation of 1 - CKA to the original between retrainings, as a share of it (digits, small CNN)."""


@audit("representation", code="C1", tasks=("classification", "regression"))
@dataclass(frozen=True)
class Representation:
    """Linear CKA and nearest neighbours of the features, beside the original and retrained models.

    What is right is what the retrained models show, not a high or a low value. Closeness to the original
    tells lineage: weights that come from the original's are close to it even where the knowledge went, so
    it decides only where nothing else can be seen.

    Deviations: CKA is of `rows` records at once, not a mean over batches. Neighbours are looked for on the
    input of the head (the published code takes the outputs, which a change of the head alone moves; they
    have their own findings), and among forget and retained records together, because a forget set of one
    class by itself would always give 1. The composites are our aggregation (`composite`).

    Attributes:
        debiased: Whether to use the unbiased estimator of CKA, for wide layers and few records.
        rows: At most this many records of a part are compared by CKA, the same ones for all models.
        neighbours: k of the nearest neighbours (cosine distance, equal votes).
        random_reference: Whether to show what a randomly initialised network gives (one more model).
    """

    debiased: bool = False
    rows: int = 500
    neighbours: int = 5
    random_reference: bool = True

    def __post_init__(self) -> None:
        if self.rows < 4 or self.neighbours < 1:
            raise InvalidHyperparameter("rows must be at least 4 and neighbours at least 1.")

    def run(self, evidence: Evidence) -> Outcome:
        """CKA and neighbours on forget and retain records, composites, and a series of CKA by layer."""
        findings: list[Finding] = []
        for name, measure in self._measures(evidence).items():
            try:
                findings += measure(name)
            except InvalidAudit as problem:
                findings.append(not_run("representation", name, str(problem)))
        rows, troubles = self._by_layer(evidence)
        findings += [not_run("representation", "cka_by_layer", trouble) for trouble in troubles[:1]]
        return Outcome(tuple(findings), {"cka": tuple(rows)})

    def _measures(self, evidence: Evidence) -> dict[str, Callable[[str], list[Finding]]]:
        """How to come to the findings, by name (of the first, where several come together)."""
        found: dict[str, Callable[[str], list[Finding]]] = {}
        for part in _parts(evidence):
            prefix = "" if part == "forget" else f"{part}_"
            for suffix, hidden in (("", False), ("_layers", True)):
                found[f"{prefix}cka_to_original{suffix}"] = partial(self._to_original, evidence, part, hidden)
            found[f"{prefix}cka_to_retrained"] = partial(self._to_retrained, evidence, part)
        for suffix, on_logits in (("", False), ("_on_logits", True)):
            found[f"forget_neighbours{suffix}"] = partial(self._neighbours, evidence, on_logits)
        found.update(dict.fromkeys(("agl", "agr", "h_lr"), partial(self._composite, evidence)))
        return found

    def _to_original(self, evidence: Evidence, part: str, hidden: bool, name: str) -> list[Finding]:
        if evidence.original is None:
            raise InvalidAudit("The original model is not at hand.")
        roles = [role for role in evidence.roles if role != ORIGINAL]
        if hidden:
            value = self._hidden(evidence, part, roles)
        else:
            value = {role: self._features(evidence, part, role, ORIGINAL) for role in roles}
        controls = tuple(value[role] for role in evidence.control_roles)
        lineage = part == "forget" and not hidden and bool(controls)
        finding = Finding(
            "representation", name, value[UNLEARNED], n=len(self._chosen(evidence, part)),
            original=1.0, controls=controls,
            more_is="knowledge" if part == "forget" else "neutral", bears="lineage" if lineage else "",
            note=f"linear CKA to the original, {'mean over hidden layers' if hidden else 'of the features'}",
        )  # fmt: skip
        if not controls:
            return [finding]
        return [judged(finding, prior=CKA_SPREAD * (1 - float(np.mean(controls))))]

    def _to_retrained(self, evidence: Evidence, part: str, name: str) -> list[Finding]:
        value, original, among = against_controls(
            evidence, lambda one, other: self._features(evidence, part, one, other)
        )
        note = "mean linear CKA of the features to the retrained models'; for controls among each other"
        n = len(self._chosen(evidence, part))
        return [Finding("representation", name, value, n=n, original=original, controls=among, note=note)]

    def _chosen(self, evidence: Evidence, part: str) -> Tensor:
        """Positions of the records of a part that are compared."""
        order = evidence.runtime.numpy("representation", part).permutation(len(evidence.records(part)))
        return torch.from_numpy(np.sort(order[: self.rows]))

    def _features(self, evidence: Evidence, part: str, one: str, other: str) -> float:
        """CKA of the features of two models.

        Raises:
            InvalidAudit: If a model shows none, or they are alike for all records.
        """

        def compute() -> float:
            mine, theirs = (evidence.observe(role, part).features for role in (one, other))
            if mine is None or theirs is None:
                raise InvalidAudit("A model shows no layer before its outputs.")
            chosen = self._chosen(evidence, part)
            return linear_cka(mine[chosen], theirs[chosen], self.debiased)

        key = ("cka", self.debiased, self.rows, part, one, other)
        return evidence.remember(key, compute, _owner(one, other))

    def _layers(self, evidence: Evidence, part: str, one: str, other: str) -> dict[str, float]:
        """CKA by layer, under the names of `other`; a layer that is the same for all records is left out.

        Raises:
            InvalidAudit: If the layers of the two cannot be matched.
        """

        def compute() -> dict[str, float]:
            mine, theirs = evidence.observe(one, part).layers, evidence.observe(other, part).layers
            chosen, found = self._chosen(evidence, part), dict[str, float]()
            for name, partner in matched_names(_widths(mine), _widths(theirs)):
                try:
                    found[partner] = linear_cka(mine[name][chosen], theirs[partner][chosen], self.debiased)
                except InvalidAudit:  # a dead layer has no similarity to anything
                    continue
            return found

        key = ("cka by layer", self.debiased, self.rows, part, one, other)
        return evidence.remember(key, compute, _owner(one, other))

    def _hidden(self, evidence: Evidence, part: str, roles: Sequence[str]) -> dict[str, float]:
        """Mean CKA to the original over the hidden layers that every model shares with it, by role."""
        found = {role: self._layers(evidence, part, role, ORIGINAL) for role in roles}
        logits = list(evidence.observe(ORIGINAL, part).layers)[-1:]
        shared = [
            name
            for name in found[UNLEARNED]
            if name not in logits and all(name in layers for layers in found.values())
        ]
        if not shared:
            raise InvalidAudit("The models share no hidden layer that differs between records.")
        return {role: float(np.mean([layers[name] for name in shared])) for role, layers in found.items()}

    def _by_layer(self, evidence: Evidence) -> tuple[list[Row], list[str]]:
        """Rows for the chart, every model against the original and the first control; what went wrong."""
        partners = [ORIGINAL] if evidence.original is not None else []
        pairs = [
            (part, partner, role)
            for part in _parts(evidence)
            for partner in [*partners, *evidence.control_roles[:1]]
            for role in evidence.roles
            if role != partner
        ]
        rows: list[Row] = []
        troubles: list[str] = []
        for part, partner, role in pairs:
            about: Row = {"model": role, "against": partner.removesuffix(" 0"), "part": part}
            order = list(evidence.observe(partner, part).layers)
            try:
                layers = self._layers(evidence, part, role, partner)
            except InvalidAudit as problem:
                troubles.append(f"{role} against {partner}: {problem}")
                continue
            rows += [{**about, "layer": k, "order": order.index(k), "cka": v} for k, v in layers.items()]
        return rows, troubles

    def _neighbours(self, evidence: Evidence, on_logits: bool, name: str) -> list[Finding]:
        """Accuracy of nearest neighbours on forget and on retain records."""
        rates = {
            role: neighbour_accuracy(evidence, role, self.neighbours, on_logits) for role in evidence.roles
        }
        chance = self._chance(evidence, on_logits)
        findings: list[Finding] = []
        for part, (rate, n) in rates[UNLEARNED].items():
            low, high = clopper_pearson(round(rate * n), n)
            controls = tuple(rates[role][part][0] for role in evidence.control_roles)
            finding = Finding(
                "representation", name.replace("forget", part), rate, low, high, n,
                more_is="knowledge" if part == "forget" else "neutral",
                original=rates[ORIGINAL][part][0] if ORIGINAL in rates else None, controls=controls,
                note=f"share of right votes among training records{chance.get(part, '')}",
            )  # fmt: skip
            if part == "forget":
                finding = judged(finding, floor=1 / n, prior=seed_spread(finding.controls))
            findings.append(finding)
        return findings

    def _chance(self, evidence: Evidence, on_logits: bool) -> dict[str, str]:
        """What nearest neighbours reach in a randomly initialised network, in words by part."""
        if not self.random_reference:
            return {}
        try:
            rates = neighbour_accuracy(evidence, RANDOM, self.neighbours, on_logits)
        except (InvalidAudit, ModelMismatch) as problem:
            return dict.fromkeys(_parts(evidence), f"; no random reference: {problem}")
        return {part: f"; {rate:.3f} with random weights" for part, (rate, _) in rates.items()}

    def _composite(self, evidence: Evidence, name: str) -> list[Finding]:
        """Closeness to retrained models in one number: of accuracies, of representations, of both."""

        def agl(one: str, other: str) -> float:
            mine, theirs = _accuracies(evidence, one), _accuracies(evidence, other)
            return composite([abs(mine[group] - theirs[group]) for group in mine])

        def agr(one: str, other: str) -> float:
            mine, theirs = (neighbour_accuracy(evidence, role, self.neighbours) for role in (one, other))
            gaps = [abs(mine[part][0] - theirs[part][0]) for part in mine]
            return composite(gaps, [self._features(evidence, part, one, other) for part in mine])

        def both(one: str, other: str) -> float:
            return harmonic_mean(agl(one, other), agr(one, other))

        between, what = {
            "agl": (agl, "accuracies on forget, retain and test"),
            "agr": (agr, "CKA and nearest neighbours on forget and retain"),
            "h_lr": (both, "harmonic mean of agl and agr"),
        }[name]
        value, original, among = against_controls(evidence, between)
        note = f"closeness to retrained models, 1 is the same; our aggregation: {what}"
        n = len(evidence.records("forget"))
        return [Finding("representation", name, value, n=n, original=original, controls=among, note=note)]


def _accuracies(evidence: Evidence, role: str) -> dict[str, float]:
    """Accuracy on forget, on retain, and on test records of the forgotten and of the other classes."""
    found: dict[str, float] = {}
    for part in ("forget", "retain", "test"):
        if not evidence.has(part):
            continue
        right = correct(evidence, role, part)
        like = evidence.split.like_forgotten(evidence.records(part)) if part == "test" else None
        groups = {part: right} if like is None else {"test": right[~like], "forget_test": right[like]}
        found.update({name: float(group.mean()) for name, group in groups.items() if len(group)})
    return found


def _parts(evidence: Evidence) -> list[str]:
    return [part for part in ("forget", "retain") if evidence.has(part)]


def _owner(one: str, other: str) -> str:
    """The role under which a comparison is remembered: it changes with the unlearned model only."""
    return UNLEARNED if UNLEARNED in (one, other) else ORIGINAL


def _widths(layers: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: layer.shape[1] for name, layer in layers.items()}
