"""Requests in turn: what earlier ones' facts and utility become of when the method is used again (checklist E1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from palimpsest.audit.attacks.knowledge import not_run
from palimpsest.audit.language.asked import language_of
from palimpsest.audit.language.repeated import Asked, method_of, request_for, subjects_apart
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.matrix import ScoreMatrix
from palimpsest.core.split import in_turn
from palimpsest.core.unlearner import check_range

NAME = "sequential"


@audit(NAME, code="E1", cost=Cost.REPEAT, parts=("forget", "retain"), tasks=("language",), default=False)
@dataclass(frozen=True)
class Sequential:
    """Split the request by subjects and let the method serve the parts one after the other.

    M[k][j] is K of part j after request k. The controls never saw any of the parts, so they are the floor of all.
    Re-emergence is the largest rise of an earlier part since its own request; the slope of utility is that of a
    straight line through the retained questions answered after 0, 1, ... requests; and the end is set against
    the audited model, which was asked for all at once.

    Attributes:
        requests: Number of parts.
    """

    requests: int = 2

    def __post_init__(self) -> None:
        check_range("requests", self.requests, 2, 100)

    def run(self, evidence: Evidence) -> Outcome:
        """Re-emergence, K in time and at the end, slope of utility, and the matrix."""
        task = language_of(evidence)
        try:
            method = method_of(evidence)
            parts = subjects_apart(evidence, [(at + 1) / self.requests for at in range(self.requests)])
            asked = Asked.of(evidence, parts)
        except InvalidAudit as problem:
            return not_run(NAME, "re_emergence", str(problem))
        turns = in_turn([request_for(evidence, part, f"part {at}") for at, part in enumerate(parts)])
        model = evidence.model(ORIGINAL)
        scores = np.full((self.requests, self.requests), np.nan)
        utility = [asked.utility(evidence.runtime.place(model))]
        for step, turn in enumerate(turns):
            runtime = evidence.runtime.with_seed(evidence.runtime.derive(NAME, step))
            model = method.unlearn(model, turn, task, runtime)
            scores[step] = [asked.k(model, part) for part in range(self.requests)]
            utility.append(asked.utility(model))
        once = [asked.k(evidence.runtime.place(evidence.unlearned), part) for part in range(self.requests)]
        return Outcome(tuple(_findings(scores, utility, once)), {"sequential": tuple(_rows(scores, utility))})


def _findings(scores: np.ndarray, utility: list[float], once: list[float]) -> list[Finding]:
    matrix = ScoreMatrix(np.where(np.tri(len(scores), dtype=bool), scores, np.nan))
    n = len(scores)
    slope = float(np.polyfit(np.arange(len(utility)), utility, 1)[0])
    values = {
        "re_emergence": (
            matrix.re_emergence,
            "largest rise of K of an earlier part since its own request",
            0.0,
        ),
        "k_in_time": (_mean(matrix.at_their_time), "mean K of the parts right after their requests", 0.0),
        "k_at_the_end": (_mean(matrix.at_the_end), "mean K of all parts after the last request", 0.0),
        "k_at_once": (_mean(np.array(once)), "mean K of all parts when they are asked for at once", 0.0),
        "utility_slope": (slope, f"retained questions answered, per request, from {utility[0]:.3f}", 0.0),
        "utility_at_the_end": (utility[-1], f"retained questions answered after {n} requests", utility[0]),
    }
    return [
        Finding(NAME, name, value, n=n, ideal=ideal, note=note,
                more_is="utility" if name.startswith("utility") else "knowledge")
        for name, (value, note, ideal) in values.items()
        if np.isfinite(value)
    ]  # fmt: skip


def _rows(scores: np.ndarray, utility: list[float]) -> list[Row]:
    rows: list[Row] = [{"step": 0, "part": None, "k": None, "retain_accuracy": utility[0]}]
    for step, values in enumerate(scores):
        for part, k in enumerate(values):
            known = None if np.isnan(k) else float(k)
            rows.append({"step": step + 1, "part": part, "k": known, "retain_accuracy": utility[step + 1]})
    return rows


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
