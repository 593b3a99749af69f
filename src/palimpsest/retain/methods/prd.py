"""PRD: prototype-sample relation distillation. Old prototypes stay usable though no old record is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.contrast import check_temperature, supervised_contrast
from palimpsest.retain.cosine import class_vectors, read_out
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.teacher import snapshot

Axis = Literal["class", "sample"]
BASE_TEMPERATURE = 0.07


@learner(
    "prd",
    scenarios=("class", "task"),
    keeps={Keeps.MODEL, Keeps.BOUNDARIES, Keeps.PROTOTYPES},
    paper=Paper(
        "Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning",
        "ICML 2023",
        "2303.14771",
    ),
    search={
        "temperature": Span(0.05, 0.5, log=True),
        "prototypes": Span(1.0, 8.0, log=True),
        "distillation": Span(1.0, 12.0, log=True),
        "axis": Choice(("class", "sample")),
    },
)
@dataclass(eq=False)
class PRD:
    """Supervised contrast for the encoder, a prototype per class, and old prototypes held to their relations.

    L = SupCon(g(h)) + alpha mean(1 - cos(p_y, h)) + beta L_d, on two views of each record (`training.augmentation`).
    h is the representation before the head and g a projection that is not used for answers. Prototypes are the
    head's rows (a bias takes no part). In the second term h has no gradient, and no prototype is pushed away:
    only those of the batch's classes move. L_d holds the old prototypes' similarities to the new records to those
    of the network and the prototypes before the experience, on the same views; encoder and old prototypes get
    its gradient. Paper and released code differ in it:

    - axis="class", as released: for each record a softmax over the classes of each earlier experience, of h . p /
      |p| with h as it is; the sum over experiences of the mean KL from old to new over records.
    - axis="sample", as the paper says: for each old class a softmax over the records of the batch, of cosines; the
      sum over old classes of the KL from old to new.

    Prototypes learn by plain SGD without momentum and weight decay, whatever the network's optimiser. The old
    network is in evaluation mode (released code leaves it in training mode, so that its batch statistics
    move). Released code overwrites the prototypes' learning rate with the network's; that is the default here.

    Attributes:
        temperature: T of the contrast; the loss is multiplied by T / 0.07 as released.
        prototypes: Weight alpha.
        distillation: Weight beta; 0 leaves old prototypes as they are.
        distillation_temperature: Of L_d; 1 as released for "class", 0.1 is safe for "sample".
        axis: See above.
        prototype_lr: Learning rate of prototypes; the network's by default.
        extra_first: Further passes over the first experience; the released commands have 120.
        hidden: Units of the two hidden layers of the projection.
        projected: Its outputs.
    """

    temperature: float = 0.1
    prototypes: float = 2.0
    distillation: float = 4.0
    distillation_temperature: float = 1.0
    axis: Axis = "class"
    prototype_lr: float | None = None
    extra_first: int = 0
    hidden: int = 512
    projected: int = 128

    def __post_init__(self) -> None:
        check_temperature(
            temperature=self.temperature, distillation_temperature=self.distillation_temperature
        )
        if not all(0 <= weight < float("inf") for weight in (self.prototypes, self.distillation)):
            raise InvalidHyperparameter(
                f"prototypes and distillation must be at least 0 and finite: {self.prototypes}, {self.distillation}."
            )
        if self.axis not in ("class", "sample"):
            raise InvalidHyperparameter(f"axis must be 'class' or 'sample', not {self.axis!r}.")
        if self.hidden < 1 or self.projected < 1 or self.extra_first < 0:
            raise InvalidHyperparameter(
                f"hidden and projected must be at least 1, extra_first at least 0: {self}."
            )
        if self.prototype_lr is not None and not 0 < self.prototype_lr < float("inf"):
            raise InvalidHyperparameter(
                f"prototype_lr must be above 0 and finite, or None, not {self.prototype_lr}."
            )

    def begin(self, student: Student) -> None:
        """Take a fresh student, and give it a projection."""
        self.student, self.earlier = student, list[tuple[int, ...]]()
        dim = class_vectors(student).shape[1]
        with student.runtime.seeded("learner", "projection"):
            student.attach("projection", projection(dim, self.hidden, self.projected))

    def observe(self, experience: Experience) -> None:
        """Learn new classes, and keep the relations of old prototypes to their records."""
        student = self.student
        with student.learning(experience):
            teacher = snapshot(student.model) if self.earlier else None
            old_vectors = class_vectors(student).detach().clone()
            for _ in range(self.extra_first if teacher is None else 0):
                self._pass(experience, None, old_vectors)
            for _ in student.epochs():
                self._pass(experience, teacher, old_vectors)
        self.earlier.append(experience.classes)

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The class of largest cosine, with a task id among those of the task."""
        return read_out(self.student, batch, cosines)

    def state_dict(self) -> dict[str, Any]:
        """The student's state, prototypes and projection among it, and the classes of each experience."""
        return {"student": self.student.state_dict(), "earlier": [list(classes) for classes in self.earlier]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.earlier = [tuple(int(label) for label in classes) for classes in state["earlier"]]

    def _pass(
        self, experience: Experience, teacher: nn.Module | None, old_vectors: Float[Tensor, "classes dim"]
    ) -> None:
        """One pass over the records."""
        student = self.student
        for batch in student.batches(experience.records):
            views = torch.cat([student.augmented(batch)["input"] for _ in range(2)])
            labels = torch.cat([batch["label"]] * 2)
            features, vectors = student.features({"input": views, "label": labels}), class_vectors(student)
            projected = F.normalize(student.attached["projection"](features), dim=1)
            loss = supervised_contrast(projected, labels, self.temperature, BASE_TEMPERATURE)
            loss = loss + self.prototypes * prototype_loss(features, vectors, labels)
            if teacher is not None and self.distillation:
                with torch.no_grad():
                    before = student.task.features(teacher, {"input": views, "label": labels})
                loss = loss + self.distillation * relation_distillation(
                    features,
                    vectors,
                    before,
                    old_vectors,
                    self.earlier,
                    self.distillation_temperature,
                    self.axis,
                )
            student.backward(loss)
            self._apply()

    def _apply(self) -> None:
        """A step of the network's optimiser, and a plain one of the prototypes."""
        student = self.student
        vectors = class_vectors(student)
        gradient, vectors.grad = vectors.grad, None  # an optimiser leaves alone what has no gradient
        student.apply()
        if gradient is not None:
            with torch.no_grad():
                vectors -= (self.prototype_lr or student.training.lr) * gradient


def projection(dim: int, hidden: int, outputs: int) -> nn.Module:
    """Three linear layers with rectifiers between them."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def cosines(
    features: Float[Tensor, "records dim"], vectors: Float[Tensor, "classes dim"]
) -> Float[Tensor, "records classes"]:
    """Cosine of every feature with every prototype; 0 for one of length 0."""
    return F.normalize(features, dim=1) @ F.normalize(vectors, dim=1).T


def prototype_loss(
    features: Float[Tensor, "records dim"],
    vectors: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " records"],
) -> Float[Tensor, ""]:
    """Mean of 1 - cos(prototype of its class, feature); features get no gradient."""
    return (1 - F.cosine_similarity(vectors[labels], features.detach(), dim=1)).mean()


def relation_distillation(
    features: Float[Tensor, "records dim"],
    vectors: Float[Tensor, "classes dim"],
    old_features: Float[Tensor, "records dim"],
    old_vectors: Float[Tensor, "old_classes dim"],
    earlier: Sequence[Sequence[int]],
    temperature: float = 1.0,
    axis: Axis = "class",
) -> Float[Tensor, ""]:
    """KL from the old to the new relations of old prototypes to new records (see `PRD`); 0 without old ones.

    Args:
        features: Of the network.
        vectors: Its prototypes.
        old_features: Of the old network on the same views.
        old_vectors: Its prototypes.
        earlier: Classes of each earlier experience.
        temperature: Of both softmaxes.
        axis: Of the softmax.
    """
    if features.shape[1] != vectors.shape[1]:
        raise ModelMismatch(
            f"Features have {features.shape[1]} dimensions, prototypes {vectors.shape[1]}: they must be equal."
        )
    loss = features.new_zeros(())
    for classes in earlier:
        rows = torch.tensor(list(classes), device=features.device)
        if axis == "class":
            now = features @ F.normalize(vectors[rows], dim=1).T
            then = old_features @ F.normalize(old_vectors[rows], dim=1).T
        else:
            now = cosines(vectors[rows], features)
            then = cosines(old_vectors[rows], old_features)
        target = (then / temperature).log_softmax(1).detach()
        divergence = F.kl_div((now / temperature).log_softmax(1), target, log_target=True, reduction="sum")
        loss = loss + (divergence / len(features) if axis == "class" else divergence)
    return loss
