"""ER: experience replay. Old records from a small buffer are learned again beside the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Choice
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import ClassBalanced, Fields, Reservoir, Ring
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student, together


@learner(
    "er",
    keeps={Keeps.RECORDS},
    paper=Paper("On Tiny Episodic Memories in Continual Learning", "2019", "1902.10486"),
    search={"replay_batch": Choice((16, 32, 64))},
)
@dataclass(eq=False)
class ER:
    """Replay: each step learns from new records and as many old ones from a small buffer.

    One forward pass of new and replayed records together and one mean cross-entropy over all of them and
    over all outputs of the head. Records are stored without augmentation, and get a new view when replayed.
    The buffer holds records of the current experience too.

    Attributes:
        memory: Records kept.
        replay_batch: Replayed records per step; as many as new ones by default.
        buffer: "reservoir", "balanced" (by class) or "ring" (the last of each class).
        fill: "step" offers records after each step; "end" at the end of the experience, once each, so that
            only earlier experiences are replayed ("Continual evaluation for lifelong learning", arXiv 2205.13452).
        every_epoch: Whether records are offered again in every epoch, as in the Mammoth library (records
            come in twice and more, the current experience dominates), or only in the first.
        weight: Weight lambda of the new records: lambda CE(new) + (1 - lambda) CE(replayed); by default they
            count by their number.
        balanced_draws: Whether each draw takes the classes alike ("balanced" buffers only).
    """

    memory: int = 200
    replay_batch: int | None = None
    buffer: Literal["reservoir", "balanced", "ring"] = "reservoir"
    fill: Literal["step", "end"] = "step"
    every_epoch: bool = True
    weight: float | None = None
    balanced_draws: bool = False

    def __post_init__(self) -> None:
        if self.memory < 1 or (self.replay_batch is not None and self.replay_batch < 1):
            raise InvalidHyperparameter(f"memory and replay_batch must be at least 1: {self}.")
        if self.weight is not None and not 0 < self.weight < 1:
            raise InvalidHyperparameter(f"weight must lie in (0, 1), not {self.weight}.")
        if self.buffer not in ("reservoir", "balanced", "ring") or self.fill not in ("step", "end"):
            raise InvalidHyperparameter(f"Unknown buffer or fill: {self.buffer!r}, {self.fill!r}.")
        if self.balanced_draws and self.buffer != "balanced":
            raise InvalidHyperparameter("balanced_draws needs buffer='balanced'.")

    def begin(self, student: Student) -> None:
        """Take a fresh student and an empty buffer."""
        self.student = student
        generator = student.generator("buffer")
        if self.buffer == "ring":
            self.kept = Ring(self.memory, student.classes, generator)
        elif self.buffer == "balanced":
            self.kept = ClassBalanced(self.memory, generator)
        else:
            self.kept = Reservoir(self.memory, generator)

    def observe(self, experience: Experience) -> None:
        """Learn new and replayed records together."""
        student = self.student
        with student.learning(experience):
            for epoch in student.epochs():
                for batch in student.batches(experience.records):
                    new = len(batch["label"])
                    both = together(batch, self._draw(self.replay_batch or new))
                    logits = student.logits(student.augmented(both))
                    loss = replay_loss(logits, both["label"], new, self.weight)
                    student.step(loss, partial(replayed_part, logits, both["label"], new, self.weight))
                    if self.fill == "step" and (self.every_epoch or epoch == 0):
                        self.kept.add(input=batch["input"], label=batch["label"])
            if self.fill == "end":
                for batch in student.batches(experience.records):
                    self.kept.add(input=batch["input"], label=batch["label"])

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch."""
        return self.student.predict(batch)

    def state_dict(self) -> dict[str, Any]:
        """Student and buffer."""
        return {"student": self.student.state_dict(), "buffer": self.kept.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.kept.load_state_dict(state["buffer"])

    def _draw(self, count: int) -> Fields:
        if self.balanced_draws and isinstance(self.kept, ClassBalanced):
            return self.kept.draw_balanced(count)
        return self.kept.draw(count)


def replay_loss(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    new: int,
    weight: float | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of `new` current records followed by replayed ones.

    Args:
        logits: Of both.
        labels: Of both.
        new: How many of them are current.
        weight: lambda CE(new) + (1 - lambda) CE(replayed), each a mean; None is the mean over all.
    """
    if weight is None or new == len(labels):
        return F.cross_entropy(logits, labels)
    current = F.cross_entropy(logits[:new], labels[:new])
    return weight * current + (1 - weight) * F.cross_entropy(logits[new:], labels[new:])


def replayed_part(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    new: int,
    weight: float | None = None,
) -> Float[Tensor, ""] | None:
    """What replayed records add to `replay_loss`; None if there are none."""
    if new == len(labels):
        return None
    share = (len(labels) - new) / len(labels) if weight is None else 1 - weight
    return share * F.cross_entropy(logits[new:], labels[new:])
