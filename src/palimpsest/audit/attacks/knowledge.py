"""What a changed copy still knows: records measured again and again, findings, gain over the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from palimpsest.audit.regression import targets
from palimpsest.core.evidence import ORIGINAL, UNLEARNED, Evidence, padded
from palimpsest.core.finding import Finding, Judgement, Outcome, Row
from palimpsest.core.intervals import clopper_pearson, mean_interval
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.scale import judged
from palimpsest.core.task import Task
from palimpsest.tasks.language import Language, plain_questions
from palimpsest.tasks.regression import Regression
from palimpsest.tasks.scoring import Scores, token_scores

CONFIDENCE_BOUND = 10.0
"""The log odds of the true label are cut to this, so that one record cannot outweigh all others."""
RETAIN_LIMIT = 1000
"""Utility beside an attack is measured on at most this many retained records."""


class Watched:
    """Records on which models are measured again and again: their batches are made once.

    A language model answers a record rightly if every token of the answer is the likeliest after those
    before it, which is what greedy decoding gives.

    Args:
        records: To measure on.
        task: Whose logits are taken.
        runtime: Device and batch size.
    """

    def __init__(self, records: Records, task: Task, runtime: Runtime):
        self.batches = list(runtime.batches(records, task))
        self.task = task
        self.spoken = isinstance(task, Language)
        if not self.spoken:
            self.labels = torch.cat([truth(task, batch) for batch in self.batches])

    @classmethod
    def part(cls, evidence: Evidence, part: str, limit: int | None = None) -> Watched:
        """A part of the split (of texts, the plain questions), or a fixed sample of `limit` of its records."""
        records = asked(evidence, part)
        if limit is not None and len(records) > limit:
            chosen = evidence.runtime.numpy("attack sample", part).permutation(len(records))[:limit]
            records = records.select(np.sort(chosen))
        return cls(records, evidence.task, evidence.runtime)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Float[Tensor, "records outputs"]:
        """The model's outputs on all records, in evaluation mode; of texts the losses of their tokens."""
        with evaluating(model):
            if self.spoken:
                return padded([scores.losses for scores in self._scores(model)])
            return torch.cat([self.task.logits(model, batch).float() for batch in self.batches])

    def right(self, model: nn.Module) -> NDArray[np.bool_]:
        """Whether the model answers each record correctly, [records]."""
        if self.spoken:
            return self.measure(model)[0]
        return rightly(self.task, self.logits(model), self.labels).cpu().numpy()

    def _scores(self, model: nn.Module) -> Iterator[Scores]:
        for batch in self.batches:
            yield token_scores(self.task.logits(model, batch)[:, :-1], batch["labels"][:, 1:])

    def measure(self, model: nn.Module) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Correctness and confidence in one pass, each [records].

        Confidence is the log odds of the true label, or of a regression the task's margin, or of a text the
        mean log-probability of the answer's tokens, cut alike.
        """
        if self.spoken:
            with torch.no_grad(), evaluating(model):
                scores = list(self._scores(model))
            right = torch.cat([(item.right | ~item.mask).all(1) for item in scores])
            confidence = torch.cat([-item.mean for item in scores]).clamp(-CONFIDENCE_BOUND, 0)
            return right.cpu().numpy(), confidence.nan_to_num(-CONFIDENCE_BOUND).float().cpu().numpy()
        logits = self.logits(model)
        right = rightly(self.task, logits, self.labels)
        numbers = as_regression(self.task)
        if numbers is not None:
            margin = numbers.margin(logits, self.labels).nan_to_num(-CONFIDENCE_BOUND)
            confidence = margin.clamp(-CONFIDENCE_BOUND, CONFIDENCE_BOUND)
        else:
            confidence = log_odds(logits, self.labels)
        return right.cpu().numpy(), confidence.float().cpu().numpy()


def asked(evidence: Evidence, part: str) -> Records:
    """The records of a part that knowledge is measured on: all, or of texts the plain questions."""
    records = evidence.records(part)
    return records.select(plain_questions(records)) if isinstance(evidence.task, Language) else records


def as_regression(task: object) -> Regression | None:
    """The task if its answers are numbers, else None."""
    return task if isinstance(task, Regression) else None


def truth(task: Task, batch: Batch) -> Tensor:
    """True labels of a batch, [batch], or targets of a regression, [batch, targets]."""
    numbers = as_regression(task)
    if numbers is not None:
        return numbers.targets(batch)
    return torch.as_tensor(batch[getattr(task, "label", "label")]).long()


def rightly(task: Task, logits: Tensor, labels: Tensor) -> Bool[Tensor, " records"]:
    """Whether outputs answer rightly: the true class first, or a number within the task's tolerance."""
    numbers = as_regression(task)
    if numbers is not None:
        return numbers.margin(logits, labels) >= 0
    return logits.argmax(1) == labels


def log_odds(logits: Float[Tensor, "records classes"], labels: Tensor) -> Float[Tensor, " records"]:
    """log(p / (1 - p)) of the true label, cut to `CONFIDENCE_BOUND`; 0 for NaN.

    Example:
        >>> log_odds(torch.tensor([[0.0, 0.0], [-torch.inf, 0.0]]), torch.tensor([0, 0])).tolist()
        [0.0, -10.0]
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    rest = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return (
        (own - rest)
        .nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf)
        .clamp(-CONFIDENCE_BOUND, CONFIDENCE_BOUND)
    )


def known(
    evidence: Evidence,
    audit: str,
    name: str,
    values: Mapping[str, NDArray[Any]],
    note: str = "",
    bears: Literal["inside", "outputs", ""] = "",
    prior: float | None = None,
) -> Finding:
    """A finding on knowledge from one value per record and role, on the scale K.

    Args:
        evidence: Whose roles `values` has.
        audit: Name of the audit.
        name: Of the finding.
        values: By role: correctness, or any measurement in which more is more knowledge, [records].
        note: Budget.
        bears: What it tells the verdict.
        prior: Deviation between retrainings as known before (see `core.scale.scale`).
    """
    own = np.asarray(values[UNLEARNED], np.float64)
    n = len(own)
    if np.isin(own, (0.0, 1.0)).all():
        low, high = clopper_pearson(round(own.sum()), n)
    else:
        low, high = mean_interval(own, evidence.runtime.numpy(audit, name))
    mean = {role: float(value.mean()) for role, value in values.items()}
    finding = measured(evidence, audit, name, mean, note, "knowledge")
    finding = replace(finding, low=low, high=high, n=n, bears=bears)
    return judged(finding, _sampling(evidence, values), 1 / n, prior)


def measured(
    evidence: Evidence,
    audit: str,
    name: str,
    values: Mapping[str, float],
    note: str = "",
    more_is: Literal["knowledge", "utility", "neutral"] = "neutral",
) -> Finding:
    """A finding of one number per role, not judged."""
    return Finding(
        audit,
        name,
        float(values[UNLEARNED]),
        more_is=more_is,
        original=float(values[ORIGINAL]) if ORIGINAL in values else None,
        controls=tuple(float(values[role]) for role in evidence.control_roles if role in values),
        note=note,
    )


def _sampling(evidence: Evidence, values: Mapping[str, NDArray[Any]]) -> float:
    """Standard error, over records, of original minus mean control."""
    if ORIGINAL not in values or not evidence.controls:
        return 0.0
    control = np.mean([values[role] for role in evidence.control_roles], 0)
    difference = np.asarray(values[ORIGINAL], np.float64) - control
    return float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else 0.0


@dataclass(frozen=True)
class Answers:
    """What copies of all models answered after the same change.

    Attributes:
        right: Whether the forget records were answered correctly, by role, [records].
        retain: Accuracy on retained records, by role; empty where none are at hand.
    """

    right: dict[str, NDArray[np.bool_]]
    retain: dict[str, float]

    def rows(self, **setting: float | str) -> list[Row]:
        """One row per model for a series."""
        return [
            {
                "model": role,
                **setting,
                "forget_accuracy": float(right.mean()),
                "retain_accuracy": self.retain.get(role),
            }
            for role, right in self.right.items()
        ]


def answers_after(
    evidence: Evidence,
    key: object,
    change: Callable[[nn.Module], None],
    forget: Watched,
    retain: Watched | None,
) -> Answers:
    """Change a copy of every model alike and ask it.

    Args:
        evidence: Models; what was measured on original and controls is remembered for the next model.
        key: Under which it is remembered: the audit's settings and the change.
        change: Works in place on a copy on the runtime's device.
        forget: Forget records.
        retain: Retained records, if any are at hand.
    """

    def ask(role: str) -> tuple[NDArray[np.bool_], float | None]:
        model = evidence.runtime.place(copy.deepcopy(evidence.model(role)))
        change(model)
        return forget.right(model), None if retain is None else float(retain.right(model).mean())

    both = {role: evidence.remember(key, partial(ask, role), role) for role in evidence.roles}
    return Answers(
        {role: right for role, (right, _) in both.items()},
        {role: rate for role, (_, rate) in both.items() if rate is not None},
    )


def plain_right(evidence: Evidence, role: str, part: str = "forget") -> NDArray[np.bool_]:
    """Whether a model answers the records of a part before any attack, from the shared pass, [records]."""
    if isinstance(evidence.task, Language):
        seen = evidence.observe(role, part).tokens
        right = (seen["right"].bool() | ~seen["mask"].bool()).all(1).numpy()
        return right[plain_questions(evidence.records(part))]
    logits = evidence.observe(role, part).logits
    known = targets(evidence, part) if isinstance(evidence.task, Regression) else evidence.labels(part)
    return rightly(evidence.task, logits, torch.as_tensor(known)).numpy()


def gain(evidence: Evidence, attacked: Finding) -> list[Finding]:
    """dK: K after the attack minus K of the accuracy before it; nothing where either is invalid."""
    plain = known(
        evidence, attacked.audit, "plain", {role: plain_right(evidence, role) for role in evidence.roles}
    )
    if attacked.k is None or plain.k is None:
        return []
    name = f"{attacked.name}_gain"
    note = "K after the attack minus K of the plain forget accuracy"
    value = attacked.k - plain.k
    return [Finding(attacked.audit, name, value, n=attacked.n, ideal=0.0, more_is="knowledge", note=note)]


def not_run(audit: str, name: str, why: str) -> Outcome:
    """An audit that could not be run, and why."""
    return Outcome((Finding(audit, name, None, judgement=Judgement.NOT_RUN, note=why),))
