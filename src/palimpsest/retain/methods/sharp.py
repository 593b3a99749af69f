"""SHARP: a sparse network that rewires and matures, with replay of hidden activations of the last classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, InvalidStream
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.activation_memory import ShortTerm, nearest_class
from palimpsest.retain.contrast import check_temperature, supervised_contrast
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.wiring import PLASTIC, Wiring, share_of_activation

WATCHED = 1024
"""Units are selected by their activation on so many of the first records of an experience."""


@learner(
    "sharp",
    scenarios=("class", "task"),
    keeps={Keeps.FEATURES, Keeps.BOUNDARIES},
    paper=Paper("SHARP: Sparsity and Hidden Activation RePlay", "ICDL 2024", "2305.18563"),
    search={"temperature": Span(0.05, 0.3, log=True), "least": Choice((40.0, 60.0, 75.0, 90.0))},
)
@dataclass(eq=False)
class Sharp:
    """Sparsity and hidden activation replay: units mature and freeze, answers come from neighbours.

    The network keeps its number of connections and has no classifier: the head of the given network is not
    used. An experience is learned in phases. Each picks learners among the young units (those that make up most
    of the activation), cuts connections from plastic units to others, grows as many to plastic units, and
    trains with a new optimiser on the supervised contrastive loss of new records and of stored activations of
    the last `recent` experiences' classes, which go through the part of the network behind the early layers.
    Then learners grow older, and frozen units keep their incoming weights for good. A record gets the label of
    most of its k nearest stored activations, each class compared on its own units.

    Until the first experience has ended there is nothing to be near to, and answers are those of the unused
    head. As published, the activations stored are those of the first records of a class, not random ones; what
    is older than `recent` experiences is deleted. Epochs of the training are spread over the phases; published
    are 10 phases of 3 epochs with Adadelta at lr 1.

    Attributes:
        sparsity: Share of absent connections.
        temperature: Of the contrastive loss.
        phases: P, at most as many as epochs.
        horizon: K of the cosine by which learners get fewer; three times the phases by default (published: 30
            with 10). Too long a horizon makes nearly all units mature in the first experiences.
        least: Percent of activation that learners make up at least.
        recent: S, experiences whose activations are replayed; 0 replays none.
        stored: Activations per class to replay.
        replay_batch: Activations per step; as many as new records by default.
        bank: Activations per class to find neighbours in.
        neighbours: k.
        early: Leading layers, whose outputs are replayed; all convolutions, or the first layer, by default.
        redraw: Whether plastic units get fresh weights after an experience.
        freeze: Whether old units freeze; without, with sparsity 0 and least 100, this is plain training of a
            dense network with the same loss and the same answers, for comparison.
    """

    sparsity: float = 0.6
    temperature: float = 0.1
    phases: int = 10
    horizon: int | None = None
    least: float = 60.0
    recent: int = 1
    stored: int = 50
    replay_batch: int | None = None
    bank: int = 25
    neighbours: int = 5
    early: int | None = None
    redraw: bool = True
    freeze: bool = True

    def __post_init__(self) -> None:
        check_temperature(temperature=self.temperature)
        if not 0 <= self.sparsity < 1 or not 0 < self.least <= 100 or self.recent < 0:
            raise InvalidHyperparameter(
                f"sparsity must lie in [0, 1), least in (0, 100], recent must be at least 0: {self}."
            )
        counts = (self.phases, self.stored, self.bank, self.neighbours, self.replay_batch or 1)
        if min(counts) < 1 or self.replay_batch == 0 or (self.horizon is not None and self.horizon < 1):
            raise InvalidHyperparameter(
                f"phases, horizon, stored, replay_batch, bank and neighbours must be at least 1: {self}."
            )
        if self.neighbours > self.bank:
            raise InvalidHyperparameter(
                f"{self.neighbours} neighbours cannot be found in a bank of {self.bank} per class."
            )

    def begin(self, student: Student) -> None:
        """Wire a fresh student."""
        if student.training.weight_decay:
            raise InvalidHyperparameter("weight_decay would change frozen units: take 0.")
        with student.runtime.seeded("sharp"):
            wiring = Wiring(student.model, self.sparsity, self.early, student.generator("wiring"))
        self.student, self.wiring = student, wiring
        self.short = ShortTerm(self.recent)
        self.banks: dict[int, tuple[Tensor, Tensor]] = {}
        self.replayed: list[int] = []

    def observe(self, experience: Experience) -> None:
        """Rewire and learn in phases, then mature and store."""
        student, wiring, index = self.student, self.wiring, experience.index
        self._check(experience)
        self.shape = tuple(experience.records[0]["input"].shape)
        phases = min(self.phases, student.training.epochs)
        starts = {round(phase * student.training.epochs / phases): phase for phase in range(phases)}
        random = student.runtime.generator("replay", index)
        self.replayed = self.short.classes
        with student.learning(experience):
            for epoch in student.epochs():
                if epoch in starts:
                    self._rewire(experience, starts[epoch], phases)
                for batch in student.batches(experience.records):
                    features, labels = self._shown(batch)
                    if self.short.held:
                        count = self.replay_batch or len(batch["label"])
                        stored, old = self.short.draw(count, random)
                        features = torch.cat([features, self._go_on(stored)])
                        labels = torch.cat([labels, old.to(labels)])
                    if len(torch.unique(labels)) == len(labels):
                        continue
                    student.backward(
                        supervised_contrast(F.normalize(features, dim=1), labels, self.temperature)
                    )
                    wiring.hold()
                    student.apply()
        wiring.mature(self.recent if self.freeze else None)
        with student.runtime.seeded("after", index), torch.no_grad(), evaluating(student.model):
            first = self._first(experience)
            stored = {label: self._early(batch)[: self.stored] for label, batch in first.items()}
            if self.redraw:
                wiring.redraw()
            self._remember(first, index, random)
        if self.recent:
            self.short.add(index, stored)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The label of most of the nearest stored activations."""
        allowed = self.student.allowed(batch)
        if not self.banks:
            return self.student.predict(batch)
        with evaluating(self.student.model):
            queries = self.student.features(batch)
        labels = sorted(self.banks)
        banks, masks = zip(*(self.banks[label] for label in labels), strict=True)
        open_to = allowed.expand(len(queries), -1)[:, labels]
        return nearest_class(queries, banks, masks, labels, self.neighbours, open_to)

    @property
    def figures(self) -> dict[str, float]:
        """Density, and shares of units that are plastic and that are frozen."""
        types, frozen = torch.cat(self.wiring.types[1:]), torch.cat(self.wiring.frozen)
        return {
            "density": self.wiring.density,
            "plastic units": (types == PLASTIC).double().mean().item(),
            "frozen units": frozen.double().mean().item(),
            "replayed classes": float(len(self.replayed)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Student, wiring and both memories."""
        return {
            "student": self.student.state_dict(),
            "wiring": self.wiring.state_dict(),
            "short": self.short.state_dict(),
            "banks": [[label, *bank] for label, bank in sorted(self.banks.items())],
            "replayed": self.replayed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        device = self.student.runtime.torch_device
        self.student.load_state_dict(state["student"])
        self.wiring.load_state_dict(state["wiring"])
        self.short.load_state_dict(state["short"], device)
        self.banks = {int(label): (bank.to(device), mask.to(device)) for label, bank, mask in state["banks"]}
        self.replayed = [int(label) for label in state["replayed"]]

    def _check(self, experience: Experience) -> None:
        labels, counts = np.unique(experience.records.column("label"), return_counts=True)
        if counts.min() < 2:
            raise InvalidRecords(
                f"Class {labels[counts.argmin()]} has one record in experience {experience.index}: contrast needs "
                "two or more."
            )
        back = [label for label in experience.classes if label in self.banks]
        if back:
            raise InvalidStream(f"Class {back[0]} was learned before: SHARP's classes come once.")

    def _rewire(self, experience: Experience, phase: int, phases: int) -> None:
        """Select learners, cut and grow connections, take a new optimiser."""
        student, wiring = self.student, self.wiring
        watched = experience.records.select(np.arange(min(WATCHED, len(experience.records))))
        totals = [torch.zeros(len(types), device=types.device) for types in wiring.types[1:]]
        with torch.no_grad(), evaluating(student.model), wiring.listening() as heard:
            for batch in student.runtime.batches(watched, student.task):
                student.logits(batch)
                for total, activation in zip(totals, heard, strict=True):
                    total += activation.flatten(2).sum((0, 2)) if activation.dim() > 2 else activation.sum(0)
        wiring.select(totals, share_of_activation(phase + 1, self.horizon or 3 * phases, self.least))
        wiring.rewire(student.runtime.generator("rewire", experience.index, phase))
        parts = [parameter for layer in wiring.layers for parameter in layer.parameters()]
        student.optimizer = student.training.build_optimizer(parts)

    def _shown(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features and labels of new records, without those that are the only one of their class."""
        labels = batch["label"]
        shared = torch.bincount(labels, minlength=self.student.classes)[labels] > 1
        return self.student.features(self.student.augmented(batch))[shared], labels[shared]

    def _go_on(self, stored: Tensor) -> Tensor:
        """Features of stored activations."""
        blank = torch.zeros((len(stored), *self.shape), device=stored.device)
        with self.wiring.replaying(stored):
            return self.student.features({"input": blank})

    def _early(self, batch: Batch) -> Tensor:
        """Outputs of the early layers."""
        with self.wiring.listening() as heard:
            self.student.logits(batch)
            return heard[self.wiring.early - 1]

    def _first(self, experience: Experience) -> dict[int, Batch]:
        """The first records of every class."""
        labels, most = experience.records.column("label"), max(self.stored, self.bank)
        student, found = self.student, dict[int, Batch]()
        for label in experience.classes:
            chosen = np.flatnonzero(labels == label)[:most]
            found[label] = student.runtime.to_device(experience.records.batch(chosen, student.task.collate))
        return found

    def _remember(self, first: Mapping[int, Batch], index: int, random: torch.Generator) -> None:
        """Banks of the new classes, and new ones of those that are still replayed."""
        types = self.wiring.types[-1]
        for label, batch in first.items():
            self.banks[label] = (self.student.features(batch)[: self.bank], types >= 2)
        for label in self.short.classes:
            features = self._go_on(self.short.of_class(label, self.bank, random))
            self.banks[label] = (features, types >= 3 + self.short.age(label, index))
