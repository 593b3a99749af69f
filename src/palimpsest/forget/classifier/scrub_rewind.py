"""SCRUB+R: SCRUB, rewound to the epoch at which the forget set looks like data never seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import unlearner
from palimpsest.forget.classifier.scrub import PAPER, SCRUB, students
from palimpsest.parts.labels import labels_of
from palimpsest.tasks.classification import Classification


@unlearner(
    "scrub-r",
    needs={Need.MODEL, Need.FORGET_DATA, Need.FORGET_LABELS, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("classification",),
    paper=PAPER,
    search={
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 8, integer=True),
        "msteps": Span(1, 3, integer=True),
    },
)
@dataclass(frozen=True)
class ScrubRewind(SCRUB):
    """SCRUB, rewound to the epoch whose forget error is that of data never seen (SCRUB+R).

    A checkpoint is kept in memory after every epoch. The reference is the error of the final student on
    validation records of the classes that occur in the forget set; the checkpoint whose error on the
    forget set is nearest to it is returned, the latest of several equally near ones (it had more min
    passes). The untouched model is no candidate. Use it where forgotten records must look like unseen
    ones (privacy), not to remove a class.

    The validation records are the `holdout` of the split unless others are given. An audit of membership
    uses the holdout as its control group; the choice of one epoch has seen it, so give records of your
    own where that must not be.

    Attributes:
        validation: Records that no model was trained on, distributed like the training records.
    """

    validation: Records | None = None

    def unlearn(
        self, model: nn.Module, split: ForgetSplit, task: Classification, runtime: Runtime
    ) -> nn.Module:
        """The student after the epoch that is nearest to the reference.

        Raises:
            MissingNeed: If there are no validation records of the forget set's classes.
        """
        validation = self._validation_like_forget(split, task, runtime)
        states: list[dict[str, Tensor]] = []
        errors: list[float] = []
        student = model
        for student in students(self, model, split, task, runtime):
            states.append(
                {name: value.detach().to("cpu", copy=True) for name, value in student.state_dict().items()}
            )
            errors.append(error_rate(student, split.forget, task, runtime))
        reference = error_rate(student, validation, task, runtime)
        student.load_state_dict(states[nearest_epoch(errors, reference)])
        return student

    def _validation_like_forget(self, split: ForgetSplit, task: Classification, runtime: Runtime) -> Records:
        unseen = self.validation if self.validation is not None else split.holdout
        if unseen is None or len(unseen) == 0:
            raise MissingNeed(
                "SCRUB+R compares with records that were never trained on: give ForgetSplit.holdout or "
                "validation=Records(...), or use 'scrub'."
            )
        classes = np.unique(labels_of(split.forget, task, runtime))
        alike = np.isin(labels_of(unseen, task, runtime), classes)
        if not alike.any():
            raise MissingNeed(
                f"SCRUB+R needs validation records of the forget set's classes {classes.tolist()}, but none of "
                f"the {len(unseen)} given has one of them."
            )
        return unseen.select(alike)


@torch.no_grad()
def error_rate(model: nn.Module, records: Records, task: Classification, runtime: Runtime) -> float:
    """Share of records whose most probable class is not their label, in evaluation mode."""
    wrong = 0
    with evaluating(model):
        for batch in runtime.batches(records, task):
            wrong += int((task.logits(model, batch).argmax(1) != batch[task.label]).sum())
    return wrong / len(records)


def nearest_epoch(errors: Sequence[float], reference: float) -> int:
    """Position of the error nearest to the reference, the last of several equally near ones."""
    gaps = np.abs(np.asarray(errors) - reference)
    return int(np.flatnonzero(gaps == gaps.min())[-1])
