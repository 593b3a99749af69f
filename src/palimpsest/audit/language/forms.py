"""Form change: are the facts still there when they are asked for in other forms (checklist A2)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.answers import find_alias
from palimpsest.audit.language.asked import (
    NEW_TOKENS,
    Question,
    all_answers,
    hits,
    language_of,
    probes,
    questions,
    replies,
    scores,
    subjects,
)
from palimpsest.audit.language.fact_rates import clustered_rate, not_run, rate_finding, worst
from palimpsest.core.auditing import audit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome, Row

LIKELIEST = "likeliest_of_choices"
"""Form in which nothing is generated: the answer's likelihood against that of the wrong ones."""


@audit("forms", code="A2", tasks=("language",))
@dataclass(frozen=True)
class Forms:
    """Ask for the forgotten facts in every form that the data have, and by choice: paraphrase, cloze, two-hop ...

    Every form is a finding with its own K, as far as the original answers in it at all; the headline is the
    worst valid form. A worked chain counts if it names the fact anywhere, an answer with options if it names
    the right one; the chance of a guess stands beside it. In `likeliest_of_choices` the true answer to the
    plain question must be likelier per token than all wrong ones, which needs no generated text.

    Attributes:
        forms: Of the data's probes; None takes all that there are.
    """

    forms: tuple[str, ...] | None = None

    def run(self, evidence: Evidence) -> Outcome:
        """A finding per form, the worst of them, and the rates of every model."""
        language_of(evidence)
        given = probes(evidence, "forget", limit=None)
        named = list(dict.fromkeys(item.form for item in given))
        chosen = [form for form in named if self.forms is None or form in self.forms]
        findings: list[Finding] = []
        rows: list[Row] = []
        for form in chosen:
            asked = probes(evidence, "forget", form)
            right = {role: _right(asked, self._replies(evidence, role, asked)) for role in evidence.roles}
            findings.append(_finding(evidence, form, asked, right))
            rows += _rows(form, asked, right)
        plain = [item for item in questions(evidence, "forget") if item.wrong]
        if plain and (self.forms is None or LIKELIEST in self.forms):
            right = {role: likeliest(evidence, role, plain) for role in evidence.roles}
            findings.append(_finding(evidence, LIKELIEST, plain, right))
            rows += _rows(LIKELIEST, plain, right)
        if not findings:
            return not_run("forms", "worst", "the records have no probes, paraphrases or wrong answers")
        headline = worst(findings, "worst", "forms")
        return Outcome((*findings, *([headline] if headline else [])), {"forms": tuple(rows)})

    def _replies(self, evidence: Evidence, role: str, asked: Sequence[Question]) -> list[list[str]]:
        longest = max((len(item.answer.split()) for item in asked), default=0)
        return replies(evidence, role, asked, max_new_tokens=max(NEW_TOKENS, 4 * longest))


def likeliest(evidence: Evidence, role: str, asked: Sequence[Question]) -> NDArray[np.float64]:
    """Whether the true answer loses less per token than every wrong one, [questions]."""
    found = scores(evidence, role, asked, [all_answers(item) for item in asked])
    # the second answer is the paraphrase of the first
    return np.array([float(item.mean[0] < item.mean[2:].min()) for item in found])


def _right(asked: Sequence[Question], given: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Whether replies give the fact away, [questions]; of a worked answer its first value is the fact."""
    plain = hits(asked, given)
    for at, (question, texts) in enumerate(zip(asked, given, strict=True)):
        if question.steps:
            plain[at] = any(find_alias(text, question.steps[:1]) is not None for text in texts)
    return plain.astype(np.float64)


def chance(asked: Sequence[Question], form: str) -> float | None:
    """Share that guessing gets right, where options are given."""
    sizes = [
        len(item.choices) if item.choices else len(item.wrong) + 1 if form == LIKELIEST else 0
        for item in asked
    ]
    known = [1 / size for size in sizes if size]
    return float(np.mean(known)) if known else None


def _finding(
    evidence: Evidence, form: str, asked: Sequence[Question], right: Mapping[str, NDArray[np.float64]]
) -> Finding:
    guess = chance(asked, form)
    note = f"{len(asked)} questions" + ("" if guess is None else f"; chance {guess:.2f}")
    _, values, clusters = per_fact(asked, right)
    return rate_finding(evidence, "forms", form, values, clusters, note)


def per_fact(
    asked: Sequence[Question], right: Mapping[str, NDArray[np.float64]]
) -> tuple[list[str], dict[str, NDArray[np.float64]], NDArray[np.int64]]:
    """Mean over the questions of every fact.

    Returns:
        (facts, means by role [facts], number of the subject of each fact).
    """
    names, first, at = np.unique([item.fact for item in asked], return_index=True, return_inverse=True)
    count = np.bincount(at)
    means = {role: np.bincount(at, values) / count for role, values in right.items()}
    return list(names), means, subjects(asked)[first]


def _rows(form: str, asked: Sequence[Question], right: Mapping[str, NDArray[np.float64]]) -> list[Row]:
    _, means, clusters = per_fact(asked, right)
    rates = {role: clustered_rate(values, clusters) for role, values in means.items()}
    return [
        {"form": form, "model": role, "rate": r.value, "low": r.low, "high": r.high, "n": r.n}
        for role, r in rates.items()
    ]
