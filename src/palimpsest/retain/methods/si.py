"""SI: synaptic intelligence. How much each weight did for the loss is added up while it moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper
from palimpsest.parts.parameters import trainable
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.teacher import weights_of

Weights = dict[str, Tensor]


@learner(
    "si",
    keeps={Keeps.MODEL, Keeps.IMPORTANCE, Keeps.BOUNDARIES},
    paper=Paper("Continual Learning Through Synaptic Intelligence", "ICML 2017", "1703.04200"),
    search={"c": Span(0.01, 100.0, log=True)},
)
@dataclass(eq=False)
class SI:
    """Weights are held by what they did: the path integral of gradient times movement.

    After each step omega += g * (theta_before - theta_after), with g the gradient of the task's loss alone.
    At the end of an experience Omega += omega / (movement^2 + xi), movement since its beginning. From the second
    experience on the gradient is g + 2 c Omega (theta - theta_start). Every applied gradient is clipped to
    [-clip, clip] value by value, as in the Mammoth library; omega is not clamped and may be negative.

    Attributes:
        c: Strength.
        xi: Keeps the division finite, above 0.
        clip: Largest absolute value of a gradient; None does not clip.
    """

    c: float = 1.0
    xi: float = 1.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.c < float("inf") or self.xi <= 0 or (self.clip is not None and self.clip <= 0):
            raise InvalidHyperparameter(f"c must be at least 0 and finite, xi and clip above 0: {self}.")

    def begin(self, student: Student) -> None:
        """Take a fresh student without importances."""
        self.student = student
        self.importance: Weights = {}

    def observe(self, experience: Experience) -> None:
        """Learn new records near the start, and add up what every weight does."""
        student = self.student
        with student.learning(experience):
            parameters, start = trainable(student.model), weights_of(student.model)
            self.path = path = {name: torch.zeros_like(value) for name, value in start.items()}
            for _ in student.epochs():
                for batch in student.batches(experience.records):
                    loss = F.cross_entropy(student.logits(student.augmented(batch)), batch["label"])
                    student.backward(loss)
                    before, task_gradient = weights_of(student.model), dict[str, Tensor]()
                    for name, parameter in parameters.items():
                        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                        task_gradient[name] = gradient.detach().clone()
                        pull = self._pull(name, parameter.detach(), start[name])
                        parameter.grad = gradient + pull if pull is not None else gradient
                        if self.clip is not None:
                            parameter.grad = parameter.grad.clamp(-self.clip, self.clip)
                    student.apply()
                    for name, parameter in parameters.items():
                        path[name] += task_gradient[name] * (before[name] - parameter.detach())
            for name, parameter in parameters.items():
                gained = path[name] / ((parameter.detach() - start[name]) ** 2 + self.xi)
                if name in self.importance:
                    gained[: len(self.importance[name])] += self.importance[name]
                self.importance[name] = gained

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch."""
        return self.student.predict(batch)

    def state_dict(self) -> dict[str, Any]:
        """Student and importances; the anchor is where the next experience starts."""
        return {"student": self.student.state_dict(), "importance": dict(self.importance)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        place = self.student.runtime.torch_device
        self.importance = {name: value.to(place) for name, value in state["importance"].items()}

    def _pull(self, name: str, now: Tensor, start: Tensor) -> Tensor | None:
        """2 c Omega (theta - theta_start); nothing in the first experience, and for rows that are new."""
        if name not in self.importance:
            return None
        omega = self.importance[name]
        pull = torch.zeros_like(now)
        pull[: len(omega)] = 2 * self.c * omega * (now - start)[: len(omega)]
        return pull
