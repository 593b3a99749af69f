"""DER++: dark experience replay with labels too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.records import Batch
from palimpsest.core.search_space import Span
from palimpsest.retain.buffers import Reservoir
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.der import PAPER, check_replay, logit_distance
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student


@learner(
    "der++",
    keeps={Keeps.RECORDS, Keeps.LOGITS},
    paper=PAPER,
    search={"alpha": Span(0.05, 1.0, log=True), "beta": Span(0.1, 2.0, log=True)},
)
@dataclass(eq=False)
class DERPP:
    """Dark experience replay with labels: stored logits are matched and stored labels learned.

    L = CE(current) + alpha MSE(f(b), z_b) + beta CE(f(b'), y_b'), with b and b' two independent draws. See
    `DER` for what is stored and when.

    Attributes:
        memory: Records kept.
        alpha: Weight of the logits.
        beta: Weight of the labels.
        replay_batch: Records per draw; as many as new ones by default.
        every_epoch: Whether records are offered again in every epoch, as published, or only in the first.
    """

    memory: int = 200
    alpha: float = 0.1
    beta: float = 0.5
    replay_batch: int | None = None
    every_epoch: bool = True

    def __post_init__(self) -> None:
        check_replay(self.memory, self.replay_batch, alpha=self.alpha, beta=self.beta)

    def begin(self, student: Student) -> None:
        """Take a fresh student and an empty buffer."""
        self.student, self.kept = student, Reservoir(self.memory, student.generator("buffer"))

    def observe(self, experience: Experience) -> None:
        """Learn new records, match the logits of stored ones, learn the labels of others."""
        student = self.student
        with student.learning(experience):
            for epoch in student.epochs():
                for batch in student.batches(experience.records):
                    logits = student.logits(student.augmented(batch))
                    loss = F.cross_entropy(logits, batch["label"])
                    count = self.replay_batch or len(batch["label"])
                    dark, labelled = self.kept.draw(count), self.kept.draw(count)
                    held = None
                    if dark:
                        held = dark_loss(
                            student.logits(student.augmented(dark)),
                            dark["logits"],
                            student.logits(student.augmented(labelled)),
                            labelled["label"],
                            self.alpha,
                            self.beta,
                        )
                        loss = loss + held
                    student.step(loss, held)
                    if self.every_epoch or epoch == 0:
                        self.kept.add(input=batch["input"], label=batch["label"], logits=logits)

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


def dark_loss(
    dark_logits: Float[Tensor, "dark classes"],
    stored: Float[Tensor, "dark stored"],
    logits: Float[Tensor, "labelled classes"],
    labels: Int[Tensor, " labelled"],
    alpha: float,
    beta: float,
) -> Float[Tensor, ""]:
    """Alpha MSE(dark logits, stored logits) + beta CE(logits, labels)."""
    return alpha * logit_distance(dark_logits, stored) + beta * F.cross_entropy(logits, labels)
