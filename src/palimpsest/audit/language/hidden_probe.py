"""Probes of hidden states: can the erased answers still be read out of them, layer by layer (checklist C1)?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.audit.attacks.knowledge import known, measured, not_run
from palimpsest.audit.language.asked import QUESTIONS, Question, language_of, questions
from palimpsest.audit.language.inside import (
    blocks_of,
    head_of,
    head_role,
    opening,
    spread_out,
    states,
    tokens_of,
)
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.unlearner import check_range

INVERSE_PENALTIES = (0.01, 0.1, 1.0)
"""C of the logistic regression, chosen on the folds of retained subjects."""
RIDGES = (1.0, 10.0, 100.0, 1000.0)
"""Penalties of the linear map to the answers' directions, chosen alike."""
NAME = "hidden-probe"

Rows = Float[NDArray[np.float64], "rows dim"]
Rates = NDArray[np.float64]


@dataclass(frozen=True)
class Sides:
    """The questions that probes are fitted on (retained subjects) and tested on (forgotten ones)."""

    fit: tuple[Question, ...]
    test: tuple[Question, ...]


@audit(NAME, code="C1", parts=("forget", "retain"), tasks=("language",))
@dataclass(frozen=True)
class HiddenProbe:
    """Fit linear readers on the hidden states of retained subjects and let them read those of forgotten ones.

    The states are the outputs of a block where the true answer begins to differ from wrong ones, in prompt
    and answer. Two readers, because values may be shared or unique:

    - `shared_values`: a multinomial logistic regression from standardised states to the value, for values that
      at least `fewest` retained subjects have. A value that no retained subject has (phone numbers) cannot be
      read so; how many questions that leaves is said in the note.
    - `any_value`: a linear map from the states to the direction in which the head writes the answer's token; the
      true answer must come out nearer to it than the wrong ones of the question. The map is learned on answers
      of retained subjects and reads tokens that it was not fitted on. The directions are those of the head that
      the states were trained for (see `logit-lens`).

    Block and penalty are chosen for every model on folds of retained subjects: never on forgotten ones.
    Selectivity is accuracy less that of the same reader fitted on shuffled labels.

    Attributes:
        most: At most so many blocks are read, evenly spaced, the last among them.
        folds: Of the retained subjects.
        fewest: Retained subjects that must share a value.
        limit: At most this many retained questions are fitted on.
    """

    most: int = 8
    folds: int = 5
    fewest: int = 2
    limit: int = QUESTIONS

    def __post_init__(self) -> None:
        check_range("most", self.most, 1, float("inf"))
        check_range("limit", self.limit, 10, float("inf"))
        if self.folds < 2 or self.fewest < 2:
            raise InvalidHyperparameter(
                f"folds and fewest are at least 2, not {self.folds} and {self.fewest}."
            )

    def run(self, evidence: Evidence) -> Outcome:
        """Accuracy of both readers on forgotten subjects, their selectivity, and the curves over the blocks."""
        language_of(evidence)
        fit, test = questions(evidence, "retain", self.limit), questions(evidence, "forget")
        try:
            blocks = spread_out(blocks_of(evidence), self.most)
            findings, rows = self._any_value(evidence, blocks, Sides(tuple(fit), tuple(test)))
        except InvalidAudit as problem:
            return not_run(NAME, "any_value", str(problem))
        sides = shared(fit, test, self.fewest)
        if len(sides.test) < 2:
            why = f"only {len(sides.test)} of {len(test)} forget questions have values that {self.fewest} retained subjects share"
            findings += not_run(NAME, "shared_values", why).findings
        else:
            more, further = self._shared_values(evidence, blocks, sides, len(test))
            findings, rows = [*findings, *more], [*rows, *further]
        return Outcome(tuple(findings), {"probes": tuple(rows)})

    def _any_value(
        self, evidence: Evidence, blocks: list[int], sides: Sides
    ) -> tuple[list[Finding], list[Row]]:
        sides = Sides(tuple(q for q in sides.fit if q.wrong), tuple(q for q in sides.test if q.wrong))
        if len(sides.test) < 2 or len({q.subject for q in sides.fit}) < self.folds:
            raise InvalidAudit(
                f"{len(sides.test)} forget questions with wrong answers and {len({q.subject for q in sides.fit})} retained "
                f"subjects are too few for {self.folds} folds."
            )
        found = {role: self._ranked(evidence, role, blocks, sides) for role in evidence.roles}
        chance = float(np.mean([1 / (1 + len(q.wrong)) for q in sides.test]))
        note = f"true answer nearest among its wrong ones, chance {chance:.2f}, fitted on {len(sides.fit)} retained questions"
        return self._findings(evidence, "any_value", found, blocks, note)

    def _ranked(self, evidence: Evidence, role: str, blocks: list[int], sides: Sides) -> Reading:
        def read() -> Reading:
            directions = _directions(evidence, head_role(evidence, role))
            gold = tokens_of(evidence, sides.fit).numpy()
            own = [_candidates(evidence, q) for q in sides.fit]
            other = [_candidates(evidence, q) for q in sides.test]

            def map_of(penalty: float, labels: NDArray[np.int64]) -> Reader:
                return lambda x, at, rows: ridge(x, directions[labels[at]], penalty, rows)

            def judged(outputs: Rows, candidates: Sequence[NDArray[np.int64]]) -> Rates:
                return nearest(outputs, [directions[tokens] for tokens in candidates])

            return self._best(
                evidence, role, blocks, sides,
                lambda penalty: map_of(penalty, gold), RIDGES,
                lambda outputs, at: judged(outputs, [own[one] for one in at]),
                lambda outputs: judged(outputs, other),
                lambda penalty, order: map_of(penalty, gold[order]),
            )  # fmt: skip

        return evidence.remember((self, "any value", sides), read, role)

    def _shared_values(
        self, evidence: Evidence, blocks: list[int], sides: Sides, whole: int
    ) -> tuple[list[Finding], list[Row]]:
        classes = {value: number for number, value in enumerate(sorted({_value(q) for q in sides.fit}))}
        mine = np.array([classes[_value(q)] for q in sides.fit])
        theirs = np.array([classes[_value(q)] for q in sides.test])

        def read(role: str) -> Reading:
            def map_of(penalty: float, labels: NDArray[np.int64]) -> Reader:
                return lambda x, at, rows: logistic(x, labels[at], penalty, rows).astype(np.float64)

            return self._best(
                evidence, role, blocks, sides,
                lambda penalty: map_of(penalty, mine), INVERSE_PENALTIES,
                lambda guess, at: (guess == mine[at]).astype(float),
                lambda guess: (guess == theirs).astype(float),
                lambda penalty, order: map_of(penalty, mine[order]),
            )  # fmt: skip

        found = {
            role: evidence.remember((self, "shared values", sides), lambda role=role: read(role), role)
            for role in evidence.roles
        }
        note = (
            f"{len(classes)} values that several retained subjects share; {len(sides.test)} of {whole} forget questions "
            f"have one; fitted on {len(sides.fit)} retained questions"
        )
        return self._findings(evidence, "shared_values", found, blocks, note)

    def _best(
        self,
        evidence: Evidence,
        role: str,
        blocks: list[int],
        sides: Sides,
        reader: Callable[[float], Reader],
        penalties: Sequence[float],
        right_fit: Callable[[Rows, NDArray[np.int64]], Rates],
        right_test: Callable[[Rows], Rates],
        shuffled: Callable[[float, NDArray[np.int64]], Reader],
    ) -> Reading:
        """Block and penalty by the folds of retained subjects; then every block on the forgotten ones."""
        fit = states(evidence, role, sides.fit)[blocks].double().numpy()
        test = states(evidence, role, sides.test)[blocks].double().numpy()
        fold = folds_of(sides.fit, self.folds, evidence.runtime.numpy(NAME, "folds"))
        everything = np.arange(len(sides.fit))
        curves, chosen = [], []
        for x, rows in zip(fit, test, strict=True):
            rates = []
            for penalty in penalties:
                read, right = reader(penalty), np.zeros(len(x))
                for one in range(self.folds):
                    inside, outside = everything[fold != one], everything[fold == one]
                    right[outside] = right_fit(read(x[inside], inside, x[outside]), outside)
                rates.append(float(right.mean()))
            penalty = penalties[int(np.argmax(rates))]
            curves.append((max(rates), right_test(reader(penalty)(x, everything, rows))))
            chosen.append(penalty)
        at = int(np.argmax([rate for rate, _ in curves]))
        order = evidence.runtime.numpy(NAME, "shuffle").permutation(len(everything))
        luck = right_test(shuffled(chosen[at], order)(fit[at], everything, test[at]))
        return Reading(at, [rate for rate, _ in curves], [right for _, right in curves], luck)

    def _findings(
        self, evidence: Evidence, name: str, found: Mapping[str, Reading], blocks: list[int], note: str
    ) -> tuple[list[Finding], list[Row]]:
        right = {role: item.right[item.block] for role, item in found.items()}
        where = ", ".join(f"{role} {blocks[item.block]}" for role, item in found.items())
        gain = {role: float(item.right[item.block].mean() - item.luck.mean()) for role, item in found.items()}
        findings = [
            known(evidence, NAME, name, right, f"{note}; blocks {where}", bears="inside"),
            measured(
                evidence, NAME, f"{name}_selectivity", gain,
                f"less the same on shuffled labels, {found[UNLEARNED].luck.mean():.2f}", "knowledge",
            ),
        ]  # fmt: skip
        rows: list[Row] = []
        for at, block in enumerate(blocks):
            k = known(evidence, NAME, f"{name}_{block}", {r: item.right[at] for r, item in found.items()}).k
            rows += [
                {
                    "model": role,
                    "probe": name.replace("_", " "),
                    "block": block,
                    "accuracy": float(item.right[at].mean()),
                    "on_retained_folds": item.folds[at],
                    "k": k if role == UNLEARNED else None,
                }
                for role, item in found.items()
            ]
        return findings, rows


@dataclass(frozen=True)
class Reading:
    """What a reader got right of one model.

    Attributes:
        block: Chosen on the folds, as a place in the lists.
        folds: Accuracy on the folds of retained subjects, per block.
        right: Of the forget questions, per block, each [questions].
        luck: Of the same reader fitted on shuffled labels, in the chosen block, [questions].
    """

    block: int
    folds: list[float]
    right: list[Rates]
    luck: Rates


Reader = Callable[[Rows, NDArray[np.int64], Rows], Rows]
"""Given rows to fit on, which ones they are, and further rows: what is read of these."""


def shared(fit: Sequence[Question], test: Sequence[Question], fewest: int) -> Sides:
    """Only the questions whose values at least `fewest` retained subjects have."""
    who: dict[tuple[str, str], set[str]] = defaultdict(set)
    for question in fit:
        who[_value(question)].add(question.subject)
    many = {value for value, subjects in who.items() if len(subjects) >= fewest}
    return Sides(
        tuple(question for question in fit if _value(question) in many),
        tuple(question for question in test if _value(question) in many),
    )


def folds_of(asked: Sequence[Question], folds: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Number of the fold of every question, [questions]; a subject is in one fold."""
    subject = np.unique([question.subject for question in asked], return_inverse=True)[1]
    order = random.permutation(int(subject.max()) + 1)
    return order[subject] % folds


def logistic(x: Rows, labels: NDArray[np.int64], inverse_penalty: float, rows: Rows) -> NDArray[np.int64]:
    """Classes of rows by a multinomial logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) < 2:
        return np.full(len(rows), labels[0])
    reader = LogisticRegression(C=inverse_penalty, max_iter=300, tol=1e-3)
    return make_pipeline(StandardScaler(), reader).fit(x, labels).predict(rows)


def ridge(x: Rows, y: Rows, penalty: float, rows: Rows) -> Rows:
    """Outputs of a linear map with intercept from standardised features, for further rows.

    Example:
        >>> ridge(np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]]), 0.0, np.array([[1.0], [4.0]])).round(6).tolist()
        [[3.0], [9.0]]
    """
    centre, size = x.mean(0), x.std(0)
    size = np.where(size > 0, size, 1.0)
    a, mean = (x - centre) / size, y.mean(0)
    if len(a) < a.shape[1]:  # the smaller of the two systems of equations
        inner = np.linalg.solve(a @ a.T + penalty * np.eye(len(a)), y - mean)
        weights = a.T @ inner
    else:
        weights = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ (y - mean))
    return ((rows - centre) / size) @ weights + mean


def nearest(outputs: Rows, candidates: Sequence[Rows]) -> Rates:
    """Whether the first candidate of every output has the strictly largest cosine with it, [outputs].

    Example:
        >>> nearest(np.array([[1.0, 0.1]]), [np.array([[1.0, 0.0], [0.0, 1.0]])]).tolist()
        [1.0]
    """
    right = np.zeros(len(outputs))
    for at, (output, rows) in enumerate(zip(outputs, candidates, strict=True)):
        cosines = rows @ output / np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
        right[at] = float(cosines[0] > cosines[1:].max(initial=-np.inf))
    return right


def _value(question: Question) -> tuple[str, str]:
    return question.relation, question.answer


def _candidates(evidence: Evidence, question: Question) -> NDArray[np.int64]:
    """Tokens that follow where the true answer and the wrong ones part: the true one first, each once."""
    task, begun = language_of(evidence), opening(language_of(evidence), question)
    at = len(begun.ids)
    rows = [task.encode(question.question, wrong)[0] for wrong in question.wrong]
    others = [row[at] for row in rows if len(row) > at and tuple(row[:at]) == begun.ids]
    return np.array(list(dict.fromkeys([begun.token, *(token for token in others if token != begun.token)])))


def _directions(evidence: Evidence, role: str) -> Rows:
    """Centred rows of a head, by token."""
    weight = getattr(head_of(evidence, role), "weight", None)
    if weight is None:
        raise InvalidAudit(f"The head of the {role} model has no weight.")
    rows = weight.detach().double().cpu().numpy()
    return rows - rows.mean(0)
