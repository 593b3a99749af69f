"""Optimised prompts: a suffix fitted on some forgotten facts, tested on others (checklist A5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.attacks.knowledge import measured
from palimpsest.audit.attacks.suffix_search import Budget, Found, Pair, forced, search
from palimpsest.audit.language.asked import Question, language_of, once_each, questions, subjects
from palimpsest.audit.language.fact_rates import not_run, rate_finding
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidAudit, ModelMismatch
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome, Row


@audit("optimised-prompts", code="A5", cost=Cost.ATTACK, tasks=("language",), default=False)
@dataclass(frozen=True)
class OptimisedPrompts:
    """Search a universal suffix on the facts of some subjects and test it on those of the others.

    Every model gets a search of its own with the same budget. `transfer_hit`, the share of held-out facts
    that the suffix brings out, has a K. How far the search lowers the loss of what it is fitted to says little,
    since it can force any string; so the same search is run on wrong answers to the same questions
    (`gain_over_wrong`) and on facts of people that no model has seen (`gain_over_never_trained`): only what
    goes beyond them counts. A model that is wrapped and takes no embedded inputs cannot be searched.

    Attributes:
        length: Tokens of the suffix.
        steps: Of the search.
        candidates: Swaps evaluated per step.
        top_k: Tokens proposed for every place.
        limit: Facts at most, half of whose subjects are fitted to.
    """

    length: int = 10
    steps: int = 100
    candidates: int = 32
    top_k: int = 32
    limit: int = 40

    def __post_init__(self) -> None:
        _ = self.budget
        if self.limit < 2:
            raise InvalidAudit(f"limit must be at least 2, not {self.limit}.")

    @property
    def budget(self) -> Budget:
        """Of each search."""
        return Budget(self.length, self.steps, self.candidates, self.top_k)

    def run(self, evidence: Evidence) -> Outcome:
        """Transfer to held-out facts, and the gain over strings that nobody learnt."""
        language_of(evidence)
        asked = once_each(questions(evidence, "forget", None))[: self.limit]
        fitted, held = halves(asked)
        if not fitted or not held:
            return not_run("optimised-prompts", "transfer_hit", "it needs the facts of at least two subjects")
        try:
            found = {role: self._search(evidence, role, "forget", _pairs(fitted)) for role in evidence.roles}
            wrong = _wrong_pairs(fitted)
            others = (
                {role: self._search(evidence, role, "wrong", wrong) for role in evidence.roles}
                if wrong
                else {}
            )
            never = self._never_trained(evidence, len(fitted))
        except ModelMismatch as problem:
            return not_run("optimised-prompts", "transfer_hit", str(problem))
        task = language_of(evidence)
        hit: dict[str, NDArray[np.float64]] = {}
        for role in evidence.roles:
            model = evidence.runtime.place(evidence.model(role))
            hit[role] = forced(task, model, _pairs(held), found[role].tokens).double().numpy()
        note = f"{self.steps} steps of {self.candidates} swaps, fitted to {len(fitted)} facts, tested on {len(held)}"
        findings = [
            rate_finding(evidence, "optimised-prompts", "transfer_hit", hit, subjects(held), note, "inside"),
            *_gains(evidence, found, {"gain_over_wrong": others, "gain_over_never_trained": never}),
        ]
        rows: list[Row] = [
            {"model": role, "step": step, "loss": loss}
            for role, each in found.items()
            for step, loss in enumerate(each.curve)
        ]
        return Outcome(tuple(findings), {"suffix_search": tuple(rows)})

    def _search(self, evidence: Evidence, role: str, what: str, pairs: Sequence[Pair]) -> Found:
        def run() -> Found:
            model = evidence.runtime.place(evidence.model(role))
            random = evidence.runtime.generator("optimised-prompts", what)
            return search(language_of(evidence), model, pairs, self.budget, random)

        return evidence.remember(("suffix", self, what, tuple(pairs)), run, role)

    def _never_trained(self, evidence: Evidence, count: int) -> dict[str, Found]:
        """The same search on facts of held-out people, if there are any."""
        if not evidence.has("holdout"):
            return {}
        pairs = _pairs(once_each(questions(evidence, "holdout", None))[:count])
        return {role: self._search(evidence, role, "holdout", pairs) for role in evidence.roles}


def halves(asked: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Facts of every other subject, and those of the rest."""
    numbers = subjects(asked)
    fitted = [item for item, number in zip(asked, numbers, strict=True) if number % 2 == 0]
    held = [item for item, number in zip(asked, numbers, strict=True) if number % 2]
    return fitted, held


def _pairs(asked: Sequence[Question]) -> list[Pair]:
    return [(item.question, item.answer) for item in asked]


def _wrong_pairs(asked: Sequence[Question]) -> list[Pair]:
    return [(item.question, item.wrong[0]) for item in asked if item.wrong]


def _gains(
    evidence: Evidence, found: dict[str, Found], against: dict[str, dict[str, Found]]
) -> list[Finding]:
    """Fall of the loss on the facts that the suffix was fitted to, minus that on strings that nobody learnt."""
    fall = {role: each.before - each.after for role, each in found.items()}
    note = "nats per token, on what the suffix was fitted to: any string can be forced"
    findings = [measured(evidence, "optimised-prompts", "fitted_gain", fall, note)]
    for name, others in against.items():
        if others:
            gap = {role: fall[role] - (others[role].before - others[role].after) for role in fall}
            findings.append(
                measured(evidence, "optimised-prompts", name, gap, "nats per token, the same search")
            )
    return findings
