"""Relearning: how fast does the forgotten come back from a few records (checklist B1, B2)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from palimpsest.audit.attacks.bare import attack_copy
from palimpsest.audit.attacks.curves import Curve, Draw, Relearned, curve_rows
from palimpsest.audit.attacks.knowledge import (
    CONFIDENCE_BOUND,
    Watched,
    gain,
    known,
    measured,
    not_run,
    plain_right,
)
from palimpsest.audit.attacks.tuning import (
    LEARNING_RATES,
    Budget,
    choose_learning_rate,
    level_head,
    step_batches,
    tune,
)
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome
from palimpsest.core.unlearner import check_range
from palimpsest.tasks.language import Language, plain_questions

SEED_SPREAD = 0.1
"""Deviation of the area between retrainings of different seeds (digits, small CNN: 0.04 to 0.19)."""


BUDGETS = {
    "language": {"few": 1, "companions": 2, "steps": 10, "every": 5, "repetitions": 2, "batch_size": 32}
}


@audit(
    "relearning",
    code="B1",
    cost=Cost.ATTACK,
    tasks=("classification", "regression", "language"),
    budgets=BUDGETS,
)
@dataclass(frozen=True)
class Relearning:
    """Fine-tune every model alike on a few forget records and watch the others come back.

    The attacker holds the weights, a few of the forget records and, so that a model does not simply
    answer everything with the relearned label, some retained records. Original, unlearned model and
    controls get the same records, order, steps and learning rate; the learning rate is the smallest of a
    grid at which the first control (without one, the original) comes to half of the original's accuracy
    within the budget. Forget records that were not relearned are measured. Of facts about different subjects
    a control learns none from the others, at no rate: there the half must be reached on the relearned
    questions themselves.

    What costs an attacker nothing is done first: a wrapper or hooks around a network of the original's
    architecture are left out, and the head's bias of a class that was forgotten as a whole is brought
    into the range of the other classes' (`level_head`). Logits that are masked with -inf in an unknown
    architecture are cut to a finite value in the attack's loss.

    Hu et al., "Unlearning or Obfuscating?" (arXiv 2406.13356) relearn from a share of the forget set
    (`fraction`); Deeb and Roger, "Do Unlearning Methods Remove Information from Language Model Weights?"
    (arXiv 2410.08827), from disjoint folds (`folds`). Records of one class are not independent of each
    other as facts are, so absolute recovery says little and only the comparison with the controls counts.

    Attributes:
        few: Number of forget records to relearn from; of texts with subjects, number of subjects, with all
            of their records, so that no measured fact can be read off the relearned ones.
        fraction: Share of the forget records instead of `few` (in the paper 0.05, 0.1, 0.2, 0.5).
        folds: Relearn each of so many disjoint folds in turn, measured on the others, instead of `few`.
        companions: Retained records for every relearned one.
        steps: Descent steps.
        every: Measure after every so many steps.
        repetitions: Draws of the few records, averaged; with `folds` there are as many as folds.
        optimizer: "adam" or "sgd".
        lr: Learning rate; None chooses it on a control.
        batch_size: Largest batch of a step.
        head: "levelled", or "fresh": the head's rows of classes forgotten as a whole are set to zero in
            every model and learned anew. A method that pushes an output far down relearns slowly for that
            alone; a fresh row shows what its features still hold.
        limit: At most this many of the other forget records are measured.
    """

    few: int = 5
    fraction: float | None = None
    folds: int | None = None
    companions: int = 9
    steps: int = 40
    every: int = 2
    repetitions: int = 3
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float | None = None
    batch_size: int = 64
    head: Literal["levelled", "fresh"] = "levelled"
    limit: int = 500

    def __post_init__(self) -> None:
        _ = self.budget
        for name, low in {
            "few": 1,
            "companions": 0,
            "repetitions": 1,
            "batch_size": 1,
            "limit": 2,
        }.items():
            check_range(name, getattr(self, name), low, float("inf"))
        if self.head not in ("levelled", "fresh"):
            raise InvalidHyperparameter(f"head must be 'levelled' or 'fresh', not {self.head!r}.")
        if self.fraction is not None:
            check_range("fraction", self.fraction, 0, 0.9, open_low=True)
        if self.folds is not None:
            check_range("folds", self.folds, 2, float("inf"))
        if self.lr is not None:
            check_range("lr", self.lr, 0, float("inf"), open_low=True)

    @property
    def budget(self) -> Budget:
        """Steps and optimizer."""
        return Budget(self.steps, self.every, self.optimizer)

    def run(self, evidence: Evidence) -> Outcome:
        """Area under the relearning curve, its end and confidence, the speed, and the curves."""
        count = len(np.unique(groups_of(evidence)))
        relearned = self.relearned(count)
        if relearned > count - 2:
            what = "subjects" if count < len(evidence.records("forget")) else "forget records"
            return not_run("relearning", "area", f"{count} {what}, {relearned} of them to relearn from")
        try:
            result = self._attack(evidence, self.draws(evidence))
        except InvalidAudit as reason:
            return not_run("relearning", "area", str(reason))
        attack = "forget-few" if self.fraction is None and self.folds is None else "forget-fraction"
        rows = [row for role, curves in result.curves.items() for row in curve_rows(attack, role, curves)]
        return Outcome(tuple(self._findings(evidence, result)), {"relearning": tuple(rows)})

    def relearned(self, count: int) -> int:
        """How many of `count` forget records (or subjects) are relearned in one draw."""
        if self.folds is not None:
            return -(-count // self.folds)
        return self.few if self.fraction is None else max(1, round(self.fraction * count))

    def draws(self, evidence: Evidence) -> list[Draw]:
        """The repetitions, the same for every model."""
        forget, random = evidence.records("forget"), evidence.runtime.numpy("relearning")
        group = groups_of(evidence)
        asked = plain_questions(forget) if isinstance(evidence.task, Language) else np.arange(len(forget))
        count = len(np.unique(group))
        if self.folds is None:
            orders = [random.permutation(count) for _ in range(self.repetitions)]
            parts = [np.split(order, [self.relearned(count)]) for order in orders]
        else:
            order = random.permutation(count)
            folds = np.array_split(order, min(self.folds, count))
            parts = [(fold, order[~np.isin(order, fold)]) for fold in folds]
        draws: list[Draw] = []
        for chosen_groups, others in parts:
            few = members(group, chosen_groups)
            rest = members(group, others)
            rest = rest[np.isin(rest, asked)]
            relearned = forget.select(np.sort(few))
            if self.companions and evidence.has("retain"):
                retain = evidence.records("retain")
                chosen = random.permutation(len(retain))[: self.companions * len(few)]
                relearned = relearned.union(retain.select(np.sort(chosen)))
            batches = step_batches(evidence, relearned, self.steps, self.batch_size, random)
            rest = np.sort(rest[: self.limit])
            watched = Watched(forget.select(rest), evidence.task, evidence.runtime)
            own = few[np.isin(few, asked)] if count < len(forget) else few[:0]
            learned = (
                Watched(forget.select(np.sort(own)), evidence.task, evidence.runtime) if len(own) else None
            )
            draws.append(Draw(batches, rest, watched, learned))
        return draws

    def _attack(self, evidence: Evidence, draws: Sequence[Draw]) -> Relearned:
        def curves(role: str, lr: float) -> list[Curve]:
            def run() -> list[Curve]:
                return [self._curve(evidence, role, draw, lr) for draw in draws]

            return evidence.remember((self, lr), run, role)

        known_before = float(plain_right(evidence, ORIGINAL).mean()) if evidence.original else 1.0
        goal = known_before / 2
        reference = next(iter(evidence.control_roles), ORIGINAL if evidence.original else UNLEARNED)

        def enough(rate: float) -> bool:
            if draws[0].learned is not None:
                last = replace(self, every=self.steps)
                return float(last._curve(evidence, reference, draws[0], rate, True).accuracy[-1]) >= goal
            return float(np.mean([curve.accuracy[-1] for curve in curves(reference, rate)])) >= goal

        def choose() -> float:
            return choose_learning_rate(enough, LEARNING_RATES[self.optimizer])

        lr = self.lr or evidence.remember((self, "learning rate"), choose, reference)
        return Relearned(lr, goal, {role: curves(role, lr) for role in evidence.roles}, draws)

    def _curve(self, evidence: Evidence, role: str, draw: Draw, lr: float, own: bool = False) -> Curve:
        watched = draw.learned if own and draw.learned is not None else draw.watched
        model = attack_copy(evidence, role)
        level_head(model, evidence.split.forgotten_labels, evidence.task, self.head == "fresh")
        try:
            optimizer = self.budget.optimizer_of(model, lr)
            return tune(model, optimizer, draw.batches, watched, evidence.task, self.budget)
        except InvalidAudit as reason:
            raise InvalidAudit(f"the {role} model cannot be tuned: {reason}") from reason

    def _findings(self, evidence: Evidence, result: Relearned) -> list[Finding]:
        note = self._note(evidence, result)
        after, last = slice(1, None), slice(-1, None)
        area = known(
            evidence,
            "relearning",
            "area",
            result.per_record("right", after),
            f"mean accuracy over the steps; {note}",
            bears="inside",
            prior=SEED_SPREAD,
        )
        final = known(evidence, "relearning", "final", result.per_record("right", last), note)
        levelled = known(
            evidence,
            "relearning",
            "levelled",
            result.per_record("right", slice(0, 1)),
            "before the first step, without wrapper and with the head's bias in range",
        )
        confidence = known(
            evidence,
            "relearning",
            "area_confidence",
            result.per_record("confidence", after),
            f"mean log odds of the true label, cut to {CONFIDENCE_BOUND:g}; {note}",
        )
        return [area, *gain(evidence, area), final, levelled, confidence, *_ratios(evidence, result)]

    def _note(self, evidence: Evidence, result: Relearned) -> str:
        group = groups_of(evidence)
        few, grouped = self.relearned(len(np.unique(group))), len(np.unique(group)) < len(group)
        spread = np.std([curve.accuracy[1:].mean() for curve in result.curves[UNLEARNED]])
        parts = [
            f"{few} {'subjects' if grouped else 'forget records'}",
            f"{self.steps} steps of {self.optimizer} at {result.lr:g}",
            f"mean of {len(result.draws)} draws, which deviate by {spread:.3f}",
        ]
        reference = next(iter(evidence.control_roles), None)
        facts = result.draws[0].learned is not None
        if reference is not None and not facts and result.accuracy(reference)[-1] < result.goal:
            parts.append(f"{reference} does not come to half of the original's accuracy")
        if self.head == "fresh":
            parts.append("the classes' rows in the head learned anew")
        if not evidence.has("retain"):
            parts.append("no retained records to go with them")
        diverged = [role for role, curves in result.curves.items() if any(curve.diverged for curve in curves)]
        if diverged:
            parts.append(f"the loss diverged for {', '.join(diverged)}")
        return ", ".join(parts)


def groups_of(evidence: Evidence) -> NDArray[np.int64]:
    """Which forget records belong together, as a number each: texts of one subject; else each on its own."""
    forget = evidence.records("forget")
    if isinstance(evidence.task, Language) and forget.has_column("subject"):
        return np.unique(forget.column("subject").astype(str), return_inverse=True)[1]
    return np.arange(len(forget))


def members(group: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the records of the chosen groups, group after group in the order chosen."""
    return np.concatenate([np.flatnonzero(group == one) for one in chosen] or [np.zeros(0, np.int64)])


def _ratios(evidence: Evidence, result: Relearned) -> list[Finding]:
    """Speed against the control, recovered share of the original (B2), and resistance."""
    if not evidence.controls:
        return []
    steps = {role: result.steps_to_goal(role) for role in evidence.roles}
    usual = float(np.mean([steps[role] for role in evidence.control_roles]))
    rise = {role: result.accuracy(role)[-1] - result.accuracy(role)[0] for role in evidence.roles}
    control_rise = float(np.mean([rise[role] for role in evidence.control_roles]))
    final = {role: float(result.accuracy(role)[-1]) for role in evidence.roles}
    recovered = {role: final[role] / (2 * result.goal) if result.goal else 0.0 for role in evidence.roles}
    speed = {role: usual / steps[role] for role in evidence.roles}
    taken = f"{usual:.1f} steps of the controls over {steps[UNLEARNED]:.1f} of the model"
    to_goal = f"{taken} to an accuracy of {result.goal:.2f}"
    share = "accuracy after the last step over the original's before the first"
    findings = [
        measured(evidence, "relearning", "speed", speed, to_goal, "knowledge"),
        measured(evidence, "relearning", "recovered", recovered, share, "knowledge"),
    ]
    if control_rise > 0:
        ratio = {role: min(1.0, control_rise / rise[role]) if rise[role] > 0 else 1.0 for role in rise}
        note = "rise of the controls' accuracy over the model's, at most 1; of a model that knew before it says nothing"
        findings.append(measured(evidence, "relearning", "resistance", ratio, note))
    return findings
