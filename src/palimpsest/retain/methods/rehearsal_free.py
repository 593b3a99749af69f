"""Rehearsal-free learning: prediction and feature distillation, EWC and L2, alone and together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidStream, NotTrained
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper
from palimpsest.parts.activations import features_with_graph, head_name
from palimpsest.parts.attention import query_key_value
from palimpsest.parts.distillation import feature_distance
from palimpsest.parts.importance import Importance
from palimpsest.parts.reinitialise import is_pretrained
from palimpsest.retain.fisher import Labels, diagonal_fisher, even_importance, importance_of_rows
from palimpsest.retain.heads import masked
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.ewc import accumulated, anchors_of, penalty
from palimpsest.retain.methods.lwf import distillation
from palimpsest.retain.methods.lwf_mc import sigmoid_loss
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.teacher import snapshot, weights_of


@learner(
    "rehearsal-free",
    scenarios=("class", "task"),
    keeps={Keeps.MODEL, Keeps.IMPORTANCE, Keeps.BOUNDARIES},
    paper=Paper("A Closer Look at Rehearsal-Free Continual Learning", "CVPR Workshops 2023", "2203.17269"),
    search={"l2": Span(1e-3, 10.0, log=True), "ewc": Span(1.0, 1e5, log=True)},
)
@dataclass(eq=False)
class RehearsalFree:
    """One classifier loss, and what holds the network to its former self; nothing of old data is kept.

    "bce": (1/B) sum over records and classes met of BCE(sigma(z_c), g_c), a sum over classes, with g_c = [y = c]
    for new classes and for past ones sigma(old z_c), or 0 without `distillation`. "softmax": cross-entropy over
    the classes met, plus `weight` times that of the old softmax of past classes at temperature T, without T^2.
    To either: features * ||h - old h||^2 (sum over features, mean over records), ewc * sum F (theta - theta_old)^2
    and l2 * sum (theta - theta_old)^2, without a factor 1/2.

    The old network is that after the previous experience; L2 towards it works in the first experience too if the
    network was pretrained, EWC only from the second on. Head rows of classes that were not met have no old value,
    and are never penalised. Where the paper leaves the value of a strength open, tune it on a short stream.

    Attributes:
        classifier: "bce" or "softmax".
        distillation: Whether past predictions are distilled.
        weight: Of their terms.
        temperature: T, of the softmax.
        features: Weight of the distillation of features.
        ewc: Strength of EWC.
        l2: Strength of L2.
        online: One anchor and F <- F + F_new, without decay; otherwise F and weights of every experience.
        labels: Of the Fisher information: the network's own answer, as in the group's code, or the true one.
        fisher: "batch-mean" is the group's gradients of batches, "per-sample" the proper way.
        trained: "attention" trains (and penalises) only query, key and value projections and the head.
        among: Classes that the softmax is over in training: all that were "met", or the "new" alone, as prompting
            methods do. Answers are among all classes met either way.
        pretrained: Whether the weights at the beginning are an anchor; None looks whether the network says so.
    """

    classifier: Literal["bce", "softmax"] = "bce"
    distillation: bool = True
    weight: float = 1.0
    temperature: float = 2.0
    features: float = 0.0
    ewc: float = 0.0
    l2: float = 0.0
    online: bool = True
    labels: Labels = "argmax"
    fisher: Literal["batch-mean", "per-sample"] = "batch-mean"
    trained: Literal["all", "attention"] = "all"
    among: Literal["met", "new"] = "met"
    pretrained: bool | None = None

    def __post_init__(self) -> None:
        strengths = {name: getattr(self, name) for name in ("weight", "features", "ewc", "l2")}
        for name, value in strengths.items():
            if not 0 <= value < math.inf:
                raise InvalidHyperparameter(f"{name} must be at least 0 and finite, not {value}.")
        if not 0 < self.temperature < math.inf:
            raise InvalidHyperparameter(f"temperature must be above 0 and finite, not {self.temperature}.")
        known = {
            "classifier": ("bce", "softmax"),
            "labels": ("argmax", "true"),
            "fisher": ("batch-mean", "per-sample"),
            "trained": ("all", "attention"),
            "among": ("met", "new"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise InvalidHyperparameter(
                    f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}."
                )
        if self.among == "new" and (self.classifier == "bce" or self.distillation):
            raise InvalidHyperparameter(
                "Training among new classes alone leaves past outputs out: take classifier='softmax' and "
                "distillation=False."
            )

    def begin(self, student: Student) -> None:
        """Take a fresh student; with "attention" all but the projections and the head is frozen.

        Raises:
            ModelMismatch: If the network has no attention to train.
        """
        self.student, self.head = student, getattr(student.task, "head", None) or head_name(student.model)
        self.anchors: list[tuple[Importance, dict[str, Tensor]]] = []
        if self.trained == "attention":
            free = {*query_key_value(student.model), f"{self.head}.weight", f"{self.head}.bias"}
            for name, parameter in student.model.named_parameters():
                parameter.requires_grad_(name in free)

    def observe(self, experience: Experience) -> None:
        """Learn new records near the old network.

        Raises:
            InvalidStream: If a class comes back.
            NotTrained: If this is not the first experience and there is no old network.
        """
        student, past = self.student, self.student.seen.clone()
        self._check(experience, past)
        with student.learning(experience):
            teacher = snapshot(student.model) if past.any() else None
            attractors = self._attractors(past)
            for _ in student.epochs():
                for batch in student.batches(experience.records):
                    view = student.augmented(batch)
                    logits, features = outputs(student, view, self.head, self.features > 0)
                    old = old_features = None
                    if teacher is not None and (self.distillation or features is not None):
                        with torch.no_grad():
                            old, old_features = outputs(
                                student, view, self.head, features is not None, teacher
                            )
                    loss = self._classification(logits, old, view["label"], past, experience.classes)
                    if features is not None and old_features is not None:
                        loss = loss + self.features * feature_distance(features, old_features, "batchmean")
                    for strength, importance, anchor in attractors:
                        loss = loss + strength * penalty(student.model, importance, anchor)
                    student.step(loss)
        if self.ewc:
            self._consolidate(experience)

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch."""
        return self.student.predict(batch)

    def state_dict(self) -> dict[str, Any]:
        """Student and importances; the old network is the one that an experience starts with."""
        return {"student": self.student.state_dict(), "anchors": [list(pair) for pair in self.anchors]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.anchors = anchors_of(state, self.student)

    def _check(self, experience: Experience, past: Bool[Tensor, " classes"]) -> None:
        back = [label for label in experience.classes if label < len(past) and past[label]]
        if back:
            raise InvalidStream(
                f"Class {back[0]} comes back in experience {experience.index}: rehearsal-free learning holds past "
                "classes to the old network, and needs tasks without common classes."
            )
        if experience.index > 0 and not past.any():
            raise NotTrained(
                f"Experience {experience.index} needs the network of the experience before: observe that first."
            )
        if self.ewc and past.any() and not self.anchors:
            raise NotTrained("EWC needs importances of a finished experience: observe one first.")

    def _attractors(
        self, past: Bool[Tensor, " classes"]
    ) -> list[tuple[float, Importance, dict[str, Tensor]]]:
        """Strength, importances and old weights of every penalty of the experience that begins."""
        found = [(self.ewc, importance, anchor) for importance, anchor in self.anchors]
        first = self.pretrained if self.pretrained is not None else is_pretrained(self.student.model)
        if self.l2 and (past.any() or first):
            anchor = weights_of(self.student.model)
            found.append((self.l2, importance_of_rows(even_importance(anchor), self.head, past), anchor))
        return found

    def _classification(
        self,
        logits: Float[Tensor, "batch classes"],
        old: Float[Tensor, "batch classes"] | None,
        labels: Int[Tensor, " batch"],
        past: Bool[Tensor, " classes"],
        new: tuple[int, ...],
    ) -> Float[Tensor, ""]:
        """The classifier's loss, with the distillation of predictions if there is an old network."""
        met, past = self.student.seen[: logits.shape[1]], past[: logits.shape[1]]
        if self.classifier == "bce":
            held = past if self.distillation else torch.zeros_like(past)
            return sigmoid_loss(
                logits, labels, logits.detach() if old is None else old, held, met, self.weight
            )
        if self.among == "new":
            met = torch.zeros_like(met)
            met[list(new)] = True
        loss = F.cross_entropy(masked(logits, met), labels.long())
        if self.distillation and old is not None:
            loss = loss + self.weight * distillation(logits, old, past, self.temperature)
        return loss

    def _consolidate(self, experience: Experience) -> None:
        """Measure what matters for the experience that was learned."""
        student = self.student
        batches = student.runtime.batches(
            experience.records, student.task, student.training.batch_size,
            shuffle=student.runtime.generator("fisher", experience.index),
        )  # fmt: skip
        met = student.seen[: student.outputs]
        found = diagonal_fisher(student.model, batches, student.task, self.labels, self.fisher, met)
        found = importance_of_rows(found, self.head, met)
        if self.online and self.anchors:
            found = accumulated(self.anchors[0][0], found, 1.0)
        pair = (found, weights_of(student.model))
        self.anchors = [pair] if self.online else [*self.anchors, pair]


def outputs(
    student: Student, batch: Batch, head: str, with_features: bool, model: nn.Module | None = None
) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch dim"] | None]:
    """Logits, and if wanted what the head was given, in one forward pass of the student's network or another."""
    model = model or student.model
    if not with_features:
        return student.task.logits(model, batch), None
    found: list[Tensor] = []
    features = features_with_graph(model, lambda: found.append(student.task.logits(model, batch)), head)
    return found[0], features
