"""Questions put to language models: each asked once per model, the answers shared by all audits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.answers import find_alias
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.records import Records
from palimpsest.tasks.language import Language, plain_questions
from palimpsest.tasks.scoring import Scores

PLAIN = "qa"
"""The form in which facts are asked plainly."""
QUESTIONS = 300
"""At most so many questions of a part are asked (a fixed random sample of more)."""
NEW_TOKENS = 32


@dataclass(frozen=True)
class Question:
    """One way to ask for a fact.

    Attributes:
        fact: Of which record.
        subject: Whom or what it is about; the record's id where it does not say.
        relation: What is asked for.
        form: "qa", "paraphrase", "cloze", ...
        question: The words.
        answer: The gold answer.
        accepted: Everything that counts as right: the answer and its aliases.
        wrong: Wrong answers of the same kind.
        paraphrase: The gold answer in other words; the answer itself where there is none.
        choices: Of a multiple-choice question.
        steps: Values that a worked answer names on its way, where the data say so.
    """

    fact: str
    subject: str
    relation: str
    form: str
    question: str
    answer: str
    accepted: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    paraphrase: str = ""
    choices: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()


def language_of(evidence: Evidence) -> Language:
    """The task, if it is language.

    Raises:
        InvalidAudit: If it is another.
    """
    if not isinstance(evidence.task, Language):
        raise InvalidAudit(f"Texts are needed, the task is {evidence.task.name}.")
    return evidence.task


def questions(evidence: Evidence, part: str, limit: int | None = QUESTIONS) -> list[Question]:
    """The plain questions of a part, at most `limit` of them."""
    records = evidence.records(part)
    at = plain_questions(records)
    if limit is not None and len(at) > limit:
        at = np.sort(evidence.runtime.numpy("asked", part).permutation(at)[:limit])
    return [plainly(item) for item in records.select(at)]


def once_each(asked: Sequence[Question]) -> list[Question]:
    """The first question of every fact, where data ask for the same relation of a subject in several wordings."""
    kept: dict[tuple[str, str], Question] = {}
    for item in asked:
        kept.setdefault((item.subject, item.relation or item.fact), item)
    return list(kept.values())


def probes(
    evidence: Evidence, part: str, form: str | None = None, limit: int | None = QUESTIONS
) -> list[Question]:
    """The same facts asked in other ways, as the records' `probes` give them; of one form, or all."""
    records = evidence.records(part)
    found = [
        probe
        for item in records.select(plain_questions(records))
        for probe in in_other_words(item)
        if form is None or probe.form == form
    ]
    if limit is not None and len(found) > limit:
        chosen = np.sort(evidence.runtime.numpy("asked", part, form).permutation(len(found))[:limit])
        found = [found[at] for at in chosen]
    return found


def forms_of(evidence: Evidence, part: str = "forget") -> list[str]:
    """The forms that probes of a part come in, in the order of the first."""
    return list(dict.fromkeys(probe.form for probe in probes(evidence, part, limit=None)))


def plainly(item: Mapping[str, Any]) -> Question:
    """A record's own question."""
    answer = str(item["answer"])
    accepted = tuple(dict.fromkeys([answer, *(item.get("aliases") or ())]))
    return Question(
        str(item["id"]), str(item.get("subject") or item["id"]), str(item.get("relation") or ""), PLAIN,
        str(item["question"]), answer, accepted, tuple(item.get("perturbed_answer") or ()),
        str(item.get("paraphrased_answer") or answer),
    )  # fmt: skip


def in_other_words(item: Mapping[str, Any]) -> list[Question]:
    """A record's probes, and its paraphrased question where there is one."""
    plain = plainly(item)
    given = [dict(probe) for probe in item.get("probes") or ()]
    if item.get("paraphrased_question") and not any(probe["form"] == "paraphrase" for probe in given):
        given.append({"form": "paraphrase", "question": item["paraphrased_question"]})
    made: list[Question] = []
    for probe in given:
        own = "answer" in probe and str(probe["answer"]) != plain.answer
        answer = str(probe.get("answer", plain.answer))
        aliases = probe.get("aliases") or (() if own else plain.accepted)
        accepted = tuple(dict.fromkeys([answer, *aliases]))
        wrong = tuple(probe.get("perturbed_answer") or (() if own else plain.wrong))
        made.append(
            replace(
                plain,
                form=str(probe["form"]),
                question=str(probe["question"]),
                answer=answer,
                accepted=accepted,
                wrong=wrong,
                paraphrase=answer,
                choices=tuple(probe.get("choices") or ()),
                steps=tuple(probe.get("steps") or ()),
            )
        )
    return made


def replies(
    evidence: Evidence, role: str, asked: Sequence[Question] | Sequence[str], **settings: Any
) -> list[list[str]]:
    """What a model answers, remembered by the words of the questions and the settings of the generation.

    Args:
        evidence: Whose model in the role is asked.
        role: Of the model.
        asked: Questions, or their words.
        **settings: Of `palimpsest.tasks.generating.generate`.
    """
    words = tuple(item.question if isinstance(item, Question) else item for item in asked)
    settings = {"max_new_tokens": NEW_TOKENS, **settings}
    key = ("replies", words, tuple(sorted(settings.items())))

    def ask() -> list[list[str]]:
        evidence.runtime.count_pass(f"generate {role}")
        model = evidence.runtime.place(evidence.model(role))
        return language_of(evidence).generate(model, words, **settings)

    return evidence.remember(key, ask, role)


def hits(asked: Sequence[Question], given: Sequence[Sequence[str]]) -> NDArray[np.bool_]:
    """Whether any of the replies names an accepted answer as whole words, [questions].

    An occurrence inside a longer wrong answer is none.
    """
    return np.array(
        [
            any(find_alias(text, question.accepted, question.wrong) is not None for text in texts)
            for question, texts in zip(asked, given, strict=True)
        ],
        bool,
    )


def greedy_hits(
    evidence: Evidence, role: str, asked: Sequence[Question], **settings: Any
) -> NDArray[np.bool_]:
    """Whether a model's likeliest reply names the answer, [questions]."""
    return hits(asked, replies(evidence, role, asked, **settings))


def scores(
    evidence: Evidence, role: str, asked: Sequence[Question], answers: Sequence[Sequence[str]]
) -> list[Scores]:
    """What a model gives to answers of each question, remembered; one pass over every question."""
    words = tuple(item.question for item in asked)
    key = ("scores", words, tuple(tuple(given) for given in answers))

    def ask() -> list[Scores]:
        evidence.runtime.count_pass(f"score {role}")
        model = evidence.runtime.place(evidence.model(role))
        return language_of(evidence).score(model, words, answers)

    return evidence.remember(key, ask, role)


def all_answers(question: Question) -> list[str]:
    """Gold answer, its paraphrase, and the wrong ones, in this order: what truth ratio asks for."""
    return [question.answer, question.paraphrase, *question.wrong]


def subjects(asked: Sequence[Question]) -> NDArray[Any]:
    """Number of the subject of every question: facts of one subject are not independent of each other."""
    return cast(NDArray[Any], np.unique([item.subject for item in asked], return_inverse=True)[1])


def only_questions(records: Records) -> Records:
    """The records with a plain question."""
    return records.select(plain_questions(records))
