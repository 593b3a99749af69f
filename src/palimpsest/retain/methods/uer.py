"""UER: unbiased experience replay. New records teach angles alone, replayed ones lengths too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.core.errors import ModelMismatch
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import Reservoir
from palimpsest.retain.contrast import check_temperature
from palimpsest.retain.cosine import (
    class_vectors,
    cosine_cross_entropy,
    has_bias,
    product_cross_entropy,
    product_logits,
    read_out,
)
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.der import check_replay
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student, together


@learner(
    "uer",
    keeps={Keeps.RECORDS},
    paper=Paper(
        "UER: A Heuristic Bias Addressing Approach for Online Continual Learning", "ACM MM 2023", "2309.04081"
    ),
    search={"temperature": Span(0.05, 0.2, log=True), "replay_batch": Choice((10, 20, 40))},
)
@dataclass(eq=False)
class UER:
    """Cross-entropy of cosines on new records, of dot products on replayed ones, in one step.

    A logit <h, w_c> is |h| |w_c| cos(h, w_c), and what favours new classes sits in the angle. So new records
    are learned by the angle, with which no length moves, and replayed ones by the whole product: the lengths
    of old classes' vectors, which the buffer mostly holds, grow.

    L = CE(cos(h, W) / T, y) on new records + CE(<h, W>, y) on replayed ones, each a mean, of equal weight. One
    forward pass for both, as in `ER`; records are stored without augmentation. Answers are given by products
    (by cosines the method forgets what replay taught). A bias of the head takes no part in losses or answers.
    The softmax runs over all outputs of the head; there is no released code, and the paper does not say.

    Attributes:
        memory: Records kept.
        temperature: T of the cosines; of the same authors' PCR, as the paper's is not known.
        replay_batch: Replayed records per step; as many as new ones by default.
        every_epoch: Whether records are offered to the buffer again in every epoch, or only in the first.
        strict: Whether a head with a bias is refused.
        swapped: For experiments: new records by products, replayed ones by cosines.
    """

    memory: int = 200
    temperature: float = 0.09
    replay_batch: int | None = None
    every_epoch: bool = True
    strict: bool = False
    swapped: bool = False

    def __post_init__(self) -> None:
        check_replay(self.memory, self.replay_batch)
        check_temperature(temperature=self.temperature)

    def begin(self, student: Student) -> None:
        """Take a fresh student and an empty buffer."""
        if self.strict and has_bias(student):
            raise ModelMismatch(
                "The head has a bias: build it without one, or set strict=False to ignore it."
            )
        self.student, self.kept = student, Reservoir(self.memory, student.generator("buffer"))

    def observe(self, experience: Experience) -> None:
        """Learn new records by their angles and replayed ones by products."""
        student = self.student
        with student.learning(experience):
            for epoch in student.epochs():
                for batch in student.batches(experience.records):
                    new = len(batch["label"])
                    both = together(batch, self.kept.draw(self.replay_batch or new))
                    features = student.features(student.augmented(both))
                    vectors = class_vectors(student)
                    student.step(
                        unbiased_loss(features, vectors, both["label"], new, self.temperature, self.swapped)
                    )
                    if self.every_epoch or epoch == 0:
                        self.kept.add(input=batch["input"], label=batch["label"])

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The class of largest product."""
        return read_out(self.student, batch, product_logits)

    def state_dict(self) -> dict[str, Any]:
        """Student and buffer."""
        return {"student": self.student.state_dict(), "buffer": self.kept.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.kept.load_state_dict(state["buffer"])


def unbiased_loss(
    features: Float[Tensor, "batch dim"],
    vectors: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " batch"],
    new: int,
    temperature: float,
    swapped: bool = False,
) -> Float[Tensor, ""]:
    """CE(cos / T) of the first `new` records plus CE(<h, w>) of the others, where there are any."""
    angle, product = slice(0, new), slice(new, None)
    if swapped:
        angle, product = product, angle
    loss = features.new_zeros(())
    if len(labels[angle]):
        loss = loss + cosine_cross_entropy(features[angle], vectors, labels[angle], temperature)
    if len(labels[product]):
        loss = loss + product_cross_entropy(features[product], vectors, labels[product])
    return loss
