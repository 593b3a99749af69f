"""Membership attacks on language models: forgotten texts against texts never seen (checklist A6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.language.asked import language_of
from palimpsest.audit.language.fact_rates import cluster_error, not_run
from palimpsest.audit.language.token_signals import (
    gradient_signal,
    lowercase_signal,
    reference_signal,
    signals_of,
)
from palimpsest.audit.membership.findings import ByRole, auc_finding, leak_finding, tpr_finding
from palimpsest.audit.membership.privacy_leak import measure_privacy_leak, privacy_auc, privacy_leak
from palimpsest.audit.membership.rates import placements, roc, thinned
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome, Row
from palimpsest.core.records import Records

SHARED = ("loss", "zlib", "min_k", "min_k_plus")
"""Attacks that the shared pass is enough for."""
HEADLINE = "loss"
TEXT_SPREAD = 0.05
"""Prior deviation of the AUC between retrainings: forgotten texts are about few subjects."""
MUSE_K = 0.4
"""Share of the lowest tokens in PrivLeak."""
FEWEST = 2


@audit("text-membership", code="A6", parts=("forget", "holdout"), tasks=("language",))
@dataclass(frozen=True)
class TextMembership:
    """LOSS, zlib, Min-K%, Min-K%++, reference, lower case and GradNorm: six attacks, and PrivLeak with its sign.

    Members are the forgotten texts, non-members held-out ones of the same forms and relations. The first four
    come from the pass that all audits share; the reference attack takes the last retrained model as its
    reference and judges the others by it, so it needs two of them. Texts about one subject are not independent:
    intervals are widened by what the subjects of the members say. A text that stands out below non-members
    leaks as well (`leak`), and PrivLeak is far above 0 then.

    Attributes:
        k: Share of tokens in Min-K% and Min-K%++ (0.2 in the paper; PrivLeak takes 0.4 as MUSE does).
        rates: False positive rates at which true positive rates are given.
        lowercase: Whether to run the lower-case attack: a forward pass more.
        gradients: Whether to run GradNorm: a backward pass per text.
    """

    k: float = 0.2
    rates: tuple[float, ...] = (0.05, 0.01)
    lowercase: bool = True
    gradients: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.k <= 1 or not all(0 < rate < 1 for rate in self.rates):
            raise InvalidAudit(f"k must lie in (0, 1] and rates in (0, 1): {self}.")

    def run(self, evidence: Evidence) -> Outcome:
        """AUC and rates of every attack, the leak in either direction, PrivLeak, and ROC curves."""
        language_of(evidence)
        members, others = alike(evidence.records("forget"), evidence.records("holdout"))
        if min(len(members), len(others)) < FEWEST:
            why = f"too few to compare: {len(members)} forgotten texts and {len(others)} held-out ones like them"
            return not_run("text-membership", f"{HEADLINE}_auc", why)
        attacks = self._attacks(evidence, members, others)
        clusters = _subjects(evidence.records("forget"))[members]
        findings: list[Finding] = []
        for name, scores in attacks.items():
            wide = widening(scores[UNLEARNED][0], scores[UNLEARNED][1], clusters)
            note = f"{len(np.unique(clusters))} subjects among the members"
            finding = auc_finding("text-membership", f"{name}_auc", scores, note, TEXT_SPREAD, wide)
            findings.append(replace(finding, bears="outputs") if name == HEADLINE else finding)
            findings += [
                tpr_finding("text-membership", f"{name}_tpr_at_{rate:g}", scores, rate) for rate in self.rates
            ]
        if "reference" not in attacks:
            findings += not_run("text-membership", "reference_auc", "it needs two retrained models").findings
        findings.append(leak_finding("text-membership", "leak", attacks[HEADLINE]))
        findings.append(_privleak(evidence, members, others))
        return Outcome(tuple(findings), {"roc": tuple(_curves(attacks))})

    def _attacks(
        self, evidence: Evidence, members: NDArray[np.int64], others: NDArray[np.int64]
    ) -> dict[str, ByRole]:
        """Scores of all attacks, by attack and role."""

        def sides(role: str, signal: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            return signal(role, "forget")[members], signal(role, "holdout")[others]

        def shared(name: str) -> ByRole:
            return {
                role: sides(role, lambda role, part: signals_of(evidence, role, part, self.k)[name])
                for role in evidence.roles
            }

        attacks = {name: shared(name) for name in SHARED}
        if len(evidence.controls) > 1:
            last = evidence.control_roles[-1]
            attacks["reference"] = {
                role: sides(role, lambda role, part: reference_signal(evidence, role, last, part))
                for role in evidence.roles
                if role != last
            }
        if self.lowercase:
            attacks["lowercase"] = {
                role: sides(role, lambda role, part: lowercase_signal(evidence, role, part))
                for role in evidence.roles
            }
        if self.gradients:
            attacks["gradnorm"] = {
                role: sides(role, lambda role, part: gradient_signal(evidence, role, part))
                for role in evidence.roles
            }
        return attacks


def alike(forget: Records, holdout: Records) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of forgotten and held-out texts of the same kinds, in the same proportions.

    Kinds are form and relation, where the data have them. Of each kind as many held-out texts are taken as
    the scarcest kind allows, the first of them; forgotten texts of a kind that no held-out text has are left out.
    """
    kinds = [_kinds(records) for records in (forget, holdout)]
    shared = sorted(set(kinds[0]) & set(kinds[1]))
    if not shared:
        return np.array([], np.int64), np.array([], np.int64)
    at = [{kind: np.flatnonzero(side == kind) for kind in shared} for side in kinds]
    ratio = min(len(at[1][kind]) / len(at[0][kind]) for kind in shared)
    members = np.concatenate([at[0][kind] for kind in shared])
    others = np.concatenate([at[1][kind][: max(1, round(ratio * len(at[0][kind])))] for kind in shared])
    return np.sort(members), np.sort(others)


def _kinds(records: Records) -> NDArray[Any]:
    columns = [records.column(name) for name in ("form", "relation") if records.has_column(name)]
    return np.array(
        ["/".join(map(str, row)) for row in zip(*columns, strict=True)] or [""] * len(records), object
    )


def _subjects(records: Records) -> NDArray[Any]:
    """Subject of every record; its own id where the data have none."""
    given = records.column("subject") if records.has_column("subject") else records.ids
    return np.unique([str(name) for name in given], return_inverse=True)[1]


def widening(members: NDArray[np.float64], others: NDArray[np.float64], clusters: NDArray[Any]) -> float:
    """By how much texts of one subject widen the error of the members' side; at least 1."""
    above, _ = placements(members, others)
    plain = float(above.std(ddof=1)) / math.sqrt(len(above))
    together = cluster_error(above, clusters)
    return max(1.0, together / plain) if plain > 0 and math.isfinite(together) else 1.0


def _privleak(evidence: Evidence, members: NDArray[np.int64], others: NDArray[np.int64]) -> Finding:
    """PrivLeak in percent, against the retrained models; the sign is MUSE's: below 0, still a member."""
    name = "privleak"
    if not evidence.controls:
        return not_run("text-membership", name, "it is not defined without a retrained model").findings[0]

    def sides(role: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        low = [-signals_of(evidence, role, part, MUSE_K)["min_k"] for part in ("forget", "holdout")]
        return low[0][members], low[1][others]

    controls = [privacy_auc(*sides(role)) for role in evidence.control_roles]
    center = float(np.mean(controls))
    if center == 0:
        return not_run("text-membership", name, "the retrained models' area under the curve is 0").findings[0]
    found = measure_privacy_leak(sides(UNLEARNED), sides(evidence.control_roles[0]))
    value = {role: privacy_leak(privacy_auc(*sides(role)), center) for role in evidence.roles}
    low, high = (100 * (end - center) / center for end in (found.low, found.high))
    note = f"percent; below 0 still a member, above 0 abnormally unlikely; the retrained AUC is {center:.2f}"
    if not found.fair:
        note += ": far from 1/2, so that forgotten and held-out texts differ by more than having been seen"
    return Finding(
        "text-membership", name, value[UNLEARNED], low, high, len(members) + len(others), 0.0, "neutral",
        value.get(ORIGINAL), tuple(value[role] for role in evidence.control_roles),
        judgement=Judgement.INFORMATION if found.fair else Judgement.INVALID, note=note,
    )  # fmt: skip


def _curves(attacks: Mapping[str, ByRole]) -> list[Row]:
    return [
        {"attack": attack, "model": role, "fpr": x, "tpr": y}
        for attack, scores in attacks.items()
        for role, sides in scores.items()
        for x, y in thinned(*roc(*sides))
    ]
