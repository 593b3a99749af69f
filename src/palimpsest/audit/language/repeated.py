"""Parts of a request as requests of their own: the method run again, its models asked, put on the scale K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import nn

from palimpsest.audit.attacks.knowledge import RETAIN_LIMIT, Watched
from palimpsest.audit.attacks.relearning import groups_of, members
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, Evidence
from palimpsest.core.records import Records
from palimpsest.core.scale import scale
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Unlearner
from palimpsest.tasks.language import plain_questions


def method_of(evidence: Evidence) -> Unlearner:
    """What made the unlearned model.

    Raises:
        InvalidAudit: If it is not known, or there is nothing to compare with.
    """
    if evidence.method is None:
        raise InvalidAudit("the method that made the model is not at hand, so that it cannot be repeated")
    if evidence.original is None or not evidence.controls:
        raise InvalidAudit("it needs the original and a retrained model")
    return evidence.method


def subjects_apart(evidence: Evidence, shares: Sequence[float]) -> list[Records]:
    """The first share of the request's subjects, the next, ... each with all of its records.

    Args:
        evidence: Of the whole request.
        shares: Where to cut, rising, each in (0, 1]: (0.5, 1) gives two halves.

    Raises:
        InvalidAudit: If there are too few subjects for that.
    """
    forget, group = evidence.split.forget, groups_of(evidence)
    count = len(np.unique(group))
    order = evidence.runtime.numpy("subjects apart").permutation(count)
    ends = [0, *(round(share * count) for share in shares)]
    if any(end <= start for start, end in pairwise(ends)):
        raise InvalidAudit(f"{count} subjects do not divide at {list(shares)}")
    return [forget.select(np.sort(members(group, order[start:end]))) for start, end in pairwise(ends)]


def request_for(evidence: Evidence, forget: Records, name: str) -> ForgetSplit:
    """A request for some of the forget records; the others are retained."""
    split = evidence.split
    inside = set(forget.ids)
    others = split.forget.select(np.array([one not in inside for one in split.forget.ids], bool))
    kept = split.retain if not len(others) else others if split.retain is None else others.union(split.retain)
    return ForgetSplit(forget, kept, split.test, split.holdout, name)


@dataclass(frozen=True)
class Asked:
    """Questions about parts of a request, put to original and controls once.

    Attributes:
        parts: The questions of every part.
        retain: Retained questions.
        original: Right answers of the original, by part.
        controls: The same of every control.
    """

    parts: Sequence[Watched]
    retain: Watched
    original: Sequence[NDArray[np.bool_]]
    controls: Sequence[Sequence[NDArray[np.bool_]]]

    @classmethod
    def of(cls, evidence: Evidence, parts: Sequence[Records]) -> Asked:
        """Ask original and controls."""
        watched = [
            Watched(part.select(plain_questions(part)), evidence.task, evidence.runtime) for part in parts
        ]
        first = [item.right(evidence.runtime.place(evidence.model(ORIGINAL))) for item in watched]
        controls = [
            [item.right(evidence.runtime.place(evidence.model(role))) for item in watched]
            for role in evidence.control_roles
        ]
        return cls(watched, Watched.part(evidence, "retain", RETAIN_LIMIT), first, controls)

    def k(self, model: nn.Module, part: int) -> float:
        """K of one part after some request; NaN where original and controls do not differ clearly."""
        right = self.parts[part].right(model)
        controls = [float(values[part].mean()) for values in self.controls]
        scaled = scale(float(right.mean()), float(self.original[part].mean()), controls, floor=1 / len(right))
        return scaled.k if scaled.valid else float("nan")

    def utility(self, model: nn.Module) -> float:
        """Share of the retained questions that are answered."""
        return float(self.retain.right(model).mean())
