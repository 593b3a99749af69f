"""PCR: proxy-based contrastive replay. Records are told from the class vectors of their own batch only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import Fields, Reservoir
from palimpsest.retain.contrast import check_temperature, contrast
from palimpsest.retain.cosine import check_labels, class_vectors, cosine_logits, read_out, unit
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.der import check_replay
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student

Pairs = Literal["proxy", "one", "all"]


@learner(
    "pcr",
    keeps={Keeps.RECORDS},
    paper=Paper(
        "PCR: Proxy-based Contrastive Replay for Online Class-Incremental Continual Learning",
        "CVPR 2023",
        "2304.04408",
    ),
    search={"temperature": Span(0.05, 0.2, log=True), "replay_batch": Choice((10, 20, 40))},
)
@dataclass(eq=False)
class PCR:
    """Contrast of new and replayed records with the class vectors of the labels that occur among them.

    Each step sees new and replayed records twice, as they are and in another view (`training.augmentation`), in
    two forward passes. The class vectors ("proxies") of all these records are the columns, one per record, so
    that frequent classes weigh more; classes that do not occur are not pushed away. Answers are given by
    cosines. A bias of the head takes no part.

    As released, nothing is learned while the buffer is empty: the first batch only fills it.

    Attributes:
        memory: Records kept.
        temperature: Of cosines, in the loss.
        pairs: Columns: "proxy" has class vectors, "one" features too, "all" has class vectors as anchors too.
        replay_batch: Replayed records per step; as many as new ones by default.
        every_epoch: Whether records are offered to the buffer again in every epoch, or only in the first.
    """

    memory: int = 200
    temperature: float = 0.09
    pairs: Pairs = "proxy"
    replay_batch: int | None = None
    every_epoch: bool = True

    def __post_init__(self) -> None:
        check_replay(self.memory, self.replay_batch)
        check_temperature(temperature=self.temperature)
        check_pairs(self.pairs)

    def begin(self, student: Student) -> None:
        """Take a fresh student and an empty buffer."""
        self.student, self.kept = student, Reservoir(self.memory, student.generator("buffer"))

    def observe(self, experience: Experience) -> None:
        """Learn new and replayed records by their class vectors."""
        student = self.student
        with student.learning(experience):
            for epoch in student.epochs():
                for batch in student.batches(experience.records):
                    replayed = self.kept.draw(self.replay_batch or len(batch["label"]))
                    new = two_views(student, batch)
                    if replayed:
                        old = two_views(student, replayed)
                        labels = torch.cat([replayed["label"]] * 2 + [batch["label"]] * 2)
                        features, vectors = torch.cat([old, new]), class_vectors(student)
                        student.step(proxy_contrast(features, vectors, labels, self.temperature, self.pairs))
                    if self.every_epoch or epoch == 0:
                        self.kept.add(input=batch["input"], label=batch["label"])

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The class of largest cosine."""
        return read_out(self.student, batch, cosine_logits)

    def state_dict(self) -> dict[str, Any]:
        """Student and buffer."""
        return {"student": self.student.state_dict(), "buffer": self.kept.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.kept.load_state_dict(state["buffer"])


def two_views(student: Student, batch: Batch | Fields) -> Float[Tensor, "two_views dim"]:
    """Features of the records as they are, then of another view of each, in one pass."""
    given = {"input": batch["input"], "label": batch["label"]}
    both = torch.cat([given["input"], student.augmented(given)["input"]])
    return student.features({"input": both, "label": torch.cat([given["label"]] * 2)})


def proxy_contrast(
    features: Float[Tensor, "records dim"],
    vectors: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " records"],
    temperature: float,
    pairs: Pairs = "proxy",
) -> Float[Tensor, ""]:
    """Contrast of records with the class vectors of all records' labels, with repeats (PCR, eq. 5).

    Args:
        features: Of any length.
        vectors: Of all classes; those whose label does not occur get no gradient.
        labels: Of the records.
        temperature: Of the cosines.
        pairs: "proxy": columns are class vectors, nothing is left out. "one": features are columns too; the
            anchor's own is left out. "all": class vectors are anchors too; their own column is left out.
    """
    check_labels(labels, len(vectors))
    records, proxies = unit(features), unit(vectors[labels])
    if pairs == "proxy":
        return contrast(records @ proxies.T / temperature, labels[:, None] == labels)
    columns = torch.cat([records, proxies])
    anchors = columns if pairs == "all" else records
    others = torch.ones(len(anchors), len(columns), dtype=torch.bool, device=labels.device).fill_diagonal_(
        False
    )
    same = torch.cat([labels, labels])[: len(anchors), None] == torch.cat([labels, labels])
    return contrast(anchors @ columns.T / temperature, same & others, others)


def check_pairs(pairs: str) -> None:
    """Check the name of the columns.

    Raises:
        InvalidHyperparameter: If there is no such name.
    """
    if pairs not in ("proxy", "one", "all"):
        raise InvalidHyperparameter(f"pairs must be 'proxy', 'one' or 'all', not {pairs!r}.")
