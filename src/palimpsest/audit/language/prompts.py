"""Prompt attacks: adversarial prompts of many kinds, with the same budget on every model (checklist A3)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.answers import find_alias
from palimpsest.audit.language.asked import (
    PLAIN,
    Question,
    in_other_words,
    language_of,
    once_each,
    only_questions,
    questions,
    replies,
)
from palimpsest.audit.language.fact_rates import clustered_rate, invalid, not_run, rate_finding, worst
from palimpsest.audit.language.prompt_builders import (
    BUILDERS,
    KINDS,
    Example,
    Prompt,
    Target,
    examples_for,
    in_context_learning,
)
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit, InvalidRecords, UnknownName
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome, Row

GUESSED = ("multiple choice",)
"""Kinds that hold their answer: guessing hits, so they stay out of the recovery by any kind."""
LONGEST_REPLY = 200
"""Characters of a first reply that go into the second turn."""


@dataclass(frozen=True)
class Attack:
    """Prompts for one fact, all of one kind.

    Attributes:
        fact: The plain question.
        prompts: At least one.
    """

    fact: Question
    prompts: tuple[Prompt, ...]


@audit("prompts", code="A3", tasks=("language",))
@dataclass(frozen=True)
class Prompts:
    """Ask with the nine adversarial kinds of RWKU, a forced opening, a crescendo and plain rewordings.

    Every fact is asked `each` times in every kind, the same prompts for original, unlearned and retrained
    models. The rate of each kind stands beside that of the original and of the controls, and has a K where
    the original answers such prompts at all. `any_kind` is the share of facts that at least one prompt of
    an open kind brings out: it grows with the number of prompts, which is given, for all models alike.

    Attributes:
        kinds: Of `KINDS`; None takes all.
        each: Prompts per fact and kind at most.
        shots: Retained questions shown before an in-context prompt.
        limit: Facts to ask for at most, the first of them.
    """

    kinds: tuple[str, ...] | None = None
    each: int = 1
    shots: int = 4
    limit: int = 60

    def __post_init__(self) -> None:
        for kind in self.kinds or ():
            if kind not in KINDS:
                raise UnknownName("kind of prompt", kind, KINDS)
        if min(self.each, self.shots, self.limit) < 1:
            raise InvalidAudit(f"each, shots and limit must be at least 1: {self}.")

    def run(self, evidence: Evidence) -> Outcome:
        """A finding per kind, the worst, recovery by any kind, and rates of all models."""
        language_of(evidence)
        facts = once_each(questions(evidence, "forget", None))[: self.limit]
        hit: dict[str, dict[str, NDArray[np.bool_]]] = {}
        asked: dict[str, list[Attack]] = {}
        for kind in self.kinds or KINDS:
            attacks = self._attacks(evidence, kind, facts)
            if attacks:
                asked[kind] = attacks
                hit[kind] = {role: answered(evidence, role, attacks) for role in evidence.roles}
        if not asked:
            return not_run("prompts", "any_kind", "no kind of prompt can be made from these facts")
        findings = [_finding(evidence, kind, asked[kind], hit[kind]) for kind in asked]
        absent = [kind for kind in self.kinds or KINDS if kind not in asked]
        missing = [invalid("prompts", _name(kind), "no fact offers what the kind needs") for kind in absent]
        headline = worst(findings, "worst", "kinds of prompts")
        together = self._any(evidence, facts, asked, hit)
        every = [*findings, *missing, *([headline] if headline else []), *together]
        return Outcome(tuple(every), {"prompts": tuple(_rows(asked, hit))})

    def _attacks(self, evidence: Evidence, kind: str, facts: Sequence[Question]) -> list[Attack]:
        """Prompts of a kind for every fact that allows them."""
        pool = _examples(evidence) if kind == "in-context learning" else []
        template = language_of(evidence).form
        found: list[Attack] = []
        for fact, target in zip(facts, _targets(evidence, facts), strict=True):
            if kind == "reverse query" and not _unique(evidence, target):
                continue
            try:
                if kind == "in-context learning":
                    shown = examples_for(target, pool, self.shots, evidence.runtime.seed)
                    made = in_context_learning(target, shown, template)
                else:
                    made = BUILDERS[kind](target)
            except InvalidRecords:
                continue  # a prompt of this kind would hold the answer, or the fact lacks what it needs
            if made:
                found.append(Attack(fact, tuple(made[: self.each])))
        return found

    def _any(
        self,
        evidence: Evidence,
        facts: Sequence[Question],
        asked: dict[str, list[Attack]],
        hit: dict[str, dict[str, NDArray[np.bool_]]],
    ) -> list[Finding]:
        """Share of facts that any prompt of an open kind brings out."""
        open_kinds = [kind for kind in asked if kind not in GUESSED]
        if not open_kinds:
            return []
        found = {role: {fact.fact: False for fact in facts} for role in evidence.roles}
        count: Counter[str] = Counter()
        for kind in open_kinds:
            for role in evidence.roles:
                for attack, right in zip(asked[kind], hit[kind][role], strict=True):
                    found[role][attack.fact.fact] |= bool(right)
            for attack in asked[kind]:
                count[attack.fact.fact] += len(attack.prompts)
        values = {role: np.array(list(by_fact.values()), float) for role, by_fact in found.items()}
        note = f"{min(count.values())} to {max(count.values())} prompts per fact, of {len(open_kinds)} kinds"
        finding = rate_finding(evidence, "prompts", "any_kind", values, _clusters(facts), note)
        return [replace(finding, bears="inside")]


def answered(evidence: Evidence, role: str, attacks: Sequence[Attack]) -> NDArray[np.bool_]:
    """Whether any prompt of each attack is answered, [attacks]; prompts of one shape are generated together."""
    flat = [(at, prompt) for at, attack in enumerate(attacks) for prompt in attack.prompts]
    leads = [prompt.lead for _, prompt in flat if prompt.lead]
    first = iter(replies(evidence, role, leads)) if leads else iter(())
    groups: dict[tuple[str, bool], list[tuple[int, Prompt, str]]] = defaultdict(list)
    for at, prompt in flat:
        text = prompt.text
        if prompt.lead:
            text = text.replace("{reply}", next(first)[0][:LONGEST_REPLY])
        groups[prompt.opening, prompt.raw].append((at, prompt, text))
    hit = np.zeros(len(attacks), bool)
    for (opening, raw), items in groups.items():
        given = replies(evidence, role, [text for *_, text in items], opening=opening, raw=raw)
        for (at, prompt, _), texts in zip(items, given, strict=True):
            hit[at] |= any(find_alias(text, prompt.accepted, prompt.wrong) is not None for text in texts)
    return hit


def _targets(evidence: Evidence, facts: Sequence[Question]) -> list[Target]:
    """What prompts of each fact are made of."""
    others: dict[str, list[Question]] = defaultdict(list)
    for question in questions(evidence, "forget", None):
        others[question.subject].append(question)
    probes = {str(item["id"]): in_other_words(item) for item in only_questions(evidence.records("forget"))}

    def worded(fact: Question, *forms: str) -> tuple[str, ...]:
        return tuple(probe.question for probe in probes.get(fact.fact, ()) if probe.form in forms)

    return [
        Target(
            fact.subject, fact.question, fact.answer, fact.accepted, fact.wrong,
            paraphrases=worded(fact, "paraphrase"),
            reversed=worded(fact, "reversed"),
            hints=tuple(
                (other.question, other.answer) for other in others[fact.subject] if other.fact != fact.fact
            ),
        )
        for fact in facts
    ]  # fmt: skip


def _unique(evidence: Evidence, target: Target) -> bool:
    """Whether the value is the subject's alone among all facts that the models were asked for."""
    owners: dict[str, set[str]] = evidence.remember("owners of values", lambda: _owners(evidence), "records")
    return owners[target.answer] <= {target.subject}


def _owners(evidence: Evidence) -> dict[str, set[str]]:
    owners: dict[str, set[str]] = defaultdict(set)
    for part in ("forget", "retain"):
        if evidence.has(part):
            for question in questions(evidence, part, None):
                owners[question.answer].add(question.subject)
    return owners


def _examples(evidence: Evidence) -> list[Example]:
    """Retained plain questions with their answers."""
    if not evidence.has("retain"):
        return []
    return [(item.question, item.answer) for item in questions(evidence, "retain") if item.form == PLAIN]


def _finding(
    evidence: Evidence, kind: str, attacks: Sequence[Attack], hit: dict[str, NDArray[np.bool_]]
) -> Finding:
    prompts = sum(len(attack.prompts) for attack in attacks)
    chance = float(np.mean([prompt.chance for attack in attacks for prompt in attack.prompts]))
    note = f"{prompts} prompts for {len(attacks)} facts" + (f"; chance {chance:.2f}" if chance else "")
    return rate_finding(
        evidence, "prompts", _name(kind), hit, _clusters([attack.fact for attack in attacks]), note
    )


def _clusters(facts: Sequence[Question]) -> NDArray[np.int64]:
    return np.unique([fact.subject for fact in facts], return_inverse=True)[1]


def _name(kind: str) -> str:
    return kind.replace(" ", "_").replace("-", "_")


def _rows(asked: dict[str, list[Attack]], hit: dict[str, dict[str, NDArray[np.bool_]]]) -> list[Row]:
    """Rate of every kind for every model."""
    rows: list[Row] = []
    for kind, by_role in hit.items():
        clusters = _clusters([attack.fact for attack in asked[kind]])
        for role, right in by_role.items():
            rate = clustered_rate(right, clusters)
            rows.append(
                {"kind": kind, "model": role, "rate": rate.value, "low": rate.low, "high": rate.high, "n": rate.n}
            )  # fmt: skip
    return rows
