"""A-GEM: averaged gradient episodic memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.records import Batch
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import ClassBalanced
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.der import check_replay
from palimpsest.retain.projection import flat_gradient, project_out, set_gradient, statistics_kept
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student


@learner(
    "a-gem",
    keeps={Keeps.RECORDS, Keeps.BOUNDARIES},
    paper=Paper("Efficient Lifelong Learning with A-GEM", "ICLR 2019", "1812.00420"),
)
@dataclass(eq=False)
class AGEM:
    """Steps never raise the mean loss of remembered records, to first order.

    Before each step the gradient g is compared with the gradient r of a batch from memory; if they disagree
    (g.r < 0), the part of g along r is taken out. The memory holds as many records of each earlier
    experience as of any other, drawn at random at its end. Passes over the memory leave batch-norm statistics
    alone. The Mammoth library stores a single batch per experience, whatever its memory; here it is full.

    Attributes:
        memory: Records kept.
        replay_batch: Records per comparison; as many as new ones by default.
    """

    memory: int = 200
    replay_batch: int | None = None

    def __post_init__(self) -> None:
        check_replay(self.memory, self.replay_batch)

    def begin(self, student: Student) -> None:
        """Take a fresh student and an empty memory."""
        self.student = student
        self.kept = ClassBalanced(self.memory, student.generator("buffer"), by="task")

    def observe(self, experience: Experience) -> None:
        """Learn new records along gradients that agree with the memory's."""
        student = self.student
        with student.learning(experience):
            for _ in student.epochs():
                for batch in student.batches(experience.records):
                    stored = self.kept.draw(self.replay_batch or len(batch["label"]))
                    reference = None
                    if stored:
                        with statistics_kept(student.model):
                            logits = student.logits(student.augmented(stored))
                            student.backward(F.cross_entropy(logits, stored["label"]))
                        reference = flat_gradient(student.parameters())
                    student.backward(
                        F.cross_entropy(student.logits(student.augmented(batch)), batch["label"])
                    )
                    if reference is not None:
                        gradient = flat_gradient(student.parameters())
                        projected = project_out(gradient, reference)
                        student.note(gradient, projected - gradient)
                        set_gradient(student.parameters(), projected)
                    student.apply()
            for batch in student.batches(experience.records):
                task = torch.full_like(batch["label"], experience.index)
                self.kept.add(input=batch["input"], label=batch["label"], task=task)

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch."""
        return self.student.predict(batch)

    def state_dict(self) -> dict[str, Any]:
        """Student and memory."""
        return {"student": self.student.state_dict(), "buffer": self.kept.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.kept.load_state_dict(state["buffer"])
