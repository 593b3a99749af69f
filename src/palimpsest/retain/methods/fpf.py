"""FPF: what forgets most is tuned once more. Few modules, few steps, on the buffer, after any learner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from palimpsest.core.records import Batch
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.buffers import Fields, Reservoir
from palimpsest.retain.finetuning import check_finetuning, finetune, kept_values, put_back
from palimpsest.retain.learner import Keeps, Learner, LearnerCard, learner
from palimpsest.retain.methods.der import check_replay
from palimpsest.retain.sensitivity import chosen, first_epoch_change, groups, sensitive
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.wrapping import buffer_of, built_base, check_scenario

PAPER = Paper("Does Continual Learning Equally Forget All Parameters?", "ICML 2023", "2304.04158")


@learner(
    "fpf",
    keeps={Keeps.RECORDS},
    paper=PAPER,
    search={"tuning_lr": Span(0.01, 0.2, log=True), "iterations": Choice((50, 100, 200))},
)
@dataclass(eq=False)
class FPF:
    """Forgetting prioritized finetuning, on top of any learner.

    Once the base learner has finished, the modules that change most between tasks are fine-tuned for K steps on
    its buffer, with cross-entropy over all classes met; everything else is frozen. A learner does not know
    which experience is the last: the network is tuned after each, answers so, and is put back to what the base
    learner left before the next begins. The base learner's run is not touched by it.

    No code was published. Decided here: a new SGD without momentum for each tuning, training's augmentation,
    running statistics follow the buffer by default.

    Attributes:
        base: Name of the base learner.
        settings: Of the base learner.
        modules: What is tuned: names of modules, or "head", "norm", "first", "all"; see
            `sensitivity.chosen`. ("auto",) measures it: the modules whose change in the first epoch of a new
            task, by plain descent on a copy, is above `threshold` times the largest. The head until there was
            a second task.
        threshold: Of "auto".
        probed: Tasks (from the second on) that "auto" measures.
        memory: Records of a reservoir, for base learners without a buffer.
        iterations: K.
        tuning_lr: Learning rate of the tuning.
        tuning_batch: Records per step of the tuning.
        distil: Weight of the squared difference to stored logits.
        statistics: Whether batch-norm statistics follow the buffer.
    """

    base: str = "finetune"
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    modules: Sequence[str] = ("head", "norm")
    threshold: float = 0.4
    probed: int = 2
    memory: int = 200
    iterations: int = 100
    tuning_lr: float = 0.1
    tuning_batch: int = 32
    distil: float = 0.0
    statistics: bool = True

    def __post_init__(self) -> None:
        check_finetuning(self.iterations, self.tuning_lr, self.tuning_batch, self.distil, self.threshold)
        check_replay(self.memory, self.probed)
        self.modules = (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)
        self.inner: Learner
        self.card: LearnerCard
        self.inner, self.card = built_base(self.base, self.settings, cast(Any, type(self)).card)

    def begin(self, student: Student) -> None:
        """Give the student to the base learner."""
        check_scenario(self.inner, student.scenario)
        if self.modules != ("auto",):
            chosen(student.model, self.modules)
        self.inner.begin(student)
        self.student = self.inner.student
        self.own = Reservoir(self.memory, student.generator("fpf buffer"))
        self.changes: list[dict[str, float]] = []
        self._before: dict[str, Tensor] = {}
        self._used = 0

    @property
    def kept(self) -> Any:
        """The base learner's buffer, or the reservoir."""
        buffer = buffer_of(self.inner)
        return self.own if buffer is None else buffer

    def observe(self, experience: Experience) -> None:
        """The base learner's own loop on its own network, then the tuning."""
        student, runtime = self.student, self.student.runtime
        put_back(student.model, self._before)
        self._before = {}
        if self.modules == ("auto",) and student.experiences and len(self.changes) < self.probed:
            self.changes.append(first_epoch_change(student, experience))
        self.inner.observe(experience)
        if self.kept is self.own:
            self._store(experience)
        names = self.tuned()
        self._before = kept_values(student.model, names)
        with runtime.seeded("tuning", experience.index):
            self._used += finetune(
                student, self._rows(), names, iterations=self.iterations, lr=self.tuning_lr,
                batch_size=self.tuning_batch, distil=self.distil, statistics=self.statistics,
                random=runtime.generator("tuning draws", experience.index),
            )  # fmt: skip

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The base learner's answers, from the tuned network."""
        return self.inner.predict(batch)

    def tuned(self) -> list[str]:
        """Names of the parameters that are tuned."""
        return chosen(self.student.model, self._groups())

    @property
    def scores(self) -> dict[str, float]:
        """With "auto": mean change of every module in the first epoch of a new task."""
        of_all = self.changes
        return (
            {name: sum(task[name] for task in of_all) / len(of_all) for name in of_all[0]} if of_all else {}
        )

    @property
    def figures(self) -> dict[str, float]:
        """Share of parameters tuned, records whose gradients that took, and how the head's change compares."""
        sizes = {name: value.numel() for name, value in self.student.model.named_parameters()}
        share = sum(sizes[name] for name in self.tuned()) / sum(sizes.values())
        found = {"tuned share": share, "tuning records": float(self._used)}
        scores = self.scores
        if len(scores) > 1:
            head = next(name for name, parts in groups(self.student.model).items()
                        if parts[0] == chosen(self.student.model, ["head"])[0])  # fmt: skip
            found["head over others"] = scores.pop(head) / max(scores.values())
        return found

    def state_dict(self) -> dict[str, Any]:
        """The base learner's state, the reservoir, and what the tuning replaced."""
        return {
            **self.inner.state_dict(),
            "fpf": {
                "own": self.own.state_dict(), "before": self._before, "changes": self.changes, "used": self._used
            },
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.inner.load_state_dict(state)
        own = state["fpf"]
        self.own.load_state_dict(own["own"])
        device = self.student.runtime.torch_device
        self._before = {name: value.to(device) for name, value in own["before"].items()}
        self.changes, self._used = [dict(task) for task in own["changes"]], int(own["used"])

    def _groups(self) -> Sequence[str]:
        if self.modules != ("auto",):
            return self.modules
        return sensitive(self.scores, self.threshold) if self.changes else ("head",)

    def _rows(self) -> Fields:
        return self.kept.all()

    @torch.no_grad()
    def _store(self, experience: Experience) -> None:
        """Offer the records of an experience to the reservoir, once each, with the base learner's logits."""
        student = self.student
        for batch in student.runtime.batches(experience.records, student.task):
            student.model.eval()
            self.own.add(input=batch["input"], label=batch["label"], logits=student.logits(batch))
