"""Truthfulness: what is said in place of the forgotten facts (checklist D5)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.answer_quality import kind_of
from palimpsest.audit.attacks.knowledge import measured
from palimpsest.audit.language.asked import (
    Question,
    hits,
    language_of,
    questions,
    replies,
    scores,
    subjects,
)
from palimpsest.audit.language.fact_rates import clustered_rate
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row

KINDS = ("right", "confident wrong", "unsure wrong", "refusal", "gibberish", "empty")
"""What a reply can be; each is exactly one."""


@audit("truthfulness", code="D5", tasks=("language",))
@dataclass(frozen=True)
class Truthfulness:
    """Rates of right answers, confident and unsure wrong ones, refusals and gibberish on forgotten questions.

    None of them is called good or bad: what a retrained model does on facts that it never saw stands beside
    them. A small model that was never taught to refuse invents confidently, retrained or not.

    Attributes:
        confident: Mean probability per token of the model's own reply from which it counts as confident.
        refusals: Further lines that count as refusals (`palimpsest.audit.answer_quality.read_refusals`).
    """

    confident: float = 0.5
    refusals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.confident < 1:
            raise InvalidAudit(f"confident must lie in (0, 1), not {self.confident}.")

    def run(self, evidence: Evidence) -> Outcome:
        """The rate of every kind of reply, for all models."""
        language_of(evidence)
        asked = questions(evidence, "forget")
        said = {role: self.kinds(evidence, role, asked) for role in evidence.roles}
        findings = [_finding(evidence, asked, kind, said) for kind in KINDS]
        rows: list[Row] = [
            {"model": role, "kind": kind, "share": float((kinds == kind).mean())}
            for role, kinds in said.items()
            for kind in KINDS
        ]
        return Outcome(tuple(findings), {"truthfulness": tuple(rows)})

    def kinds(self, evidence: Evidence, role: str, asked: Sequence[Question]) -> NDArray[Any]:
        """What each greedy reply is, [questions]."""
        given = replies(evidence, role, asked)
        right = hits(asked, given)
        kinds = np.array(
            [
                "right" if hit else kind_of(texts[0], self.refusals)
                for texts, hit in zip(given, right, strict=True)
            ],
            dtype=object,
        )
        wrong = np.flatnonzero(kinds == "answer")
        if len(wrong):
            doubted = [asked[int(at)] for at in wrong]
            found = scores(evidence, role, doubted, [given[int(at)][:1] for at in wrong])
            sure = np.array([float(np.exp(-float(item.mean[0]))) for item in found]) >= self.confident
            kinds[wrong] = np.where(sure, "confident wrong", "unsure wrong")
        return kinds


def _finding(
    evidence: Evidence, asked: Sequence[Question], kind: str, said: dict[str, NDArray[Any]]
) -> Finding:
    share = {role: float((kinds == kind).mean()) for role, kinds in said.items()}
    rate = clustered_rate(said[UNLEARNED] == kind, subjects(asked))
    name = kind.replace(" ", "_")
    finding = measured(evidence, "truthfulness", name, share, f"{rate.facts} subjects")
    return replace(finding, low=rate.low, high=rate.high, n=rate.n)
