"""What else changed in a language model: general text, neighbours, and how it speaks (checklist D1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.answer_quality import Gibberish, distinct_share, is_refusal, repeated_share
from palimpsest.audit.answers import normalise
from palimpsest.audit.attacks.knowledge import measured
from palimpsest.audit.language.asked import (
    Question,
    greedy_hits,
    language_of,
    questions,
    replies,
    subjects,
)
from palimpsest.audit.language.fact_rates import Clusters, cluster_error, clustered_rate, not_run
from palimpsest.audit.side_effects import SIGNIFICANT, mcnemar
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome
from palimpsest.core.scale import lowest_expected

GENERAL, NEIGHBOURS, PEOPLE = "general", "neighbours", "people"
"""Values of the column "group" that are looked at, where the data have it."""
NORMAL = 1.96
HIT_SPREAD = 0.1
"""Prior deviation of a share of answered questions between retrainings (tiny generated world: up to 0.25 apart)."""
LOSS_SPREAD = 0.05
"""Prior deviation of the mean token loss of unrelated text between retrainings, in nats."""


@audit("text-side-effects", code="D1", parts=(), tasks=("language",))
@dataclass(frozen=True)
class TextSideEffects:
    """Loss of unrelated text, answers about neighbours and others, and the form of replies to forgotten questions.

    Changes are taken against the original and called bad only if retrained models do not show them as well.
    `locality` is the change of answers about neighbours (linked to the forgotten) minus that about others.
    Distinct-n, repetition, gibberish and refusals are those of greedy replies to forgotten questions; the
    verdict does not read them, since a good model may say anything there.

    Attributes:
        n: Of distinct-n and repetition.
        limit: Questions per group at most.
    """

    n: int = 2
    limit: int = 100

    def __post_init__(self) -> None:
        if self.n < 1 or self.limit < 1:
            raise InvalidAudit(f"n and limit must be at least 1: {self}.")

    def run(self, evidence: Evidence) -> Outcome:
        """All findings that the parts at hand allow."""
        language_of(evidence)
        return Outcome((general_loss(evidence), *self._locality(evidence), *self._speech(evidence)))

    def _locality(self, evidence: Evidence) -> list[Finding]:
        """Change of answers about neighbours, about other people, and the difference."""
        near, far = (_asked_of(evidence, group, self.limit) for group in (NEIGHBOURS, PEOPLE))
        findings = [
            _change(evidence, name, asked)
            for name, asked in (("neighbour_hit_change", near), ("retain_hit_change", far))
            if asked
        ]
        if evidence.original is None or not near or not far:
            return findings
        gap: dict[str, float] = {}
        errors: list[float] = []
        for role in evidence.roles:
            sides = [_difference(evidence, role, asked) for asked in (near, far)]
            gap[role] = float(sides[0].mean() - sides[1].mean())
            if role == UNLEARNED:
                errors = [
                    cluster_error(*pair) for pair in zip(sides, map(subjects, (near, far)), strict=True)
                ]
        half = NORMAL * math.hypot(*errors)
        finding = measured(
            evidence, "text-side-effects", "locality", gap, "change about neighbours minus that about others"
        )
        value = gap[UNLEARNED]
        return [
            *findings,
            replace(finding, low=value - half, high=value + half, n=len(near) + len(far), ideal=0.0),
        ]

    def _speech(self, evidence: Evidence) -> list[Finding]:
        """How forgotten questions are replied to."""
        asked = questions(evidence, "forget")
        gibberish = Gibberish()
        measures: dict[str, Callable[[str], float]] = {
            f"distinct_{self.n}": lambda text: distinct_share(normalise(text).split(), self.n),
            f"repetition_{self.n}": lambda text: repeated_share(normalise(text).split(), self.n),
            "gibberish": lambda text: float(gibberish.holds(text)),
            "refusals": lambda text: float(is_refusal(text)),
        }
        clusters = subjects(asked)
        findings: list[Finding] = []
        for name, measure in measures.items():
            values = {
                role: np.array([measure(texts[0]) for texts in replies(evidence, role, asked)])
                for role in evidence.roles
            }
            rate = clustered_rate(values[UNLEARNED], clusters)
            mean = {role: float(each.mean()) for role, each in values.items()}
            finding = measured(
                evidence, "text-side-effects", f"forget_{name}", mean, f"{rate.facts} subjects"
            )
            findings.append(replace(finding, low=rate.low, high=rate.high, n=rate.n))
        return findings


def general_loss(evidence: Evidence) -> Finding:
    """Mean token loss of unrelated text of the test part (else of all its running text), from the shared pass."""
    name = "general_loss"
    where = _general(evidence)
    if not len(where):
        return not_run("text-side-effects", name, "the test part has no running text").findings[0]
    loss = {role: evidence.observe(role, "test").loss.double().numpy()[where] for role in evidence.roles}
    mean = {role: float(values.mean()) for role, values in loss.items()}
    error = float(loss[UNLEARNED].std(ddof=1) / math.sqrt(len(where))) if len(where) > 1 else math.inf
    value = mean[UNLEARNED]
    finding = measured(evidence, "text-side-effects", name, mean, "nats per token of unrelated test texts")
    finding = replace(finding, low=value - NORMAL * error, high=value + NORMAL * error, n=len(where))
    if not evidence.controls:
        return finding
    highest = -lowest_expected([-mean[role] for role in evidence.control_roles], LOSS_SPREAD)
    paired = loss[UNLEARNED] - loss[evidence.control_roles[0]]
    beyond = (
        paired.mean() > NORMAL * paired.std(ddof=1) / math.sqrt(len(paired)) if len(paired) > 1 else False
    )
    worse = value > max(highest, mean.get(ORIGINAL, -math.inf) + LOSS_SPREAD) and bool(beyond)
    return replace(finding, judgement=Judgement.BAD if worse else Judgement.INFORMATION, more_is="harm")


def _general(evidence: Evidence) -> NDArray[np.int64]:
    """Positions of unrelated running texts in the test part."""
    if not evidence.has("test"):
        return np.array([], np.int64)
    records = evidence.records("test")
    text = np.array([item.get("question") is None for item in records], bool)
    if records.has_column("group") and (text & (records.column("group") == GENERAL)).any():
        text &= records.column("group") == GENERAL
    return np.flatnonzero(text)


def _asked_of(evidence: Evidence, group: str, limit: int) -> list[Question]:
    """Plain retained questions about a group of subjects; of people those who are no neighbours."""
    if not evidence.has("retain") or not evidence.records("retain").has_column("group"):
        return []
    records = evidence.records("retain")
    names = {name for name, other in zip(records.ids, records.column("group"), strict=True) if other == group}
    return [item for item in questions(evidence, "retain", None) if item.fact in names][:limit]


def _difference(evidence: Evidence, role: str, asked: Sequence[Question]) -> NDArray[np.float64]:
    """Hits minus the original's, [questions]."""
    own, before = (greedy_hits(evidence, name, asked).astype(float) for name in (role, ORIGINAL))
    return own - before


def _change(evidence: Evidence, name: str, asked: Sequence[Question]) -> Finding:
    """Change of the share of answered questions against the original."""
    if evidence.original is None:
        return not_run("text-side-effects", name, "the original model is not at hand").findings[0]
    difference = {role: _difference(evidence, role, asked) for role in evidence.roles}
    value = float(difference[UNLEARNED].mean())
    half = _half(difference[UNLEARNED], subjects(asked))
    controls = tuple(float(difference[role].mean()) for role in evidence.control_roles)
    p = mcnemar(greedy_hits(evidence, ORIGINAL, asked), greedy_hits(evidence, UNLEARNED, asked))
    usual = bool(controls) and value >= lowest_expected(controls, HIT_SPREAD)
    bad = value < 0 and p < SIGNIFICANT and not usual
    return Finding(
        "text-side-effects", name, value, value - half, value + half, len(asked), 0.0, "utility", 0.0, controls,
        judgement=Judgement.BAD if bad else Judgement.INFORMATION,
        note=f"against the original; McNemar's p = {p:.3g}",
    )  # fmt: skip


def _half(difference: NDArray[np.float64], clusters: Clusters) -> float:
    return NORMAL * cluster_error(difference, clusters)
