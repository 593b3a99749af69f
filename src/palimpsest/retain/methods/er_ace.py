"""ER-ACE: new classes do not push old ones away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.records import Batch
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import Reservoir
from palimpsest.retain.heads import masked
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.der import check_replay
from palimpsest.retain.methods.er import replayed_part
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student, together


@learner(
    "er-ace",
    keeps={Keeps.RECORDS},
    paper=Paper("New Insights on Reducing Abrupt Representation Change in Online Continual Learning", "ICLR 2022",
                "2104.05025"),
)  # fmt: skip
@dataclass(eq=False)
class ERACE:
    """Replay with an asymmetric cross-entropy: new records compete only among the classes of their batch.

    L = 1/2 [CE of the replayed batch over all classes + CE of the current batch over the classes present in
    it]. In the first experience the loss is plain cross-entropy.

    Attributes:
        memory: Records kept, a reservoir.
        replay_batch: Replayed records per step; as many as new ones by default.
        every_epoch: Whether records are offered again in every epoch, or only in the first.
    """

    memory: int = 200
    replay_batch: int | None = None
    every_epoch: bool = True

    def __post_init__(self) -> None:
        check_replay(self.memory, self.replay_batch)

    def begin(self, student: Student) -> None:
        """Take a fresh student and an empty buffer."""
        self.student, self.kept = student, Reservoir(self.memory, student.generator("buffer"))

    def observe(self, experience: Experience) -> None:
        """Learn new records among themselves, and replayed ones among all classes."""
        student = self.student
        with student.learning(experience):
            for epoch in student.epochs():
                for batch in student.batches(experience.records):
                    new = len(batch["label"])
                    replayed = self.kept.draw(self.replay_batch or new) if experience.index else {}
                    both = together(batch, replayed)
                    logits, labels = student.logits(student.augmented(both)), both["label"]
                    held = None
                    if experience.index == 0:
                        loss = F.cross_entropy(logits, labels)
                    else:
                        loss = asymmetric_cross_entropy(
                            logits[:new], labels[:new], logits[new:], labels[new:]
                        )
                        held = partial(replayed_part, logits, labels, new, 0.5)
                    student.step(loss, held)
                    if self.every_epoch or epoch == 0:
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


def asymmetric_cross_entropy(
    new: Float[Tensor, "new classes"],
    new_labels: Int[Tensor, " new"],
    replayed: Float[Tensor, "replayed classes"],
    replayed_labels: Int[Tensor, " replayed"],
) -> Float[Tensor, ""]:
    """Mean of the replayed records' cross-entropy over all classes and the new ones' over their own classes."""
    present = torch.zeros(new.shape[1], dtype=torch.bool, device=new.device)
    present[new_labels.long()] = True
    own = F.cross_entropy(masked(new, present), new_labels)
    return (F.cross_entropy(replayed, replayed_labels) + own) / 2
