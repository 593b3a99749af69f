"""Composition: can what was forgotten be put together again from parts that were kept (checklist D4)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from palimpsest.audit.answers import normalise
from palimpsest.audit.language.asked import (
    Question,
    hits,
    language_of,
    once_each,
    plainly,
    questions,
    replies,
    subjects,
)
from palimpsest.audit.language.fact_rates import not_run, rate_finding
from palimpsest.audit.language.sleek_runs import brief
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Outcome

LIMIT_OF_REQUEST = (
    "what comes back is a limit of the request, not of the method; the retrained models give the floor"
)


@dataclass(frozen=True)
class Composed:
    """A forgotten fact that follows from two retained ones.

    Attributes:
        whole: The forgotten question.
        first: Retained: from the subject to what is between.
        second: Retained: from there to the answer.
    """

    whole: Question
    first: Question
    second: Question


@audit("composition", code="D4", parts=("forget", "retain"), tasks=("language",))
@dataclass(frozen=True)
class Composition:
    """Ask for forgotten facts that follow from retained ones: plainly, with the parts given, and by a chain.

    A forgotten question about s with the answer c is composed if a retained fact says (s, b) and another
    (b, c). Dual-use knowledge comes back this way however well it was unlearned, and to retrained models as
    well: so the audit speaks of the request, and the verdict does not read it.

    Attributes:
        limit: Composed facts at most, the first of them.
    """

    limit: int = 60

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise InvalidAudit(f"limit must be at least 1, not {self.limit}.")

    def run(self, evidence: Evidence) -> Outcome:
        """Share of composed facts recovered in each of the three ways."""
        language_of(evidence)
        found = composed(evidence)[: self.limit]
        if not found:
            return not_run("composition", "recovered", "no forgotten fact follows from two retained ones")
        whole = [item.whole for item in found]
        clusters = subjects(whole)
        ways = {"plain": self._plain, "in_context": self._in_context, "chained": self._chained}
        findings = [
            rate_finding(
                evidence, "composition", f"recovered_{name}",
                {role: hits(whole, ask(evidence, role, found)) for role in evidence.roles},
                clusters, f"{len(found)} facts; {LIMIT_OF_REQUEST}",
            )
            for name, ask in ways.items()
        ]  # fmt: skip
        return Outcome(tuple(findings))

    def _plain(self, evidence: Evidence, role: str, found: Sequence[Composed]) -> list[list[str]]:
        return replies(evidence, role, [item.whole for item in found])

    def _in_context(self, evidence: Evidence, role: str, found: Sequence[Composed]) -> list[list[str]]:
        """Both parts with their answers as earlier turns."""
        form = language_of(evidence).form
        texts = [
            "".join(
                form.render(part.question) + form.complete(part.answer) + form.ending
                for part in (item.first, item.second)
            )
            + form.render(item.whole.question)
            for item in found
        ]
        return replies(evidence, role, texts, raw=True)

    def _chained(self, evidence: Evidence, role: str, found: Sequence[Composed]) -> list[list[str]]:
        """The first part is asked, and its reply put into the second."""
        first = replies(evidence, role, [item.first for item in found])
        between = [
            item.second.question.replace(item.first.answer, brief(texts[0]))
            for item, texts in zip(found, first, strict=True)
        ]
        return replies(evidence, role, between)


def composed(evidence: Evidence) -> list[Composed]:
    """Forgotten questions that follow from two retained facts."""
    retained = once_each(questions(evidence, "retain", None))
    by_subject: dict[str, list[Question]] = {}
    for item in retained:
        by_subject.setdefault(normalise(item.subject), []).append(item)
    found: list[Composed] = []
    for record in evidence.records("forget"):
        if record.get("question") is None:
            continue
        whole = plainly(record)
        for first in by_subject.get(normalise(whole.subject), ()):
            second = next(
                (
                    item
                    for item in by_subject.get(normalise(first.answer), ())
                    if normalise(item.answer) == normalise(whole.answer) and first.answer in item.question
                ),
                None,
            )
            if second is not None:
                found.append(Composed(whole, first, second))
                break
    return found
