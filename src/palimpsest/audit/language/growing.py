"""Growing requests: how K, utility and time change with the share that is to be forgotten (checklist E2)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from palimpsest.audit.attacks.knowledge import not_run
from palimpsest.audit.language.asked import language_of
from palimpsest.audit.language.repeated import Asked, method_of, request_for, subjects_apart
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter
from palimpsest.core.evidence import ORIGINAL, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.unlearner import check_range

NAME = "growing-requests"


@audit(NAME, code="E2", cost=Cost.REPEAT, parts=("forget", "retain"), tasks=("language",), default=False)
@dataclass(frozen=True)
class GrowingRequests:
    """Let the method forget a share of the request's subjects, then a larger one, each from the original.

    What is not yet asked for is retained. A control that was retrained without the whole request never saw a
    share of it either, and is the floor of all. Time is that of the method; the speed-up is against retraining,
    where that was timed. Peak memory of the whole request is what the audit `cost` reports.

    Attributes:
        shares: Of the request's subjects, rising.
    """

    shares: tuple[float, ...] = (0.25, 0.5, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))  # recipes give lists
        for share in self.shares:
            check_range("shares", share, 0, 1, open_low=True)
        if not self.shares or list(self.shares) != sorted(set(self.shares)):
            raise InvalidHyperparameter(f"shares must rise, and there must be one: {list(self.shares)}.")

    def run(self, evidence: Evidence) -> Outcome:
        """K of what was asked for, retained questions answered and seconds, for every share."""
        task = language_of(evidence)
        try:
            method = method_of(evidence)
            pieces = subjects_apart(evidence, self.shares)
        except InvalidAudit as problem:
            return not_run(NAME, "k", str(problem))
        parts = [pieces[0]]
        for piece in pieces[1:]:
            parts.append(parts[-1].union(piece))
        asked = Asked.of(evidence, parts)
        total = len(evidence.split.train)
        findings: list[Finding] = []
        rows: list[Row] = []
        for at, (share, part) in enumerate(zip(self.shares, parts, strict=True)):
            request = request_for(evidence, part, f"{share:.0%} of the subjects")
            runtime = evidence.runtime.with_seed(evidence.runtime.derive(NAME, at))
            start = time.perf_counter()
            model = method.unlearn(evidence.model(ORIGINAL), request, task, runtime)
            seconds = time.perf_counter() - start
            k, utility = asked.k(model, at), asked.utility(model)
            retraining = evidence.seconds.get("retrained")
            whole = f"{len(part)} records, {len(part) / total:.1%} of the training set"
            label = f"{100 * share:g}"
            if np.isfinite(k):
                findings.append(
                    Finding(NAME, f"k_{label}", k, n=len(part), ideal=0.0, more_is="knowledge", note=whole)
                )
            findings.append(
                Finding(NAME, f"retain_{label}", utility, n=len(part), more_is="utility", note=whole)
            )
            findings.append(Finding(NAME, f"seconds_{label}", seconds, n=1, ideal=0.0, note=whole))
            rows.append(
                {
                    "share": share,
                    "share_of_training": len(part) / total,
                    "records": len(part),
                    "k": k if np.isfinite(k) else None,
                    "retain_accuracy": utility,
                    "seconds": seconds,
                    "speed_up": retraining / seconds if retraining else None,
                }
            )
        return Outcome(tuple(findings), {"growing": tuple(rows)})
