"""EWC: elastic weight consolidation, online or with one anchor per experience."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Span
from palimpsest.core.task import Task
from palimpsest.core.unlearner import Paper
from palimpsest.parts.importance import Importance, squared_gradients
from palimpsest.parts.parameters import trainable
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.teacher import weights_of


@learner(
    "ewc",
    keeps={Keeps.MODEL, Keeps.IMPORTANCE, Keeps.BOUNDARIES},
    paper=Paper("Overcoming catastrophic forgetting in neural networks", "PNAS 2017", "1612.00796"),
    search={"strength": Span(1.0, 1e4, log=True)},
)
@dataclass(eq=False)
class EWC:
    """Weights that mattered are pulled back to where they were.

    L = CE(current) + strength * sum_i F_i (theta_i - theta*_i)^2, F the diagonal Fisher information of what was
    learned: squared gradients of log p(true label) per record, averaged. Without the paper's factor 1/2, as
    in the common libraries. Output rows that a growing head adds later have no old value and are free.

    Attributes:
        strength: lambda.
        online: One anchor, the latest weights, with F <- gamma F + F_new ("Progress & Compress", arXiv
            1805.06370); otherwise one pair of F and theta* per experience.
        gamma: Of the online version, in [0, 1].
        by_probability: Weigh each record's squared gradient by its p(true label), as the Mammoth library does.
    """

    strength: float = 10.0
    online: bool = True
    gamma: float = 1.0
    by_probability: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf") or not 0 <= self.gamma <= 1:
            raise InvalidHyperparameter(f"strength must be at least 0 and finite, gamma in [0, 1]: {self}.")

    def begin(self, student: Student) -> None:
        """Take a fresh student without anchors."""
        self.student = student
        self.anchors: list[tuple[Importance, dict[str, Tensor]]] = []

    def observe(self, experience: Experience) -> None:
        """Learn new records near the anchors, then measure what matters."""
        student = self.student
        with student.learning(experience):
            for _ in student.epochs():
                for batch in student.batches(experience.records):
                    loss = F.cross_entropy(student.logits(student.augmented(batch)), batch["label"])
                    pulls = [self.strength * penalty(student.model, *pair) for pair in self.anchors]
                    student.step(sum(pulls, loss), sum(pulls[1:], pulls[0]) if pulls else None)
        batches = student.runtime.batches(experience.records, student.task)
        fisher = fisher_diagonal(student.model, batches, student.task, self.by_probability)
        anchor = weights_of(student.model)
        if self.online and self.anchors:
            fisher = accumulated(self.anchors[0][0], fisher, self.gamma)
        self.anchors = [(fisher, anchor)] if self.online else [*self.anchors, (fisher, anchor)]

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch."""
        return self.student.predict(batch)

    def state_dict(self) -> dict[str, Any]:
        """Student and anchors."""
        return {"student": self.student.state_dict(), "anchors": [list(pair) for pair in self.anchors]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.anchors = anchors_of(state, self.student)


def anchors_of(state: Mapping[str, Any], student: Student) -> list[tuple[Importance, dict[str, Tensor]]]:
    """The pairs of importances and weights of a saved state, on the student's device."""
    place = student.runtime.torch_device
    return [
        ({name: value.to(place) for name, value in importance.items()},
         {name: value.to(place) for name, value in anchor.items()})
        for importance, anchor in state["anchors"]
    ]  # fmt: skip


def penalty(
    model: nn.Module, importance: Mapping[str, Tensor], anchor: Mapping[str, Tensor]
) -> Float[Tensor, ""]:
    """sum_i F_i (theta_i - theta*_i)^2 over what was there at the anchor, with its graph."""
    terms = [
        (importance[name] * (parameter[: len(anchor[name])] - anchor[name]) ** 2).sum()
        for name, parameter in trainable(model).items()
        if name in anchor
    ]
    return sum(terms[1:], terms[0])


def accumulated(old: Importance, new: Importance, gamma: float) -> Importance:
    """Gamma * old + new; rows that are new have no old importance."""
    total = {name: value.clone() for name, value in new.items()}
    for name, value in old.items():
        total[name][: len(value)] += gamma * value
    return total


def fisher_diagonal(
    model: nn.Module, batches: Iterable[Batch], task: Task, by_probability: bool = False
) -> Importance:
    """Mean over records of the squared gradient of log p(true label), times p(true label) if wanted."""
    judged = _ByProbability(task) if by_probability else task
    return squared_gradients(model, batches, judged, "per-sample")  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _ByProbability:
    """A task whose squared gradients carry the probability of the true label."""

    task: Task

    def loss_per_example(self, model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
        loss = self.task.loss_per_example(model, batch)
        return loss * (-loss / 2).exp().detach()
