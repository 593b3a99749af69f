"""GEM: gradient episodic memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.records import Batch
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import ClassBalanced
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.der import check_replay
from palimpsest.retain.projection import flat_gradient, project_into_cone, set_gradient, statistics_kept
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student


@learner(
    "gem",
    keeps={Keeps.RECORDS, Keeps.BOUNDARIES},
    paper=Paper("Gradient Episodic Memory for Continual Learning", "NeurIPS 2017", "1706.08840"),
    search={"margin": Span(0.0, 1.0)},
)
@dataclass(eq=False)
class GEM:
    """Steps never raise the loss of any earlier experience's memory, to first order.

    Before each step the gradient is projected into the cone of gradients that agree with that of every earlier
    experience, each over its whole memory. The memory is shared equally, drawn at random at the end of each
    experience. Passes over the memory leave batch-norm statistics alone.

    Attributes:
        memory: Records kept in all.
        margin: gamma, how far into the cone; above 0 favours what was learned.
    """

    memory: int = 200
    margin: float = 0.5

    def __post_init__(self) -> None:
        check_replay(self.memory, None, margin=self.margin)

    def begin(self, student: Student) -> None:
        """Take a fresh student and an empty memory."""
        self.student = student
        self.kept = ClassBalanced(self.memory, student.generator("buffer"), by="task")

    def observe(self, experience: Experience) -> None:
        """Learn new records along gradients that agree with every earlier experience's."""
        student = self.student
        with student.learning(experience):
            for _ in student.epochs():
                for batch in student.batches(experience.records):
                    references = self._references()
                    logits = student.logits(student.augmented(batch))
                    student.backward(F.cross_entropy(logits, batch["label"]))
                    if references is not None:
                        gradient = flat_gradient(student.parameters())
                        projected = project_into_cone(gradient, references, self.margin)
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

    def _references(self) -> Float[Tensor, "tasks parameters"] | None:
        """Gradient of each earlier experience's whole memory, one row each."""
        if not len(self.kept):
            return None
        stored, rows = self.kept.all(), list[Tensor]()
        with statistics_kept(self.student.model):
            for task in stored["task"].unique():
                own = stored["task"] == task
                logits = self.student.logits({"input": stored["input"][own]})
                self.student.backward(F.cross_entropy(logits, stored["label"][own]))
                rows.append(flat_gradient(self.student.parameters()))
        return torch.stack(rows)
