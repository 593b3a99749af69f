"""Joint: learn from all data met so far. The upper end of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.records import Batch
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.transforms import joined


@learner("joint", keeps={Keeps.ALL_DATA})
@dataclass(eq=False)
class Joint:
    """Train on the union of all experiences so far, from new weights each time: the upper bound.

    It takes as many epochs over the union as the other learners take over one experience, so with T equal
    experiences (T + 1) / 2 times their new records.

    Attributes:
        fresh: Whether each experience starts from new weights; False goes on from the old ones
            (incremental joint training).
    """

    fresh: bool = True

    def begin(self, student: Student) -> None:
        """Take a fresh student."""
        self.student = student

    def observe(self, experience: Experience) -> None:
        """Cross-entropy over all records so far, shuffled together."""
        student, records = self.student, joined([*experience.past, experience.records])
        if self.fresh and experience.index:
            student.model.load_state_dict(
                reinitialised(student.model, student.runtime.with_seed(experience.index)).state_dict()
            )
        with student.learning(experience):
            for _ in student.epochs():
                for batch in student.batches(records):
                    logits = student.logits(student.augmented(batch))
                    student.step(F.cross_entropy(logits, batch["label"]))

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch."""
        return self.student.predict(batch)

    def state_dict(self) -> dict[str, Any]:
        """The student's state; the records come with each experience."""
        return {"student": self.student.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
