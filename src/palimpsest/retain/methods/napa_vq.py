"""NAPA-VQ: coding vectors that know their neighbours, and mixtures of neighbouring prototypes for old classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidStream, ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.coding_vectors import (
    distance_cross_entropy,
    distances,
    mixed,
    neighbourhood_loss,
    updated_edges,
)
from palimpsest.retain.contrast import check_temperature
from palimpsest.retain.cosine import class_vectors
from palimpsest.retain.heads import masked
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.prototypes import Prototypes
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.teacher import snapshot


@learner(
    "napa-vq",
    scenarios=("class",),
    keeps={Keeps.MODEL, Keeps.PROTOTYPES, Keeps.BOUNDARIES},
    paper=Paper(
        "NAPA-VQ: Neighborhood Aware Prototype Augmentation with Vector Quantization for Continual Learning",
        "ICCV 2023",
        "2308.09297",
    ),
    search={
        "neighbours": Choice((3, 5, 15)),
        "temperature": Span(0.1, 1.0, log=True),
        "vector_lr": Span(0.1, 5.0, log=True),
        "distillation": Span(0.1, 10.0, log=True),
        "mixtures": Span(0.1, 10.0, log=True),
    },
)
@dataclass(eq=False)
class NAPAVQ:
    """One coding vector per class and quarter turn, learned with the encoder; edges tell which are neighbours.

    L = CE(-|x - C| / T) + L_na(real) and, from the second experience on, + L_na(mixtures) + mixtures * CE of mixtures
    + distillation * |F - F_old|, the Frobenius norm of the whole batch. L_na draws a feature nearer to its own vector
    than to the neighbours of that (`neighbourhood_loss`); every batch, of mixtures too, first updates the edges and
    makes them symmetric after the loss. A mixture is gamma P_r + (1 - gamma) P_n of an old class r and one of its
    neighbours n, gamma uniform in [1/2, 1], with label r.

    Vectors take plain SGD steps of their own learning rate; those of old classes stay. Prototypes are mean features
    by label: those of new classes come from the old encoder before an experience, so that neighbours have one, and
    from the new one after it; old ones are never refreshed. Answers: the nearest vector of an unturned class, lengths
    of feature and vectors brought to 1. The network's head takes no part. The first experience should be large.

    Learning rates are the published ones relative to `Training` (Adam at 0.001): a tenth in later experiences, and a
    tenth after every `lr_drop` epochs. Deviations from released code: prototypes are means over all records,
    without augmentation (released: full batches only, augmented); edges are saved with the rest (released: lost).

    Attributes:
        neighbours: k nearest vectors of a feature, its winner among them; all if there are fewer.
        decay: Of an edge, for each time that a vector won and the other was not near.
        weight_scale: Of squared distances in the weights of neighbours; one over a typical one.
        temperature: T.
        neighbourhood: Weight of L_na; 1 as published.
        mixtures: Weight of the mixtures' cross-entropy; 0 makes no mixtures.
        distillation: Weight of the distance to the old encoder's features.
        rotations: Whether each image is learned in four turns; needs square images.
        vector_lr: Learning rate of vectors in the first experience.
        later_vector_lr: In later ones; the most sensitive value: new vectors start at random.
        vector_drop: Epochs after which it falls to a tenth, again and again.
        later_lr: Factor of the network's learning rate in later experiences.
        lr_drop: Epochs after which the network's falls to a tenth, again and again.
    """

    neighbours: int = 15
    decay: float = 0.9
    weight_scale: float = 0.001
    temperature: float = 0.1
    neighbourhood: float = 1.0
    mixtures: float = 10.0
    distillation: float = 10.0
    rotations: bool = True
    vector_lr: float = 5.0
    later_vector_lr: float = 0.5
    vector_drop: int = 20
    later_lr: float = 0.1
    lr_drop: int = 45

    def __post_init__(self) -> None:
        check_temperature(
            temperature=self.temperature, weight_scale=self.weight_scale, vector_lr=self.vector_lr,
            later_vector_lr=self.later_vector_lr, later_lr=self.later_lr,
        )  # fmt: skip
        if self.neighbours < 1 or self.vector_drop < 1 or self.lr_drop < 1:
            raise InvalidHyperparameter(
                "neighbours, vector_drop and lr_drop must be at least 1: "
                f"{self.neighbours}, {self.vector_drop}, {self.lr_drop}."
            )
        if not 0 < self.decay < 1:
            raise InvalidHyperparameter(f"decay must lie in (0, 1), not {self.decay}.")
        weights = (self.neighbourhood, self.mixtures, self.distillation)
        if not all(0 <= weight < float("inf") for weight in weights):
            raise InvalidHyperparameter(
                f"neighbourhood, mixtures and distillation must be at least 0 and finite: {weights}."
            )

    def begin(self, student: Student) -> None:
        """Take a fresh student; give it a vector for every label that can come."""
        self.student = student
        labels, dim = student.classes * self._turns, class_vectors(student).shape[1]
        with student.runtime.seeded("learner", "coding vectors"):
            student.attach("coding", nn.ParameterDict({"vectors": nn.Parameter(torch.randn(labels, dim))}))
        self.edges = torch.eye(labels, device=student.runtime.torch_device)
        self.prototypes = Prototypes(labels, dim, self.edges.device)

    @property
    def vectors(self) -> Float[Tensor, "labels dim"]:
        """Coding vectors of all labels, those of classes that were not met too."""
        return cast(Tensor, cast(nn.ParameterDict, self.student.attached["coding"])["vectors"])

    def observe(self, experience: Experience) -> None:
        """Learn new classes, and hold the place of old ones with mixtures of their prototypes."""
        student = self.student
        self._check(experience)
        old = student.seen.nonzero().flatten()
        if len(old):
            self._remember(experience)
        with student.learning(experience):
            teacher = snapshot(student.model) if len(old) else None
            draws = student.runtime.generator("learner", "mixtures", experience.index)
            met = self._labels_of(student.seen.nonzero().flatten())
            for epoch in student.epochs():
                self._schedule(epoch, teacher is None)
                for batch in student.batches(experience.records):
                    views, labels = self._turned(student.augmented(batch))
                    features = student.features({"input": views, "label": labels})
                    loss = self._vector_loss(features, labels, met, 1.0)
                    if teacher is not None:
                        with torch.no_grad():
                            before = student.task.features(teacher, {"input": views, "label": labels})
                        if self.mixtures:
                            mixtures, roots = self._mixed(old, met, len(batch["label"]), draws)
                            loss = loss + self._vector_loss(mixtures, roots, met, self.mixtures)
                        loss = loss + self.distillation * (features - before).norm()
                    student.backward(loss)
                    self._apply(self._labels_of(old), epoch, teacher is None)
        self._remember(experience)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The allowed class whose vector of an unturned image is nearest, all of length 1."""
        allowed = self.student.allowed(batch)
        with evaluating(self.student.model):
            features = F.normalize(self.student.features(batch), dim=1)
        vectors = F.normalize(self.vectors[:: self._turns][: allowed.shape[-1]], dim=1)
        return masked(-distances(features, vectors), allowed).argmax(1)

    def state_dict(self) -> dict[str, Any]:
        """Student with its coding vectors, edges and prototypes."""
        return {
            "student": self.student.state_dict(), "edges": self.edges, "prototypes": self.prototypes.means,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.edges = state["edges"].to(self.edges)
        self.prototypes.means = state["prototypes"].to(self.edges)

    @property
    def _turns(self) -> int:
        return 4 if self.rotations else 1

    def _check(self, experience: Experience) -> None:
        again = [label for label in experience.classes if self.student.seen[label]]
        if again:
            raise InvalidStream(f"Class {again[0]} returns: NAPA-VQ learns each class in one experience.")
        shape = tuple(experience.records[0]["input"].shape)
        if self.rotations and (len(shape) != 3 or shape[-1] != shape[-2]):
            raise ModelMismatch(
                f"Turning by 90 degrees needs square images [channels, side, side], not {shape}: set rotations=False."
            )

    def _turned(self, batch: Batch) -> tuple[Tensor, Int[Tensor, " views"]]:
        """All turns of every image, and their labels: turns * class + quarter turns."""
        views = [
            torch.rot90(batch["input"], turn, (-2, -1)) if turn else batch["input"]
            for turn in range(self._turns)
        ]
        labels = [self._turns * batch["label"] + turn for turn in range(self._turns)]
        return torch.cat(views), torch.cat(labels)

    def _labels_of(self, classes: Int[Tensor, " classes"]) -> Int[Tensor, " labels"]:
        turns = torch.arange(self._turns, device=classes.device)
        return (self._turns * classes[:, None] + turns).flatten()

    def _vector_loss(
        self,
        features: Float[Tensor, "views dim"],
        labels: Int[Tensor, " views"],
        met: Int[Tensor, " met"],
        weight: float,
    ) -> Float[Tensor, ""]:
        """Weighted CE of distances + L_na, among the labels met; the edges learn from the batch."""
        gaps = distances(features, self.vectors[met])
        own = torch.searchsorted(met, labels)
        edges = updated_edges(self.edges[met[:, None], met], gaps.detach(), self.neighbours, self.decay)
        loss = weight * distance_cross_entropy(gaps, own, self.temperature)
        loss = loss + self.neighbourhood * neighbourhood_loss(gaps, own, edges > 0, self.weight_scale)
        self.edges[met[:, None], met] = (edges + edges.T) / 2
        return loss

    def _mixed(
        self, old: Int[Tensor, " old"], met: Int[Tensor, " met"], count: int, draws: torch.Generator
    ) -> tuple[Float[Tensor, "mixed dim"], Int[Tensor, " mixed"]]:
        """Mixtures of the prototypes of old classes, unturned, with those of their neighbours."""
        roots = self._turns * old[torch.randint(len(old), (count,), generator=draws).to(old.device)]
        near = (self.edges[roots][:, met] > 0).float().cpu()
        others = met[torch.multinomial(near, 1, generator=draws).flatten().to(met.device)]
        gamma = 0.5 + 0.5 * torch.rand(count, 1, generator=draws).to(self.edges)
        return mixed(self.prototypes.of(roots), self.prototypes.of(others), gamma), roots

    def _schedule(self, epoch: int, first: bool) -> None:
        """Learning rate of the network in an epoch."""
        training, optimizer = self.student.training, self.student.optimizer
        for group in optimizer.param_groups if optimizer else ():
            group["lr"] = training.lr * (1.0 if first else self.later_lr) * 0.1 ** (epoch // self.lr_drop)

    def _apply(self, old: Int[Tensor, " old"], epoch: int, first: bool) -> None:
        """A step of the network's optimiser, and a plain one of the vectors of new classes."""
        vectors = self.vectors
        gradient, vectors.grad = vectors.grad, None  # an optimiser leaves alone what has no gradient
        self.student.apply()
        lr = (self.vector_lr if first else self.later_vector_lr) * 0.1 ** (epoch // self.vector_drop)
        if gradient is not None:
            gradient[old] = 0.0
            with torch.no_grad():
                vectors -= lr * gradient

    def _remember(self, experience: Experience) -> None:
        """Prototypes of an experience's labels, by the network as it is."""
        student = self.student

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in student.runtime.batches(experience.records, student.task):
                views, labels = self._turned(batch)
                yield student.features({"input": views, "label": labels}), labels

        with torch.no_grad(), evaluating(student.model):
            self.prototypes.put(parts())
