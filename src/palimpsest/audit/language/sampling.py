"""Sampling: are facts in any of many sampled answers, where the likeliest one is silent (checklist A4)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.answers import find_alias
from palimpsest.audit.hit_rates import leak_at, sample_rate, upper_bound
from palimpsest.audit.language.asked import Question, language_of, once_each, questions, replies, subjects
from palimpsest.audit.language.fact_rates import rate_finding
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.finding import Outcome, Row

CURVE = (1, 2, 5, 10, 20, 50, 100)
"""Numbers of samples at which the curve is drawn."""


@audit("sampling", code="A4", tasks=("language",))
@dataclass(frozen=True)
class Sampling:
    """Sample n answers to every plain question and look for the fact in each of them.

    `leak_at_n` is the share of facts with a hit among n samples. It rises with n for guessable facts too,
    so original and controls are sampled alike. `sample_hit`, the share of single samples with a hit, does not
    depend on n; its note has the exact bounds of independent samples (no hit in n leaves about 3 / n).

    Attributes:
        samples: n.
        temperature: Of the sampling.
        top_p: Sample from the smallest set of tokens with so much probability.
        limit: Facts at most, the first of them.
    """

    samples: int = 20
    temperature: float = 1.0
    top_p: float = 1.0
    limit: int = 30

    def __post_init__(self) -> None:
        if self.samples < 1 or self.limit < 1 or not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise InvalidAudit(
                f"samples and limit must be at least 1, temperature above 0 and top_p in (0, 1]: {self}."
            )

    def run(self, evidence: Evidence) -> Outcome:
        """leak@n, the rate of single samples, and the curve of leak@k."""
        language_of(evidence)
        asked = once_each(questions(evidence, "forget", None))[: self.limit]
        hit = {role: self._hits(evidence, role, asked) for role in evidence.roles}
        clusters = subjects(asked)
        budget = f"{self.samples} samples per fact at T = {self.temperature:g}"
        leak = {role: table.any(1).astype(float) for role, table in hit.items()}
        single = {role: table.mean(1) for role, table in hit.items()}
        rate = sample_rate(hit[UNLEARNED])
        exact = f"as independent samples [{rate.low:.4f}, {rate.high:.4f}]"
        if not hit[UNLEARNED].any():
            exact += f", at most {upper_bound(0, hit[UNLEARNED].size):.4f} one-sided"
        found = rate_finding(evidence, "sampling", "sample_hit", single, clusters, f"{budget}; {exact}")
        return Outcome(
            (
                rate_finding(
                    evidence, "sampling", f"leak_at_{self.samples}", leak, clusters, budget, "inside"
                ),
                replace(found, n=hit[UNLEARNED].size),
            ),
            {"sampling": tuple(_curve(hit))},
        )

    def _hits(self, evidence: Evidence, role: str, asked: Sequence[Question]) -> NDArray[np.bool_]:
        """Whether each sample names the answer, [facts, samples]."""
        given = replies(
            evidence, role, asked, samples=self.samples, temperature=self.temperature, top_p=self.top_p,
            seed=evidence.runtime.derive("sampling"),
        )  # fmt: skip
        return np.array(
            [
                [find_alias(text, item.accepted, item.wrong) is not None for text in texts]
                for item, texts in zip(asked, given, strict=True)
            ],
            bool,
        )


def _curve(hit: Mapping[str, NDArray[np.bool_]]) -> list[Row]:
    """Mean leak@k over the facts, for k up to the samples drawn."""
    return [
        {"model": role, "samples": k, "leak": float(leak_at(table, k).mean())}
        for role, table in hit.items()
        for k in CURVE
        if k <= table.shape[1]
    ]
