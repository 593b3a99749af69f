"""iCaRL: incremental classifier and representation learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from palimpsest.core.errors import NotTrained
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import Herding
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.der import check_replay
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.teacher import snapshot
from palimpsest.retain.transforms import joined


@learner(
    "icarl",
    scenarios=("class", "task"),
    keeps={Keeps.RECORDS, Keeps.MODEL, Keeps.BOUNDARIES},
    paper=Paper("iCaRL: Incremental Classifier and Representation Learning", "CVPR 2017", "1611.07725"),
)
@dataclass(eq=False)
class ICaRL:
    """Exemplars by herding, distillation by binary cross-entropy, answers by the nearest class mean.

    Trains on new records and exemplars together. The loss is binary cross-entropy over all outputs: one-hot
    targets for new classes, the old network's sigmoids for past ones. At the end of an experience the
    exemplars of each new class are picked so that their mean feature is near the class's, and those of old
    classes are cut. A record belongs to the class whose mean of normalised exemplar features is nearest; as
    published, each mean is averaged with that of the mirrored exemplars where inputs are images.

    Attributes:
        memory: Exemplars in all, at least one per class.
        mirrored: Whether class means take mirrored images too.
    """

    memory: int = 200
    mirrored: bool = True

    def __post_init__(self) -> None:
        check_replay(self.memory, None)

    def begin(self, student: Student) -> None:
        """Take a fresh student without exemplars."""
        self.student, self.kept = student, Herding(self.memory, student.generator("buffer"))
        self._means: tuple[int, Tensor] | None = None

    def observe(self, experience: Experience) -> None:
        """Learn new records and exemplars, then pick exemplars of the new classes."""
        student, past = self.student, self.student.seen.clone()
        with student.learning(experience):
            teacher = snapshot(student.model) if past.any() else None
            records = self._with_exemplars(experience.records)
            for _ in student.epochs():
                for batch in student.batches(records):
                    view = student.augmented(batch)
                    logits = student.logits(view)
                    with torch.no_grad():
                        old = logits.detach() if teacher is None else student.task.logits(teacher, view)
                    student.step(exemplar_loss(logits, batch["label"], old, past[: logits.shape[1]]))
        self._pick(experience)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The allowed class of nearest mean; before the first exemplars, that of largest logit."""
        allowed = self.student.allowed(batch)
        if not len(self.kept):
            return self.student.predict(batch)
        means = self._class_means()
        with evaluating(self.student.model):
            features = F.normalize(self.student.features(batch), dim=1)
        known = torch.isfinite(means[:, 0])
        distance = torch.cdist(features, torch.nan_to_num(means))[:, : allowed.shape[-1]]
        open_to = allowed & known[: allowed.shape[-1]]
        return distance.masked_fill(~open_to, float("inf")).argmin(1)

    def state_dict(self) -> dict[str, Any]:
        """Student and exemplars."""
        return {"student": self.student.state_dict(), "buffer": self.kept.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.kept.load_state_dict(state["buffer"])
        self._means = None

    def _with_exemplars(self, records: Records) -> Records:
        """New records and exemplars in one set."""
        if not len(self.kept):
            return records
        rows = self.kept.all()
        stored = TensorDataset(rows["input"].cpu(), rows["label"].cpu())
        exemplars = Records(stored, ids=[f"exemplar-{number}" for number in range(len(self.kept))])
        return joined([records, exemplars])

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
        self._means = None

    def _class_means(self) -> Float[Tensor, "classes dim"]:
        """Normalised mean of normalised exemplar features per class, NaN for classes without exemplars."""
        if self._means is not None and self._means[0] == self.student.steps:
            return self._means[1]
        rows = self.kept.all()
        if not rows:
            raise NotTrained("There are no exemplars yet: call observe(experience) first.")
        views = [rows["input"]]
        if self.mirrored and rows["input"].dim() == 4:
            views.append(rows["input"].flip(-1))
        means: list[Tensor] = []
        with evaluating(self.student.model):
            for view in views:
                features = F.normalize(self.student.features({"input": view}), dim=1)
                total = features.new_zeros((self.student.classes, features.shape[1]))
                total.index_add_(0, rows["label"], features)
                count = torch.bincount(rows["label"], minlength=self.student.classes)[:, None]
                means.append(total / count)
        found = F.normalize(torch.stack(means).mean(0), dim=1)
        self._means = (self.student.steps, found)
        return found


def exemplar_loss(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    old: Float[Tensor, "batch classes"],
    past: Bool[Tensor, " classes"],
) -> Float[Tensor, ""]:
    """Binary cross-entropy, mean over batch and all outputs: one-hot for new classes, sigmoid(old) for past ones."""
    target = F.one_hot(labels.long(), logits.shape[1]).to(logits)
    return F.binary_cross_entropy_with_logits(logits, torch.where(past, torch.sigmoid(old), target))
