"""BiC: large scale incremental learning. A correction of two numbers takes back the bias to new classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import Herding
from palimpsest.retain.heads import masked
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.der import check_replay
from palimpsest.retain.methods.lwf import distillation
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.teacher import snapshot
from palimpsest.retain.transforms import joined

Weighting = Literal["published", "mammoth"]


@learner(
    "bic",
    scenarios=("class", "task"),
    keeps={Keeps.RECORDS, Keeps.MODEL, Keeps.BOUNDARIES},
    paper=Paper("Large Scale Incremental Learning", "CVPR 2019", "1905.13260"),
    search={"correction_lr": Span(1e-3, 1e-1, log=True), "temperature": Choice((1.0, 2.0))},
)
@dataclass(eq=False)
class BiC:
    """Exemplars and distillation, then alpha z + beta on the logits of the new classes.

    First the network learns new records and exemplars together: (1 - lambda) CE over the classes met + lambda
    times the cross-entropy to the old network's softmax of past classes at temperature T, with lambda the share of
    past classes. Then, on a held-out set with as many records of every class, alpha and beta of the new classes'
    logits are fitted while the network stays as it is. Answers and the next old network are corrected; the network
    that learns next is not, since it is held to corrected answers. A tenth of the exemplars, at least one per class, is
    held out, and as many of each new class. Exemplars are picked by herding, as in iCaRL.

    Attributes:
        memory: Exemplars in all, at least two per class.
        temperature: T.
        held_out: Share of exemplars that the correction is fitted on.
        correction_epochs: Passes over them.
        correction_lr: Of Adam, for alpha and beta.
        weighting: "published", or "mammoth": CE + T^2 KD / (experiences so far + 1), the library's reading.
    """

    memory: int = 200
    temperature: float = 2.0
    held_out: float = 0.1
    correction_epochs: int = 250
    correction_lr: float = 1e-3
    weighting: Weighting = "published"

    def __post_init__(self) -> None:
        check_replay(self.memory, self.correction_epochs)
        if not 0 < self.held_out < 1 or self.temperature <= 0 or not 0 < self.correction_lr < float("inf"):
            raise InvalidHyperparameter(
                f"held_out must lie in (0, 1), temperature and correction_lr above 0: {self}."
            )
        if self.weighting not in ("published", "mammoth"):
            raise InvalidHyperparameter(
                f"weighting must be 'published' or 'mammoth', not {self.weighting!r}."
            )

    def begin(self, student: Student) -> None:
        """Take a fresh student without exemplars and without correction."""
        self.student, self.kept = student, Herding(self.memory, student.generator("buffer"))
        self.newest = torch.zeros_like(student.seen)
        self.alpha, self.beta = 1.0, 0.0

    def observe(self, experience: Experience) -> None:
        """Learn new records and exemplars, fit the correction, pick exemplars of the new classes."""
        student, past = self.student, self.student.seen.clone()
        met = int(past.sum()) + len(experience.classes)
        if self.memory < 2 * met:
            raise InvalidHyperparameter(
                f"memory must be at least {2 * met} for {met} classes: one exemplar to learn, one to correct by."
            )
        records, held = self._divided(experience)
        share = len(past.nonzero()) / met
        with student.learning(experience):
            teacher = snapshot(student.model) if past.any() else None
            before = (self.newest, self.alpha, self.beta)
            self.newest, self.alpha, self.beta = torch.zeros_like(past), 1.0, 0.0
            for _ in student.epochs():
                for batch in student.batches(records):
                    view = student.augmented(batch)
                    logits = student.logits(view)
                    width = logits.shape[1]
                    loss = F.cross_entropy(masked(logits, student.seen[:width]), batch["label"])
                    if teacher is not None:
                        with torch.no_grad():
                            answers = student.task.logits(teacher, view)
                            old = corrected(answers, before[0][: answers.shape[1]], *before[1:])
                        kept = distillation(logits, old, past[: old.shape[1]], self.temperature)
                        loss = self._weighted(loss, kept, share, experience.index)
                    student.step(loss)
        if held is not None:
            self.newest = student.seen & ~past
            self._correct(held)
        self._pick(experience)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The allowed class of largest corrected logit."""
        allowed = self.student.allowed(batch)
        with evaluating(self.student.model):
            logits = self.student.logits(batch)
        found = corrected(logits, self.newest[: logits.shape[1]], self.alpha, self.beta)
        return masked(found, allowed).argmax(1)

    @property
    def figures(self) -> dict[str, float]:
        """The correction of the newest classes."""
        return {"alpha": self.alpha, "beta": self.beta}

    def state_dict(self) -> dict[str, Any]:
        """Student, exemplars and correction."""
        return {
            "student": self.student.state_dict(),
            "buffer": self.kept.state_dict(),
            "newest": self.newest,
            "correction": [self.alpha, self.beta],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.kept.load_state_dict(state["buffer"])
        self.newest = state["newest"].to(self.student.seen.device)
        self.alpha, self.beta = (float(value) for value in state["correction"])

    def _weighted(self, learned: Tensor, kept: Tensor, share: float, index: int) -> Tensor:
        if self.weighting == "mammoth":
            return learned + self.temperature**2 / (index + 1) * kept
        return (1 - share) * learned + share * kept

    def _divided(self, experience: Experience) -> tuple[Records, Records | None]:
        """Records to learn from, and a set with as many of every class to correct by."""
        if not len(self.kept):
            return experience.records, None
        rows = self.kept.all()
        stored = TensorDataset(rows["input"].cpu(), rows["label"].cpu())
        names = [f"exemplar-{number}" for number in range(len(self.kept))]
        old = Records(stored, ids=names, columns={"label": rows["label"].cpu().numpy()})
        smallest = int(np.unique(old.column("label"), return_counts=True)[1].min())
        count = max(1, round(self.held_out * smallest))
        random = self.student.runtime.numpy("held out", experience.index)
        learned, held = list[Records](), list[Records]()
        for part in (experience.records, old):
            out = drawn(part.column("label"), count, random)
            learned.append(part.select(~out))
            held.append(part.select(out))
        return joined(learned), joined(held)

    def _correct(self, held: Records) -> None:
        """Fit alpha and beta by Adam on the held-out records."""
        student = self.student
        parts = list[tuple[Tensor, Tensor]]()
        with torch.no_grad(), evaluating(student.model):
            for batch in student.runtime.batches(held, student.task):
                parts.append((student.logits(batch), batch["label"]))
        logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        self.alpha, self.beta = fitted(
            masked(logits, student.seen[: logits.shape[1]]), labels, self.newest[: logits.shape[1]],
            self.correction_epochs, self.correction_lr, student.training.batch_size,
            student.runtime.generator("correction", student.experiences),
        )  # fmt: skip

    @torch.no_grad()
    def _pick(self, experience: Experience) -> None:
        """Exemplars of classes that have none yet."""
        student, parts = self.student, list[tuple[Tensor, Tensor, Tensor]]()
        with evaluating(student.model):
            for batch in student.runtime.batches(experience.records, student.task):
                parts.append((student.features(batch), batch["input"], batch["label"]))
        features, inputs, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        fresh = ~torch.isin(labels, torch.tensor(self.kept.classes, device=labels.device, dtype=labels.dtype))
        if fresh.any():
            self.kept.add(features[fresh], input=inputs[fresh], label=labels[fresh])


def corrected(
    logits: Float[Tensor, "batch classes"],
    newest: Bool[Tensor, " classes"],
    alpha: float | Tensor,
    beta: float | Tensor,
) -> Float[Tensor, "batch classes"]:
    """Logits with alpha z + beta for the newest classes, z for all others.

    Example:
        >>> corrected(torch.tensor([[1.0, 4.0]]), torch.tensor([False, True]), 0.5, -1.0).tolist()
        [[1.0, 1.0]]
    """
    return torch.where(newest, alpha * logits + beta, logits)


def fitted(
    logits: Float[Tensor, "records classes"],
    labels: Int[Tensor, " records"],
    newest: Bool[Tensor, " classes"],
    epochs: int,
    lr: float,
    batch_size: int,
    random: torch.Generator,
) -> tuple[float, float]:
    """The alpha and beta that lower the cross-entropy of corrected logits, by Adam from 1 and 0.

    Args:
        logits: Minus infinity for classes that were not met.
        labels: Of the records.
        newest: Classes whose logits are corrected.
        epochs: Passes over the records.
        lr: Of Adam.
        batch_size: Of Adam's steps.
        random: Draws the order.
    """
    alpha = nn.Parameter(logits.new_ones(()))
    beta = nn.Parameter(logits.new_zeros(()))
    optimizer = torch.optim.Adam([alpha, beta], lr)
    met = torch.isfinite(logits).all(0)
    logits, newest = logits[:, met], newest[met]
    labels = (met.cumsum(0) - 1)[labels]
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=random).to(labels.device)
        for rows in order.split(batch_size):
            loss = F.cross_entropy(corrected(logits[rows], newest, alpha, beta), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return alpha.item(), beta.item()


def drawn(labels: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Which records are held out: `count` of each class, at random."""
    out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        out[random.permutation(np.flatnonzero(labels == label))[:count]] = True
    return out
