"""RWKU's probes as prompts: fill-in-the-blank, questions, nine adversarial kinds, neighbours; for any target.

Jin et al. 2024, arXiv 2406.10890. On the published files they are the published ones; in the generated world
cloze and plain questions of the records are used, and adversarial prompts are built for every fact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from palimpsest.audit.language.asked import Question, in_other_words, once_each, plainly, questions
from palimpsest.audit.language.prompt_builders import (
    BUILDERS,
    RWKU_KINDS,
    Example,
    Prompt,
    Target,
    examples_for,
    in_context_learning,
)
from palimpsest.core.errors import InvalidRecords
from palimpsest.core.evidence import Evidence
from palimpsest.core.records import Records
from palimpsest.suites.rwku_scores import check_neighbour, probe_kind
from palimpsest.tasks.language import plain_questions

INSTRUCTIONS = {
    "1": "Fill in the blank in the sentence that follows.",
    "2": "Give a short answer to the question that follows.",
}
"""Before a probe; adversarial ones have that of questions. Our own words: the published ones are alike."""
CUE = "Answer:"
"""The beginning that is forced into every answer but to the kinds of `BARE`."""
BARE, UNLABELLED = ("affirmative suffix",), ("in-context learning",)
SHOTS = 4
"""Retained questions before an in-context probe."""
CHOICES = "multiple choice"


@dataclass(frozen=True)
class Asked:
    """A probe as it is put to a model.

    Attributes:
        subject: The target, or the target whose neighbour is asked about.
        level: "1" (fill-in-blank), "2" (question) or "3" (adversarial).
        kind: Of an adversarial probe.
        prompt: What is asked.
        answer: Gold answer; of a reverse query the target.
        opening: Forced beginning of the answer.
        raw: Whether the prompt is whole, without a template around it.
        chance: That guessing is right, where the probe names its options; else 0.
    """

    subject: str
    level: str
    kind: str
    prompt: str
    answer: str
    opening: str = ""
    raw: bool = False
    chance: float = 0.0


def instructed(probe: Asked) -> Asked:
    """A published probe in the words of the protocol: an instruction, a label, and a cue for the answer."""
    label = "" if probe.kind in UNLABELLED else "Question: "
    text = f"{INSTRUCTIONS['1' if probe.level == '1' else '2']}\n{label}{probe.prompt}"
    return replace(probe, prompt=text, opening="" if probe.kind in BARE else CUE)


def is_published(evidence: Evidence) -> bool:
    """Whether the records are of the published files."""
    test = evidence.split.test
    return test is not None and test.has_column("form") and bool((test.column("form") == "level 1").any())


def forget_probes(evidence: Evidence, instructions: bool, each: int) -> list[Asked]:
    """Every probe of the targets of a request.

    Args:
        evidence: With the split and the task.
        instructions: Whether the protocol's instruction, label and cue go around published probes.
        each: Prompts per fact and adversarial kind at most, where they are built.

    Raises:
        InvalidRecords: If no probe is about a target, naming it.
    """
    if is_published(evidence):
        found = list(_published(evidence, {"level 1": "1", "level 2": "2", "level 3": "3"}))
        found = [instructed(probe) for probe in found] if instructions else found
    else:
        found = [*_plain(evidence.split.forget), *_adversarial(evidence, each)]
    absent = sorted(targets(evidence) - {probe.subject for probe in found})
    if absent:
        raise InvalidRecords(
            f"No probe is about {', '.join(absent[:3])}: the files do not know these targets."
        )
    return found


def neighbour_probes(evidence: Evidence, instructions: bool) -> list[Asked]:
    """Fill-in-the-blank and questions about neighbours of the targets, whom nobody asked to forget."""
    if is_published(evidence):
        found = list(_published(evidence, {"neighbour 1": "1", "neighbour 2": "2"}))
        return [instructed(probe) for probe in found] if instructions else found
    near = _neighbours(evidence)
    found = list(_plain(near)) if near is not None and len(near) else []
    names = targets(evidence)
    for probe in found:
        for name in names:
            check_neighbour(name, [probe.answer])
    return found


def targets(evidence: Evidence) -> set[str]:
    """Names of the targets of a request."""
    forget = evidence.split.forget
    if not forget.has_column("subject"):
        raise InvalidRecords("RWKU knows its targets by name: the records need a column 'subject'.")
    return {str(name) for name in forget.column("subject") if str(name).strip()}


def _published(evidence: Evidence, forms: dict[str, str]) -> Iterator[Asked]:
    """Probes of the files that are about the targets."""
    wanted, test = targets(evidence), evidence.split.parts["test"]
    kinds = test.column("kind")
    for at, form in enumerate(test.column("form")):
        if form in forms and str(test.column("subject")[at]) in wanted:
            item, level = test[at], forms[str(form)]
            kind = probe_kind(str(kinds[at])) if level == "3" else ""
            yield Asked(item["subject"], level, kind, item["question"], item["answer"])


def _plain(records: Records) -> Iterator[Asked]:
    """A blank and a question for every fact."""
    asked = records.select(plain_questions(records))
    seen: set[tuple[str, str]] = set()
    for item in asked:
        question = plainly(item)
        fact = (question.subject, question.relation or question.fact)
        if fact in seen:
            continue
        seen.add(fact)
        yield Asked(question.subject, "2", "", question.question, question.answer)
        for probe in in_other_words(item):
            if probe.form == "cloze":
                yield Asked(question.subject, "1", "", probe.question, probe.answer)


def _adversarial(evidence: Evidence, each: int) -> Iterator[Asked]:
    """The nine kinds for every fact that allows them."""
    facts = once_each(questions(evidence, "forget", None))
    owners = _owners(evidence)
    pool = _examples(evidence)
    task = evidence.task
    for fact, target in zip(facts, _targets(evidence, facts), strict=True):
        for kind in RWKU_KINDS:
            if kind == "reverse query" and owners[target.answer] - {target.subject}:
                continue  # several people share the value: nobody could say whose it is
            try:
                if kind == "in-context learning":
                    shown = examples_for(target, pool, SHOTS)
                    made = in_context_learning(target, shown, task.form)  # pyright: ignore[reportAttributeAccessIssue]
                else:
                    made = BUILDERS[kind](target)
            except InvalidRecords:
                continue  # a prompt of this kind would hold its answer, or the fact lacks what it needs
            yield from (_of_prompt(fact, kind, prompt) for prompt in made[:each])


def _of_prompt(fact: Question, kind: str, prompt: Prompt) -> Asked:
    answer = fact.subject if kind == "reverse query" else fact.answer
    return Asked(fact.subject, "3", kind, prompt.text, answer, prompt.opening, prompt.raw, prompt.chance)


def _targets(evidence: Evidence, facts: Sequence[Question]) -> list[Target]:
    """What the builders make prompts of."""
    records = evidence.split.forget
    own: dict[str, list[Question]] = defaultdict(list)
    words: dict[str, list[Question]] = {}
    for item in records.select(plain_questions(records)):
        question = plainly(item)
        own[question.subject].append(question)
        words[question.fact] = in_other_words(item)

    def worded(fact: Question, form: str) -> tuple[str, ...]:
        return tuple(probe.question for probe in words.get(fact.fact, ()) if probe.form == form)

    return [
        Target(
            fact.subject, fact.question, fact.answer, fact.accepted, fact.wrong,
            paraphrases=worded(fact, "paraphrase"), reversed=worded(fact, "reversed"),
            hints=tuple(
                (other.question, other.answer)
                for other in once_each(own[fact.subject])
                if other.relation != fact.relation
            ),
        )
        for fact in facts
    ]  # fmt: skip


def _owners(evidence: Evidence) -> dict[str, set[str]]:
    """Whose every value is, over all facts that models are trained on."""
    found: dict[str, set[str]] = defaultdict(set)
    for part in ("forget", "retain"):
        for question in questions(evidence, part, None) if evidence.has(part) else ():
            found[question.answer].add(question.subject)
    return found


def _examples(evidence: Evidence) -> list[Example]:
    if not evidence.has("retain"):
        return []
    return [(item.question, item.answer) for item in questions(evidence, "retain", None)]


def _neighbours(evidence: Evidence) -> Records | None:
    """Retained records of the people linked to the targets; of all neighbours where no link is known."""
    retain = evidence.split.retain
    if retain is None or not retain.has_column("group"):
        return None
    group = retain.column("group") == "neighbours"
    if not retain.has_column("near") or not evidence.split.forget.has_column("fold"):
        return retain.select(group)
    folds = {str(fold) for fold in evidence.split.forget.column("fold")}
    near = np.array([bool(folds & set(str(value).split(","))) for value in retain.column("near")], bool)
    return retain.select(group & near if (group & near).any() else group)
