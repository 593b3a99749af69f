"""LwF: learning without forgetting. The old network's answers to new records are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.heads import head_of, masked
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.teacher import check_old, snapshot


@learner(
    "lwf",
    keeps={Keeps.MODEL, Keeps.BOUNDARIES},
    paper=Paper("Learning without Forgetting", "ECCV 2016", "1606.09282"),
    search={"alpha": Span(0.1, 10.0, log=True)},
)
@dataclass(eq=False)
class LwF:
    """The answers of the network before an experience are distilled on its new records.

    L = CE over the classes met + alpha * cross-entropy between the old and the new softmax of the past classes
    at temperature T (without T^2). The old network sees records without augmentation. As published, the head
    is first trained alone on the new records (features frozen), for as many epochs as the whole.

    Attributes:
        alpha: Weight of the distillation.
        temperature: T.
        warm_up: Whether the head is trained alone first. In class-incremental streams that already favours new
            classes; the published protocol has it.
    """

    alpha: float = 1.0
    temperature: float = 2.0
    warm_up: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf") or self.temperature <= 0:
            raise InvalidHyperparameter(f"alpha must be at least 0 and finite, temperature above 0: {self}.")

    def begin(self, student: Student) -> None:
        """Take a fresh student."""
        self.student = student

    def observe(self, experience: Experience) -> None:
        """Warm up the head, then learn new records and keep old answers."""
        student, past = self.student, self.student.seen.clone()
        with student.learning(experience):
            if self.warm_up and past.any():
                self._warm_up(experience)
            teacher = snapshot(student.model) if past.any() else None
            for _ in student.epochs():
                for batch in student.batches(experience.records):
                    logits = student.logits(student.augmented(batch))
                    loss = F.cross_entropy(masked(logits, student.seen[: logits.shape[1]]), batch["label"])
                    held = None
                    if teacher is not None:
                        with torch.no_grad():
                            old = student.task.logits(teacher, batch)
                        held = self.alpha * distillation(
                            logits, old, past[: logits.shape[1]], self.temperature
                        )
                        loss = loss + held
                    student.step(loss, held)

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch."""
        return self.student.predict(batch)

    def state_dict(self) -> dict[str, Any]:
        """The student's state: the old network is the one that an experience starts with."""
        return {"student": self.student.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])

    def _warm_up(self, experience: Experience) -> None:
        """Train the head alone, features as they are (in evaluation mode)."""
        student = self.student
        head = head_of(student.model)
        optimizer = student.training.build_optimizer(list(head.parameters()))
        student.model.eval()
        for _ in range(student.training.epochs):
            for batch in student.batches(experience.records):
                with torch.no_grad():
                    features = student.features(student.augmented(batch))
                logits = head(features)
                loss = F.cross_entropy(masked(logits, student.seen[: logits.shape[1]]), batch["label"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        student.model.train()


def distillation(
    logits: Float[Tensor, "batch classes"],
    old: Float[Tensor, "batch classes"],
    past: Bool[Tensor, " classes"],
    temperature: float = 2.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of the new softmax under the old one, past classes only, mean over the batch, no T^2.

    Raises:
        ModelMismatch: If the old network has another number of outputs.
    """
    check_old(logits, old)
    target = F.softmax(old[:, past] / temperature, 1)
    return F.cross_entropy(logits[:, past] / temperature, target)
