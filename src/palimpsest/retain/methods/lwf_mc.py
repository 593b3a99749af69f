"""LwF-MC: learning without forgetting with one sigmoid per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.records import Batch
from palimpsest.core.unlearner import Paper
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.teacher import check_old, snapshot


@learner(
    "lwf-mc",
    scenarios=("class", "task"),
    keeps={Keeps.MODEL, Keeps.BOUNDARIES},
    paper=Paper("iCaRL: Incremental Classifier and Representation Learning", "CVPR 2017", "1611.07725"),
)
@dataclass(eq=False)
class LwFMC:
    """iCaRL's network without exemplars: binary cross-entropy, past classes held to the old sigmoids.

    L = (1/B) sum over records and classes met of BCE(sigma(z_c), g_c): g_c = [y = c] for classes of the new
    experience, sigma(old z_c) for those of earlier ones, with the old network on the same view. The sum over
    classes matters: a mean would weaken the loss by their number. Answers are the largest logits.
    """

    def begin(self, student: Student) -> None:
        """Take a fresh student."""
        self.student = student

    def observe(self, experience: Experience) -> None:
        """Learn new records and keep old answers."""
        student, past = self.student, self.student.seen.clone()
        with student.learning(experience):
            teacher = snapshot(student.model) if past.any() else None
            for _ in student.epochs():
                for batch in student.batches(experience.records):
                    view = student.augmented(batch)
                    logits = student.logits(view)
                    with torch.no_grad():
                        old = logits.detach() if teacher is None else student.task.logits(teacher, view)
                    width = logits.shape[1]
                    student.step(
                        sigmoid_loss(logits, batch["label"], old, past[:width], student.seen[:width])
                    )

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch."""
        return self.student.predict(batch)

    def state_dict(self) -> dict[str, Any]:
        """The student's state: the old network is the one that an experience starts with."""
        return {"student": self.student.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])


def sigmoid_loss(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    old: Float[Tensor, "batch classes"],
    past: Bool[Tensor, " classes"],
    met: Bool[Tensor, " classes"],
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Binary cross-entropy, summed over the classes met, mean over the batch; targets of past ones sigma(old).

    Terms of past classes count `weight` times.

    Raises:
        ModelMismatch: If the old network has another number of outputs.
    """
    check_old(logits, old)
    one_hot = F.one_hot(labels.long(), logits.shape[1]).to(logits)
    target = torch.where(past, torch.sigmoid(old), one_hot)
    terms = F.binary_cross_entropy_with_logits(logits[:, met], target[:, met], reduction="none")
    if weight != 1.0:
        terms = torch.where(past[met], weight * terms, terms)
    return terms.sum() / len(labels)
