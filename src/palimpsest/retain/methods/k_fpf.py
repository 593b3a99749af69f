"""k-FPF: no replay at every step. The modules that forget most are tuned on the buffer k times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Choice, Span
from palimpsest.retain.buffers import Reservoir
from palimpsest.retain.finetuning import check_finetuning, finetune, kept_values, put_back
from palimpsest.retain.learner import Keeps, learner
from palimpsest.retain.methods.der import check_replay
from palimpsest.retain.methods.fpf import PAPER
from palimpsest.retain.sensitivity import chosen
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student


@learner(
    "k-fpf",
    keeps={Keeps.RECORDS},
    paper=PAPER,
    search={"tuning_lr": Span(0.01, 0.2, log=True), "times": Choice((1, 2, 4))},
)
@dataclass(eq=False)
class KFPF:
    """Plain descent on new records, and at regular intervals K steps of fine-tuning on the buffer.

    New records fill a reservoir; nothing is replayed with them. Every tau steps the chosen modules are tuned as
    in `FPF`, in place, the last time after the last step; the optimiser's state of these modules is dropped then.

    Attributes:
        modules: What is tuned; see `sensitivity.chosen`.
        times: Tunings per experience, evenly spaced, the last after its last step: k = times * experiences.
        every: Steps between tunings instead, whatever the boundaries (tau). After an experience the network
            is then tuned for its answers, and put back before the next.
        memory: Records kept.
        iterations: K.
        tuning_lr: Learning rate of the tuning.
        tuning_batch: Records per step of the tuning.
        distil: Weight of the squared difference to the logits that a record had when it was stored (k-FPF-KD).
        statistics: Whether batch-norm statistics follow the buffer while it is tuned.
        every_epoch: Whether records are offered to the buffer again in every epoch, or only in the first.
    """

    modules: Sequence[str] = ("head", "norm")
    times: int = 2
    every: int | None = None
    memory: int = 200
    iterations: int = 100
    tuning_lr: float = 0.1
    tuning_batch: int = 32
    distil: float = 0.0
    statistics: bool = True
    every_epoch: bool = True

    def __post_init__(self) -> None:
        check_finetuning(self.iterations, self.tuning_lr, self.tuning_batch, self.distil, 1.0)
        check_replay(self.memory, None)
        if self.times < 1 or (self.every is not None and self.every < 1):
            raise InvalidHyperparameter(
                f"times and every must be at least 1, not {self.times}, {self.every}."
            )
        self.modules = (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)

    def begin(self, student: Student) -> None:
        """Take a fresh student and an empty buffer."""
        chosen(student.model, self.modules)
        self.student, self.kept = student, Reservoir(self.memory, student.generator("buffer"))
        self._before: dict[str, Tensor] = {}
        self._used = self._learned = self._tunings = 0

    def observe(self, experience: Experience) -> None:
        """Learn new records alone, tune on the buffer now and then."""
        student = self.student
        put_back(student.model, self._before)
        self._before = {}
        planned, step, done = self._steps(len(experience.records)), 0, 0
        with student.learning(experience):
            for epoch in student.epochs():
                for batch in student.batches(experience.records):
                    logits = student.logits(student.augmented(batch))
                    student.step(F.cross_entropy(logits, batch["label"]))
                    if self.every_epoch or epoch == 0:
                        self.kept.add(input=batch["input"], label=batch["label"], logits=logits)
                    self._learned, step = self._learned + len(batch["label"]), step + 1
                    if self.every is not None and student.steps % self.every == 0:
                        self._tune()
                    elif self.every is None and step * self.times // planned > done < self.times - 1:
                        self._tune()
                        done += 1
            if self.every is not None:
                self._before = kept_values(student.model, chosen(student.model, self.modules))
            self._tune()

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch."""
        return self.student.predict(batch)

    @property
    def figures(self) -> dict[str, float]:
        """Tunings, records whose gradients they took, and those as a share of what ER would have replayed."""
        sizes = {name: value.numel() for name, value in self.student.model.named_parameters()}
        names = chosen(self.student.model, self.modules)
        return {
            "tuned share": sum(sizes[name] for name in names) / sum(sizes.values()),
            "tunings": float(self._tunings),
            "tuning records": float(self._used),
            "tuning over replay": self._used / max(1, self._learned),
        }

    def state_dict(self) -> dict[str, Any]:
        """Student, buffer and counts."""
        return {
            "student": self.student.state_dict(),
            "buffer": self.kept.state_dict(),
            "before": self._before,
            "counts": [self._used, self._learned, self._tunings],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.student.load_state_dict(state["student"])
        self.kept.load_state_dict(state["buffer"])
        device = self.student.runtime.torch_device
        self._before = {name: value.to(device) for name, value in state["before"].items()}
        self._used, self._learned, self._tunings = (int(count) for count in state["counts"])

    def _tune(self) -> None:
        student = self.student
        names = chosen(student.model, self.modules)
        self._used += finetune(
            student, self.kept.all(), names, iterations=self.iterations, lr=self.tuning_lr,
            batch_size=self.tuning_batch, distil=self.distil, statistics=self.statistics,
            random=student.runtime.generator("tuning draws", self._tunings),
        )  # fmt: skip
        self._tunings += 1
        known = dict(student.model.named_parameters())
        for name in names:
            if student.optimizer is not None:
                student.optimizer.state.pop(known[name], None)

    def _steps(self, records: int) -> int:
        """Steps of an experience; a last batch of a single record is left out."""
        size = self.student.training.batch_size
        per_epoch = max(1, -(-records // size) - (records % size == 1 and size > 1))
        return per_epoch * self.student.training.epochs
