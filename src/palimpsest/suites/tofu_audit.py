"""TOFU's metric suite as an audit: one scoring pass and one generation pass over each of its sets.

Maini et al. 2024, arXiv 2401.06121, and the additions of OpenUnlearning, arXiv 2506.12618.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from palimpsest.audit.answers import rouge_score
from palimpsest.audit.attacks.knowledge import known, measured
from palimpsest.audit.language.asked import (
    Question,
    all_answers,
    language_of,
    plainly,
    replies,
    scores,
)
from palimpsest.audit.membership.language_signals import without_last
from palimpsest.audit.membership.privacy_leak import Signals, measure_privacy_leak, privacy_signals
from palimpsest.audit.memorisation import exact_memorisation, extraction_strength
from palimpsest.audit.truth_ratio import FORGOTTEN_P, Mean, truth_probabilities, truth_ratios
from palimpsest.audit.truth_ratio import forget_quality as quality_of
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Judgement, Outcome, Row
from palimpsest.suites.tofu_scores import (
    MEASURES,
    OPTION_SETS,
    UTILITY_SETS,
    SetLosses,
    model_utility,
    ratios_by_item,
    set_scores,
)
from palimpsest.tasks.scoring import Scores

GROUPS = {"retain": "people", "real_authors": "neighbours", "world_facts": "world"}
"""Group of the records that each set of model utility consists of."""
TELLING = 1e-3
"""Fewer items than give so small a p-value say little by a high one."""
MEANS: tuple[Mean, ...] = ("geometric", "arithmetic")


@dataclass(frozen=True)
class Answered:
    """What a model gave to the questions of one set.

    Attributes:
        losses: Mean token losses of answers, of what wrong answers are compared with, and of these; and ROUGE.
        paraphrase: Mean token losses of the paraphrased answers, [questions].
        own: Scores of the gold answers, padded to one width.
    """

    losses: SetLosses
    paraphrase: NDArray[Any]
    own: Scores


@audit("tofu", code="A1", tasks=("language",), default=False)
@dataclass(frozen=True)
class Tofu:
    """Forget quality, model utility and what belongs to them, as TOFU and OpenUnlearning define them.

    Forget quality is the p-value of the Kolmogorov-Smirnov test between truth ratios of the model and of a
    retrained one; it comes with the number of items and the smallest p-value that so few can give, and is
    called invalid where it cannot tell the original either. Model utility is the harmonic mean of nine
    numbers, and is not run where one of its three sets is missing. Truth ratios are given with the
    geometric mean of the wrong answers (the leaderboard's) and with the arithmetic one (the paper's, names
    that end in "_arithmetic").

    Sets: the forget records; retained records of the group "people"; "real_authors" are records of the group
    "neighbours", "world_facts" those of the group "world". Of each, questions with wrong answers count.

    Attributes:
        items: The first so many questions of each set, 300 in the leaderboard; None takes all, as OpenUnlearning.
        new_tokens: Of greedy answers.
        k: Share of tokens of Min-K% in PrivLeak.
        against: What wrong answers are compared with in truth ratios: the "paraphrase", which they are variants
            of in the published files, or the "answer", where they are worded as it is (the generated world).
    """

    items: int | None = 300
    new_tokens: int = 200
    k: float = 0.4
    against: Literal["paraphrase", "answer"] = "paraphrase"

    def __post_init__(self) -> None:
        if (self.items is not None and self.items < 1) or self.new_tokens < 1 or not 0 < self.k <= 1:
            raise InvalidAudit(f"items and new_tokens must be at least 1, k in (0, 1]: {self}.")
        if self.against not in ("paraphrase", "answer"):
            raise InvalidAudit(f"against is 'paraphrase' or 'answer', not {self.against!r}.")

    def run(self, evidence: Evidence) -> Outcome:
        """All numbers of all sets that are at hand."""
        language_of(evidence)
        asked = question_sets(evidence, self.items)
        if not asked.get("forget"):
            raise InvalidAudit(
                "None of the forget records has wrong answers (perturbed_answer): no truth ratio can be formed."
            )
        found = {
            name: {role: self._answered(evidence, role, name, those) for role in evidence.roles}
            for name, those in asked.items()
        }
        findings = [*_quality(evidence, found["forget"]), *_forgotten(evidence, found["forget"])]
        findings += _leak(evidence, found["forget"], self.items, self.k)
        for name in UTILITY_SETS:
            if name in found:
                findings += _set(evidence, name, found[name])
        findings += _utility(evidence, found)
        return Outcome(tuple(findings), {"tofu": tuple(_rows(asked, found))})

    def _answered(self, evidence: Evidence, role: str, name: str, asked: Sequence[Question]) -> Answered:
        """A set's answers; real authors and world facts have no paraphrase, the answer takes its place."""
        paraphrased = self.against == "paraphrase" and name not in OPTION_SETS
        # the audit "recall" asks for all forget answers too, and what both ask is generated once
        return answered(evidence, role, asked, self.new_tokens, paraphrased, skip=name != "forget")


def question_sets(evidence: Evidence, items: int | None) -> dict[str, list[Question]]:
    """Questions with wrong answers by set, in the order of the records; sets without any are left out."""
    sets = {"forget": _asked(evidence, ("forget",), None, items)}
    for name, group in GROUPS.items():
        parts = ("retain",) if name == "retain" else ("retain", "test")
        sets[name] = _asked(evidence, parts, group, items)
    return {name: asked for name, asked in sets.items() if asked}


def _asked(evidence: Evidence, parts: Sequence[str], group: str | None, items: int | None) -> list[Question]:
    found: list[Question] = []
    for part in parts:
        if not evidence.has(part):
            continue
        records = evidence.split.parts[part]
        mask = np.ones(len(records), bool)
        if records.has_column("form"):
            mask &= records.column("form") == "qa"
        if group is not None and records.has_column("group"):
            mask &= records.column("group") == group
        elif group not in (None, "people"):
            continue
        chosen = (item for item in records.select(mask) if item.get("question") is not None)
        found += [plainly(item) for item in chosen if item.get("perturbed_answer")]
    return found[:items]


def answered(
    evidence: Evidence,
    role: str,
    asked: Sequence[Question],
    new_tokens: int = 200,
    paraphrased: bool = True,
    skip: bool = True,
) -> Answered:
    """Losses and ROUGE of questions: one pass that scores, one that generates.

    Args:
        evidence: Whose model is asked.
        role: Of the model.
        asked: Questions with as many wrong answers each.
        new_tokens: Of greedy answers.
        paraphrased: Whether the paraphrase, or else the answer, is what wrong answers are compared with.
        skip: Whether answers that are known by heart are not generated (see `greedy_answers`).

    Raises:
        InvalidAudit: If the numbers of wrong answers differ.
    """
    given = scores(evidence, role, asked, [all_answers(item) for item in asked])
    counts = sorted({len(item.wrong) for item in asked})
    if len(counts) > 1:
        raise InvalidAudit(f"Every question needs as many wrong answers; lists of {counts} were given.")
    texts = greedy_answers(evidence, role, asked, given, new_tokens, skip)
    rouge = rouge_score(texts, [item.answer for item in asked], stem=True)
    means = np.stack([item.mean.double().numpy() for item in given])
    return Answered(
        SetLosses(
            tuple(item.fact for item in asked),
            means[:, 0],
            means[:, int(paraphrased)],
            means[:, 2:],
            np.array([item.recall for item in rouge]),
        ),
        means[:, 1],
        first_answers(given),
    )


def greedy_answers(
    evidence: Evidence,
    role: str,
    asked: Sequence[Question],
    given: Sequence[Scores],
    new_tokens: int,
    skip: bool = True,
) -> list[str]:
    """The likeliest answer to every question.

    Where each token of the gold answer, its end among them, is the likeliest after those before it, greedy
    generation gives this very answer: it is not generated once more.

    Args:
        evidence: Whose model is asked.
        role: Of the model.
        asked: Questions.
        given: Scores of their answers, the gold one first.
        new_tokens: Of an answer; a longer gold answer is generated, so that it is cut alike.
        skip: False generates all.
    """
    by_heart = [
        skip and bool((item.right | ~item.mask)[0].all()) and int(item.mask[0].sum()) <= new_tokens
        for item in given
    ]
    open_questions = [question for question, known_one in zip(asked, by_heart, strict=True) if not known_one]
    texts = iter(replies(evidence, role, open_questions, max_new_tokens=new_tokens) if open_questions else [])
    return [
        question.answer.strip() if known_one else next(texts)[0]
        for question, known_one in zip(asked, by_heart, strict=True)
    ]


def first_answers(given: Sequence[Scores]) -> Scores:
    """Scores of the first answer of every question, padded to one width, [questions, tokens]."""

    def stacked(name: str) -> torch.Tensor:
        rows = [getattr(item, name)[0, : int(item.mask[0].sum())] for item in given]
        return pad_sequence(rows, batch_first=True)

    return Scores(stacked("losses"), stacked("right"), stacked("mask"))


def _quality(evidence: Evidence, found: Mapping[str, Answered]) -> list[Finding]:
    """Forget quality against the first control, and of the original and of further controls against it."""
    if not evidence.controls:
        why = "forget quality compares with a retrained model; there is none"
        return [Finding("tofu", "forget_quality", None, judgement=Judgement.NOT_RUN, note=why)]
    findings: list[Finding] = []
    for mean in MEANS:
        ratios = {role: ratios_by_item(found[role].losses, mean) for role in evidence.roles}
        first, *others = evidence.control_roles
        tests = {role: quality_of(ratios[role], ratios[first]) for role in evidence.roles if role != first}
        own = tests[UNLEARNED]
        against = [quality_of(ratios[UNLEARNED], ratios[role]).p for role in others]
        note = (
            f"p-value of a Kolmogorov-Smirnov test, {mean} mean; smallest attainable {own.smallest_p:.2g} "
            f"with {own.n} items a side"
        )
        if against:
            note += f"; against other controls {', '.join(f'{p:.2g}' for p in against)}"
        judgement = _judged(own.p, tests[ORIGINAL].p if ORIGINAL in tests else None)
        if judgement is Judgement.INVALID:
            note += "; the original is not told from the control either"
        elif own.smallest_p > TELLING:
            note += "; too few items for a high p-value to say much"
        end = "" if mean == "geometric" else f"_{mean}"
        finding = measured(
            evidence, "tofu", f"forget_quality{end}", {role: t.p for role, t in tests.items()}, note
        )
        findings.append(replace(finding, n=own.n, judgement=judgement))
        if mean == "geometric":
            distance = {role: test.statistic for role, test in tests.items()}
            about = "largest distance of the distributions of truth ratios from the first control's"
            findings.append(
                replace(measured(evidence, "tofu", "forget_ks_distance", distance, about), n=own.n)
            )
            tens = {role: math.log10(test.p) if test.p > 0 else -math.inf for role, test in tests.items()}
            findings.append(measured(evidence, "tofu", "log10_forget_quality", tens))
    return findings


def _judged(p: float, original: float | None) -> Judgement:
    """What a p-value says: nothing where the untouched model has a high one too."""
    if p <= FORGOTTEN_P:
        return Judgement.SEPARATED
    return Judgement.INVALID if original is not None and original > FORGOTTEN_P else Judgement.AS_RETRAINED


def _forgotten(evidence: Evidence, found: Mapping[str, Answered]) -> list[Finding]:
    """Everything about single forget questions, on the scale K."""

    def of(name: str, note: str, values: dict[str, NDArray[Any]], bears: Any = "") -> Finding:
        return known(evidence, "tofu", name, values, note, bears)

    losses = {role: item.losses for role, item in found.items()}
    inner = {role: (item.own.right, without_last(item.own.mask)) for role, item in found.items()}
    per_token = "exp of minus the mean token loss"
    findings = [
        of("forget_probability", per_token, _each(losses, lambda s: np.exp(-s.answer)), "outputs"),
        of(
            "forget_paraphrase_probability",
            per_token,
            {role: np.exp(-item.paraphrase) for role, item in found.items()},
        ),
        of(
            "forget_wrong_probability",
            per_token,
            _each(losses, lambda s: np.exp(-np.asarray(s.wrong)).mean(1)),
        ),
        of("forget_rouge", "ROUGE-L recall with stemming, greedy", _each(losses, lambda s: s.rouge)),
        of(
            "forget_exact_memorisation",
            "share of tokens that are the likeliest, end left out",
            {role: exact_memorisation(*pair).nan_to_num(0).numpy() for role, pair in inner.items()},
        ),
        of(
            "forget_extraction_strength",
            "1 - k/L under teacher forcing, end left out",
            {role: extraction_strength(*pair).nan_to_num(0).numpy() for role, pair in inner.items()},
        ),
        of(
            "forget_truth_probability",
            "p / (p + p_wrong), geometric mean (prob_mean)",
            _each(losses, lambda s: truth_probabilities(s.paraphrase, s.wrong)),
        ),
    ]
    for mean in MEANS:
        end = "" if mean == "geometric" else f"_{mean}"
        values = {
            role: _undecided(truth_ratios(item.paraphrase, item.wrong, mean)) for role, item in losses.items()
        }
        finding = of(f"forget_truth_ratio{end}", f"mean of min(R, 1/R), {mean} mean of the wrong", values)
        findings.append(replace(finding, more_is="neutral"))
    return findings


def _each(losses: Mapping[str, SetLosses], measure: Any) -> dict[str, NDArray[Any]]:
    return {role: np.asarray(measure(item), float) for role, item in losses.items()}


def _undecided(ratios: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(divide="ignore"):
        return np.minimum(ratios, 1 / ratios)


def _leak(evidence: Evidence, found: Mapping[str, Answered], items: int | None, k: float) -> list[Finding]:
    """PrivLeak: Min-K% of forget answers against those of people never trained on, and against a control's."""
    held = _asked(evidence, ("holdout",), "people", items)
    missing = "" if evidence.controls else "a retrained model"
    missing = missing or ("" if len(held) > 1 else "a holdout of questions never trained on")
    if missing:
        why = f"PrivLeak needs {missing}"
        return [Finding("tofu", "privacy_leak", None, judgement=Judgement.NOT_RUN, note=why)]

    def signals(role: str) -> tuple[Signals, Signals]:
        other = first_answers(scores(evidence, role, held, [all_answers(item) for item in held]))
        mine, theirs = (
            privacy_signals(-own.losses, without_last(own.mask), k) for own in (found[role].own, other)
        )
        return mine, theirs

    both = {role: signals(role) for role in evidence.roles}
    first = evidence.control_roles[0]
    leaks = {role: measure_privacy_leak(both[role], both[first]) for role in evidence.roles if role != first}
    own = leaks[UNLEARNED]
    note = f"Min-{100 * k:g}%, against the first control; 0 as retrained, -100 as known by heart"
    if not own.fair:
        note += f"; forget and holdout differ by themselves (AUC of the control {own.retrained_auc:.2f})"
    leak = measured(
        evidence, "tofu", "privacy_leak", {role: item.percent for role, item in leaks.items()}, note
    )
    leak = replace(leak, n=own.forget + own.holdout, ideal=0.0)
    areas = {first: own.retrained_auc, **{role: item.auc for role, item in leaks.items()}}
    area = measured(
        evidence, "tofu", "privacy_auc", areas, "chance that a holdout answer looks more like a member"
    )
    return [leak, replace(area, low=own.low, high=own.high, n=own.forget + own.holdout)]


def _set(evidence: Evidence, name: str, found: Mapping[str, Answered]) -> list[Finding]:
    """Probability, ROUGE and truth ratio of a set of model utility."""
    findings: list[Finding] = []
    for mean in MEANS:
        numbers = {role: set_scores(name, item.losses, mean) for role, item in found.items()}
        for measure in MEASURES if mean == "geometric" else ("truth_ratio",):
            values = {role: float(getattr(item, measure)) for role, item in numbers.items()}
            end = "" if mean == "geometric" else f"_{mean}"
            finding = measured(evidence, "tofu", f"{name}_{measure}{end}", values, more_is="utility")
            findings.append(replace(finding, n=len(found[UNLEARNED].losses.items)))
    return findings


def _utility(evidence: Evidence, found: Mapping[str, Mapping[str, Answered]]) -> list[Finding]:
    """Model utility; not run rather than averaged over fewer sets."""
    missing = [name for name in UTILITY_SETS if name not in found]
    if missing:
        why = f"a harmonic mean over fewer sets is another measure; without questions: {', '.join(missing)}"
        return [Finding("tofu", "model_utility", None, judgement=Judgement.NOT_RUN, note=why)]
    findings: list[Finding] = []
    for mean in MEANS:
        values = {
            role: model_utility(
                {name: set_scores(name, found[name][role].losses, mean) for name in UTILITY_SETS}
            )
            for role in evidence.roles
        }
        end = "" if mean == "geometric" else f"_{mean}"
        note = f"harmonic mean of nine, {mean} truth ratio"
        findings.append(measured(evidence, "tofu", f"model_utility{end}", values, note, "utility"))
    findings[0] = replace(findings[0], bears="utility")
    return findings


def _rows(asked: Mapping[str, Sequence[Question]], found: Mapping[str, Mapping[str, Answered]]) -> list[Row]:
    """Probability, truth ratio and ROUGE of every question and model."""
    rows: list[Row] = []
    for name, those in asked.items():
        for role, item in found[name].items():
            ratios = truth_ratios(item.losses.paraphrase, item.losses.wrong)
            rows += [
                {
                    "set": name,
                    "fact": question.fact,
                    "model": role,
                    "probability": float(np.exp(-item.losses.answer[at])),
                    "truth_ratio": float(ratios[at]),
                    "rouge": float(item.losses.rouge[at]),
                }
                for at, question in enumerate(those)
            ]
    return rows
