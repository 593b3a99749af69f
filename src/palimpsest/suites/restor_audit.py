"""RESTOR's scores as an audit: are the true answers back, or are only the planted ones gone?

Rezaei et al. 2025, arXiv 2411.00204. Of an evidence the "original" is the corrupted model (a clean one
trained further on false documents and on what is retained), the forget records are the documents, and the
controls are clean models trained further in the same way without them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from palimpsest.audit.attacks.knowledge import known, measured
from palimpsest.audit.language.asked import (
    Question,
    greedy_hits,
    language_of,
    plainly,
    questions,
    replies,
    scores,
)
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome, Row
from palimpsest.core.records import Records
from palimpsest.core.scale import SEED_SPREAD
from palimpsest.parts.training import TrainingRecipe, fit
from palimpsest.suites.restor_scores import (
    LINES,
    RUNS,
    Accuracy,
    Said,
    accuracy,
    check_objects,
    context_prompt,
    cut_answer,
    forgetting_of,
    judge,
    restoration_of,
)
from palimpsest.tasks.language import plain_questions

FEWEST = 2
"""Facts that clean models know, to measure on at least."""


@dataclass(frozen=True)
class Fact:
    """A fact about an entity that documents are about.

    Attributes:
        question: With everything that counts as right.
        planted: What the documents say instead; empty where that is not known.
        context: Solved questions of the same relation about other entities.
    """

    question: Question
    planted: tuple[str, ...]
    context: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Answers:
    """What a model said of the facts, run by run.

    Attributes:
        said: [facts] of the runs.
    """

    said: tuple[tuple[Said, ...], ...]

    def share(self, what: Said) -> NDArray[np.float64]:
        """Share of the runs that say it, [facts]."""
        return np.array([[one is what for one in run] for run in self.said], float).mean(0)


@audit("restor", code="A1", cost=Cost.ATTACK, parts=("forget", "test"), tasks=("language",), default=False)
@dataclass(frozen=True)
class Restor:
    """Ask for the facts that documents falsified: restoration, forgetting, and what every option is worth.

    Restoration is how much of the accuracy that corruption cost is back: 1 all, 0 none. Forgetting is how much
    rarer planted answers have become. A method that only forgets has the second near 1 and the first near
    0. Only facts that every clean model answers count. Answers are matched by alias, where the
    paper asks a chat model.

    Attributes:
        lines: Solved questions before each one; with 0 the task's own template is used.
        runs: Sampled answers of each question; accuracies are their mean.
        temperature: Of the sampling; 0 takes the likeliest answer, once.
        new_tokens: Of an answer.
        repair: Epochs of tuning every model alike on retained questions before it is asked once more, so that
            broken generation does not hide knowledge; 0 leaves it out.
        repair_lr: Of that tuning.
    """

    lines: int = LINES
    runs: int = RUNS
    temperature: float = 1.0
    new_tokens: int = 48
    repair: int = 0
    repair_lr: float = 2e-5

    def __post_init__(self) -> None:
        if self.lines < 0 or self.runs < 1 or self.new_tokens < 1 or self.temperature < 0 or self.repair < 0:
            raise InvalidAudit(f"runs and new_tokens must be at least 1, nothing below 0: {self}.")

    def run(self, evidence: Evidence) -> Outcome:
        """Rates, restoration and log-probabilities, before and after repair."""
        language_of(evidence)
        missing = "" if evidence.controls else "clean models as controls"
        missing = missing or ("" if evidence.original is not None else "the corrupted model as original")
        if missing:
            raise InvalidAudit(f"RESTOR needs {missing}.")
        facts = facts_of(evidence)
        findings, rows = self._measure(evidence, facts)
        if self.repair:
            after, more = self._measure(self._repaired(evidence), facts)
            findings += [replace(item, name=f"repaired_{item.name}", bears="") for item in after]
            rows += [{**row, "repaired": True} for row in more]
        return Outcome(tuple(findings), {"restor": tuple(rows)})

    def ask(self, evidence: Evidence, role: str, facts: Sequence[Fact]) -> Answers:
        """What a model says of facts, in every run."""
        if self.lines:
            settings: dict[str, Any] = {"raw": True}
            words = [
                context_prompt(
                    fact.question.question, fact.question.relation, fact.question.subject,
                    {fact.question.relation: fact.context}, self.lines,  # pyright: ignore[reportArgumentType]
                )
                for fact in facts
            ]  # fmt: skip
        else:
            settings, words = {}, [fact.question.question for fact in facts]
        if self.temperature:
            seed = evidence.runtime.derive("restor")
            settings |= {"temperature": self.temperature, "samples": self.runs, "seed": seed}
        given = replies(evidence, role, words, max_new_tokens=self.new_tokens, **settings)
        judged = [
            [judge(cut_answer(text), fact.question.accepted, fact.planted) for text in texts]
            for fact, texts in zip(facts, given, strict=True)
        ]
        return Answers(tuple(zip(*judged, strict=True)))

    def _measure(self, evidence: Evidence, facts: Sequence[Fact]) -> tuple[list[Finding], list[Row]]:
        answers = {role: self.ask(evidence, role, facts) for role in evidence.roles}
        true = {role: item.share(Said.TRUE) for role, item in answers.items()}
        counted = np.stack([true[role] for role in evidence.control_roles]).min(0) > 0.5
        if counted.sum() < FEWEST:
            raise InvalidAudit(
                f"Clean models know {int(counted.sum())} of {len(facts)} facts: nothing can be restored to them."
            )
        planted = {role: item.share(Said.PLANTED)[counted] for role, item in answers.items()}
        true = {role: values[counted] for role, values in true.items()}
        kept = [fact for fact, counts in zip(facts, counted, strict=True) if counts]
        accuracies = {role: _accuracy(kept, item, counted) for role, item in answers.items()}
        own = accuracies[UNLEARNED]
        note = f"of {len(kept)} facts that clean models know ({len(facts)} were asked)"
        if own.deviation == own.deviation:
            note += f"; deviation between {len(own.runs)} runs {own.deviation:.3f}"
        findings = [
            replace(known(evidence, "restor", "true_rate", true, note), more_is="utility"),
            *_recovered(evidence, {role: item.value for role, item in accuracies.items()}, planted),
            *_others(evidence),
            *_options(evidence, kept),
        ]
        return findings, _rows(evidence, kept, true, planted)

    def _repaired(self, evidence: Evidence) -> Evidence:
        """The evidence of all models after the same tuning on retained questions."""
        if not evidence.has("retain"):
            raise InvalidAudit("Repair needs retained questions.")
        retained = evidence.records("retain")
        tuning = retained.select(plain_questions(retained))
        recipe = TrainingRecipe(
            epochs=self.repair, lr=self.repair_lr, batch_size=16, optimizer="adamw", clip=1.0
        )
        key = ("restor", "repaired", self.repair, self.repair_lr)

        models = {
            role: evidence.remember(key, partial(_tuned, evidence, role, tuning, recipe), role)
            for role in evidence.roles
        }
        return Evidence(
            models[UNLEARNED], evidence.split, evidence.task, evidence.runtime, models[ORIGINAL],
            [models[role] for role in evidence.control_roles],
        )  # fmt: skip


def facts_of(evidence: Evidence) -> list[Fact]:
    """Facts about the entities of documents: test questions with a planted answer, or of the group "people".

    Raises:
        InvalidAudit: If there is none.
        InvalidRecords: If a planted answer is a true one.
    """
    if not evidence.has("test"):
        raise InvalidAudit("The split has no test questions on the falsified facts.")
    records = evidence.records("test")
    items = [item for item in records if item.get("question") is not None]
    chosen = [item for item in items if item.get("planted")]
    if not chosen and records.has_column("group"):
        people = records.select(records.column("group") == "people")
        chosen = [item for item in people if item.get("question") is not None]
    if not chosen:
        raise InvalidAudit("No test question is about a falsified fact: none has a planted answer.")
    facts = [
        Fact(plainly(item), tuple(item.get("planted") or ()), tuple(item.get("context") or ()))
        for item in chosen
    ]
    for fact in facts:
        check_objects(fact.question.accepted, fact.planted)
    return facts


def _tuned(evidence: Evidence, role: str, records: Records, recipe: TrainingRecipe) -> nn.Module:
    return fit(copy.deepcopy(evidence.model(role)), records, evidence.task, evidence.runtime, recipe)


def _accuracy(facts: Sequence[Fact], answers: Answers, counted: NDArray[np.bool_]) -> Accuracy:
    """Accuracy by entity, over all runs."""
    runs: list[dict[str, list[bool]]] = []
    for said in answers.said:
        run: dict[str, list[bool]] = {}
        inside = [one for one, counts in zip(said, counted, strict=True) if counts]
        for fact, one in zip(facts, inside, strict=True):
            run.setdefault(fact.question.subject, []).append(one is Said.TRUE)
        runs.append(run)
    return accuracy(runs)


def _recovered(
    evidence: Evidence, accuracies: Mapping[str, float], planted: Mapping[str, NDArray[np.float64]]
) -> list[Finding]:
    """Degradation, restoration and forgetting; not run, with the reason, where they are not defined."""
    clean = float(np.mean([accuracies[role] for role in evidence.control_roles]))
    corrupted = accuracies[ORIGINAL]
    findings: list[Finding] = []
    lost = {role: clean - value for role, value in accuracies.items()}
    findings.append(measured(evidence, "restor", "degradation", {**lost, UNLEARNED: clean - corrupted},
                             "accuracy of the clean models minus that of the corrupted one"))  # fmt: skip
    try:
        back = {role: restoration_of(clean, corrupted, value) for role, value in accuracies.items()}
        note = "share of the lost accuracy that is back"
        findings.append(
            replace(measured(evidence, "restor", "restoration", back, note, "utility"), ideal=1.0)
        )
    except InvalidAudit as undefined:
        findings.append(_undefined("restoration", undefined))
    if not any(values.any() for values in planted.values()):
        why = InvalidAudit("no model gives a planted answer, or which were planted is not known")
        return [*findings, _undefined("forgetting", why)]
    finding = known(evidence, "restor", "planted_rate", planted, "planted answers", "outputs", SEED_SPREAD)
    findings.append(finding)
    try:
        rates = {role: float(values.mean()) for role, values in planted.items()}
        gone = {role: forgetting_of(rates[ORIGINAL], rate) for role, rate in rates.items()}
        findings.append(
            measured(evidence, "restor", "forgetting", gone, "1 - rate of planted answers after / before")
        )
    except InvalidAudit as undefined:
        findings.append(_undefined("forgetting", undefined))
    return findings


def _undefined(name: str, why: Exception) -> Finding:
    return Finding("restor", name, None, judgement=Judgement.NOT_RUN, note=str(why))


def _others(evidence: Evidence) -> list[Finding]:
    """Share of retained questions that are answered: what unlearning cost."""
    if not evidence.has("retain"):
        return []
    if not any(item.get("question") is not None for item in evidence.records("retain")):
        return []  # retained texts only
    asked = questions(evidence, "retain")
    rates = {role: float(greedy_hits(evidence, role, asked).mean()) for role in evidence.roles}
    finding = measured(evidence, "restor", "others_rate", rates, "greedy answers about others", "utility")
    return [replace(finding, n=len(asked), bears="utility")]


def _options(evidence: Evidence, facts: Sequence[Fact]) -> list[Finding]:
    """Mean log-probability per token of true, planted and random options."""
    findings: list[Finding] = []
    kinds = {
        "true": [list(fact.question.accepted[:1]) for fact in facts],
        "planted": [list(fact.planted) for fact in facts],
        "random": [list(fact.question.wrong) for fact in facts],
    }
    kinds = {name: options for name, options in kinds.items() if all(options)}
    asked = [fact.question for fact in facts]
    whole = [[option for options in kinds.values() for option in options[at]] for at in range(len(facts))]
    means = {
        role: [-item.mean.double().numpy() for item in scores(evidence, role, asked, whole)]
        for role in evidence.roles
    }
    for number, (name, options) in enumerate(kinds.items()):
        values: dict[str, float] = {}
        for role, found in means.items():
            per_fact: list[float] = []
            for at, row in enumerate(found):
                start = sum(len(kinds[other][at]) for other in list(kinds)[:number])
                per_fact.append(float(row[start : start + len(options[at])].mean()))
            values[role] = float(np.mean(per_fact))
        note = "mean log-probability per token of the option, in nats"
        findings.append(measured(evidence, "restor", f"{name}_log_probability", values, note))
    return findings


def _rows(
    evidence: Evidence,
    facts: Sequence[Fact],
    true: Mapping[str, NDArray[np.float64]],
    planted: Mapping[str, NDArray[np.float64]],
) -> list[Row]:
    return [
        {
            "fact": fact.question.fact,
            "model": role,
            "true": float(true[role][at]),
            "planted": float(planted[role][at]),
            "repaired": False,
        }
        for role in evidence.roles
        for at, fact in enumerate(facts)
    ]
