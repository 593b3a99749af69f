"""HPCR: holistic proxy-based contrastive replay. PCR with sample pairs, a moving temperature and distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import Fields, Reservoir, known
from palimpsest.retain.contrast import check_temperature
from palimpsest.retain.cosine import class_vectors, cosine_logits, read_out, unit
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.der import check_replay
from palimpsest.retain.methods.pcr import proxy_contrast, two_views
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student


@learner(
    "hpcr",
    keeps={Keeps.RECORDS, Keeps.LOGITS, Keeps.FEATURES, Keeps.BOUNDARIES},
    paper=Paper(
        "HPCR: Holistic Proxy-based Contrastive Replay for Online Continual Learning",
        "TNNLS 2025",
        "2309.15038",
    ),
    search={
        "class_distillation": Span(0.01, 0.5, log=True),
        "sample_distillation": Span(0.1, 1.0),
        "temperature": Span(0.05, 0.2, log=True),
        "replay_batch": Choice((10, 20, 40)),
    },
)
@dataclass(eq=False)
class HPCR:
    """PCR with three components, each of which can be switched off; without all three it is PCR.

    1. Contrast: with large batches features are columns too, so that records are compared with each other
       (`pairs` "one" of PCR). Off: sample_pairs_from=None.
    2. Temperature: the loss is multiplied by a cosine wave between tau_min and tau_max of `period` steps, from
       the start of each experience: its gradient moves as with a temperature between 0.16 and 0.05, the softmax
       stays at `temperature`. Off: tau_min=tau_max=1.
    3. Distillation, from the second experience on, of replayed records alone: cosine logits are held to those at
       the time of storing (class_distillation times a mean square, over the columns of the joint batch's labels,
       with repeats), and the softmax of cosines between the replayed records to that of their stored features
       (sample_distillation times a cross-entropy). Off: both 0.

    Logits and features of the view that was not augmented are stored as they were before the step, in training
    mode; both views of a replayed record are held to the same. With a growing head, outputs that were not there
    at that time are left out of the mean. The paper has a threshold of the batch size for component 1 that is not
    known; the released commands use batches of 10 without it. Released code pairs stored features with the wrong
    images once, when the buffer becomes full; here they stay together.

    Attributes:
        memory: Records kept.
        temperature: Of cosines, in loss and logits.
        sample_pairs_from: New records per step from which features are columns too; None never.
        tau_max: Largest factor of the contrastive loss, at half a period.
        tau_min: Smallest, at the start.
        period: In steps.
        class_distillation: Weight alpha; 0.01 for CIFAR-10 in the paper, else 0.1.
        sample_distillation: Weight beta.
        replay_batch: Replayed records per step; as many as new ones by default.
        every_epoch: Whether records are offered to the buffer again in every epoch, or only in the first.
    """

    memory: int = 200
    temperature: float = 0.09
    sample_pairs_from: int | None = 32
    tau_max: float = 1.8
    tau_min: float = 0.5625
    period: int = 500
    class_distillation: float = 0.1
    sample_distillation: float = 0.5
    replay_batch: int | None = None
    every_epoch: bool = True

    def __post_init__(self) -> None:
        weights = {"class_distillation": self.class_distillation}
        check_replay(self.memory, self.replay_batch, **weights, sample_distillation=self.sample_distillation)
        check_temperature(temperature=self.temperature, tau_min=self.tau_min, tau_max=self.tau_max)
        if self.tau_min > self.tau_max or self.period < 1:
            raise InvalidHyperparameter(
                f"tau_min must not be above tau_max, and period at least 1: {self.tau_min}, {self.tau_max}, "
                f"{self.period}."
            )
        if self.sample_pairs_from is not None and self.sample_pairs_from < 1:
            raise InvalidHyperparameter(
                f"sample_pairs_from must be at least 1, or None, not {self.sample_pairs_from}."
            )

    def begin(self, student: Student) -> None:
        """Take a fresh student and an empty buffer."""
        self.student, self.kept = student, Reservoir(self.memory, student.generator("buffer"))

    def observe(self, experience: Experience) -> None:
        """Learn new and replayed records by their class vectors, and hold replayed ones to what they were."""
        student, step = self.student, 0
        with student.learning(experience):
            for epoch in student.epochs():
                for batch in student.batches(experience.records):
                    replayed = self.kept.draw(self.replay_batch or len(batch["label"]))
                    new, vectors = two_views(student, batch), class_vectors(student)
                    stored = new[: len(batch["label"])].detach()
                    logits = cosine_logits(stored, vectors, self.temperature).detach()
                    if replayed:
                        old = two_views(student, replayed)
                        student.step(self._loss(new, batch, old, replayed, experience.index, step))
                    step += 1
                    if self.every_epoch or epoch == 0:
                        self.kept.add(
                            input=batch["input"], label=batch["label"], logits=logits, features=stored
                        )

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The class of largest cosine."""
        return read_out(self.student, batch, cosine_logits)

    def state_dict(self) -> dict[str, Any]:
        """Student and buffer."""
        return {"student": self.student.state_dict(), "buffer": self.kept.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume.

        Raises:
            ModelMismatch: If the buffer was filled by a method that stores no logits and features.
        """
        rows = state["buffer"]["rows"]
        if rows and not {"logits", "features"} <= set(rows):
            raise ModelMismatch(
                f"The buffer holds {', '.join(sorted(rows))}; HPCR needs logits and features of every record."
            )
        self.student.load_state_dict(state["student"])
        self.kept.load_state_dict(state["buffer"])

    def _loss(
        self,
        new: Float[Tensor, "new dim"],
        batch: Batch,
        old: Float[Tensor, "replayed dim"],
        replayed: Fields,
        experience: int,
        step: int,
    ) -> Float[Tensor, ""]:
        """All three components on two views of new and of replayed records."""
        large = self.sample_pairs_from is not None and len(batch["label"]) >= self.sample_pairs_from
        labels = torch.cat([replayed["label"]] * 2 + [batch["label"]] * 2)
        vectors = class_vectors(self.student)
        loss = wave(step, self.tau_max, self.tau_min, self.period) * proxy_contrast(
            torch.cat([old, new]), vectors, labels, self.temperature, "one" if large else "proxy"
        )
        if experience == 0:
            return loss
        if self.class_distillation:
            logits = cosine_logits(old, vectors, self.temperature)
            stored = torch.cat([replayed["logits"]] * 2)
            loss = loss + self.class_distillation * class_distillation(logits, stored, labels)
        if self.sample_distillation:
            stored = torch.cat([replayed["features"]] * 2)
            loss = loss + self.sample_distillation * sample_distillation(old, stored, self.temperature)
        return loss


def wave(step: int, largest: float, smallest: float, period: int = 500) -> float:
    """(largest - smallest) (1 - cos(2 pi step / period)) / 2 + smallest.

    Example:
        >>> [wave(step, 1.5, 0.5) for step in (0, 250, 500)]
        [0.5, 1.5, 0.5]
    """
    return (largest - smallest) * 0.5 * (1 - math.cos(2 * math.pi * step / period)) + smallest


def class_distillation(
    logits: Float[Tensor, "replayed classes"],
    stored: Float[Tensor, "replayed stored"],
    labels: Int[Tensor, " records"],
) -> Float[Tensor, ""]:
    """Mean square of logits - stored ones, over the columns of all records' labels, with repeats.

    Entries that were not known when a record was stored (NaN, or columns beyond) are left out.
    """
    wide = F.pad(stored, (0, logits.shape[1] - stored.shape[1]), value=float("nan"))[:, labels]
    gap = torch.where(known(wide), logits[:, labels] - wide.nan_to_num(), 0.0)
    return gap.square().sum() / known(wide).sum().clamp_min(1)


def sample_distillation(
    features: Float[Tensor, "replayed dim"], stored: Float[Tensor, "replayed dim"], temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy of the softmax over the other records' cosines, under that of stored features; mean over rows."""
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    now, then = (
        (unit(rows) @ unit(rows).T / temperature)[~own].view(len(rows), -1) for rows in (features, stored)
    )
    return F.cross_entropy(now, then.softmax(1).detach())
