"""Finetune: learn each experience as if there had been nothing before. The lower end of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.records import Batch
from palimpsest.retain.learner import learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student


@learner("finetune")
@dataclass(eq=False)
class Finetune:
    """Plain training on each experience, with nothing kept of the past."""

    def begin(self, student: Student) -> None:
        """Take a fresh student."""
        self.student = student

    def observe(self, experience: Experience) -> None:
        """Cross-entropy of the current records over all outputs of the head."""
        student = self.student
        with student.learning(experience):
            for _ in student.epochs():
                for batch in student.batches(experience.records):
                    logits = student.logits(student.augmented(batch))
                    student.step(F.cross_entropy(logits, batch["label"]))

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch."""
        return self.student.predict(batch)

    def state_dict(self) -> dict[str, Any]:
        """The student's state."""
        return {"student": self.student.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
