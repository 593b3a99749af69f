"""DER: dark experience replay. The network is held to the answers that it gave when a record was stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import Reservoir, known
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student

PAPER = Paper("Dark Experience for General Continual Learning", "NeurIPS 2020", "2004.07211")


@learner(
    "der",
    keeps={Keeps.RECORDS, Keeps.LOGITS},
    paper=PAPER,
    search={"alpha": Span(0.05, 1.0, log=True)},
)
@dataclass(eq=False)
class DER:
    """Dark experience replay: stored logits are matched, which say more than labels do.

    L = CE(current) + alpha MSE(f(b), z_b), with z_b the logits that record b was given when it was stored: by
    the network in training mode, on the augmented view, before the step. Records are stored without
    augmentation. With a growing head, outputs that were not there yet are left out of the mean.

    Attributes:
        memory: Records kept.
        alpha: Weight of the logits.
        replay_batch: Replayed records per step; as many as new ones by default.
        every_epoch: Whether records are offered again in every epoch, as published, or only in the first.
    """

    memory: int = 200
    alpha: float = 0.3
    replay_batch: int | None = None
    every_epoch: bool = True

    def __post_init__(self) -> None:
        check_replay(self.memory, self.replay_batch, alpha=self.alpha)

    def begin(self, student: Student) -> None:
        """Take a fresh student and an empty buffer."""
        self.student, self.kept = student, Reservoir(self.memory, student.generator("buffer"))

    def observe(self, experience: Experience) -> None:
        """Learn new records, and match the logits of stored ones."""
        student = self.student
        with student.learning(experience):
            for epoch in student.epochs():
                for batch in student.batches(experience.records):
                    logits = student.logits(student.augmented(batch))
                    loss = F.cross_entropy(logits, batch["label"])
                    stored = self.kept.draw(self.replay_batch or len(batch["label"]))
                    held = None
                    if stored:
                        held = self.alpha * logit_distance(
                            student.logits(student.augmented(stored)), stored["logits"]
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


def logit_distance(
    logits: Float[Tensor, "batch classes"], stored: Float[Tensor, "batch stored"]
) -> Float[Tensor, ""]:
    """Mean squared difference to stored logits, over all entries that were there when they were stored."""
    kept = known(stored)
    return F.mse_loss(logits[:, : stored.shape[1]][kept], stored[kept])


def check_replay(memory: int, replay_batch: int | None, **weights: float) -> None:
    """Check the settings that replay methods share.

    Raises:
        InvalidHyperparameter: If sizes are below 1, or a weight is negative or not finite.
    """
    if memory < 1 or (replay_batch is not None and replay_batch < 1):
        raise InvalidHyperparameter(
            f"memory and replay_batch must be at least 1, not {memory} and {replay_batch}."
        )
    for name, weight in weights.items():
        if not (weight >= 0 and torch.isfinite(torch.tensor(weight))):
            raise InvalidHyperparameter(f"{name} must be at least 0 and finite, not {weight}.")
