"""View-batch: several views of fewer records per batch, so that every record rests longer before it returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.search_space import Choice, Span
from palimpsest.core.unlearner import Paper
from palimpsest.retain.augmentation import AUGMENTATIONS, Augmentation, view
from palimpsest.retain.buffers import Fields
from palimpsest.retain.learner import Learner, LearnerCard, learner
from palimpsest.retain.streams import Experience
from palimpsest.retain.student import Student
from palimpsest.retain.view_schedule import (
    Reduction,
    check_batch,
    cuts,
    divergence,
    epoch_length,
    slots,
)
from palimpsest.retain.wrapping import buffer_of, built_base, check_scenario

Change = Callable[[Tensor, torch.Generator], Tensor]
COUNTS = ("slots", "visits", "gap", "gaps", "lost", "returns", "known", "forgotten")


@learner(
    "view-batch",
    paper=Paper("Do Your Best and Get Enough Rest for Continual Learning", "CVPR 2025", "2503.18371"),
    search={"views": Choice((2, 4)), "alpha": Span(0.1, 1.0, log=True)},
)
@dataclass(eq=False)
class ViewBatch:
    """The schedule of the View-Batch Model around any learner, with its one-to-many divergence.

    A batch of B slots holds B / V records with V views each: the first as the base learner augments it, the
    others with a strong augmentation on top. An epoch keeps its slots and steps, so that a record returns after
    V epochs instead of one. L = L_base + alpha * mean KL(p_first || p_view) over all further views, first views
    detached, classes met only. Records from a buffer come in views too; each record is offered to the buffer
    once, not once per view. Whatever else the base learner does (herding, teacher, answers) stays as it is.

    Beyond the paper: groups of views are known by their place, not by equal labels as in the released code; the
    order of a cycle depends on the seed; no slots are dropped at the end of an epoch unless `rounded_to` says so.
    The strong augmentation is mild by default: AutoAugment destroys small grey images. A callable
    (inputs, generator) -> inputs takes any other. The divergence reaches learners that call `student.logits`; a
    learner that trains on features alone gets the schedule only.

    Attributes:
        base: Name of the base learner.
        settings: Of the base learner.
        views: V; 1 is the base learner, bit for bit.
        alpha: Weight of the divergence.
        strong: Augmentation of further views, on top of the training's: a name, or a callable.
        deviation: Of the Gaussian noise that "noise" adds.
        starts_after: Epochs of each experience without the divergence (the released code takes 5).
        reduction: Of the divergence: "published", or "official_code" (divided by the number of classes met).
        rounded_to: Slots of an epoch are cut to a multiple of this (the released code takes 256); 0 cuts none.
        replayed_views: Whether records from the buffer come in views.
        measure_rest: Whether answers on training records are compared right after a step and before their
            next visit: two more forward passes per step.
    """

    base: str = "er"
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    views: int = 4
    alpha: float = 1.0
    strong: Augmentation | Change = "noise"
    deviation: float = 0.15
    starts_after: int = 0
    reduction: Reduction = "published"
    rounded_to: int = 0
    replayed_views: bool = True
    measure_rest: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.views, bool) or not isinstance(self.views, int) or self.views < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidHyperparameter(f"views must be a whole number of at least 1, not {self.views!r}.")
        if not 0 <= self.alpha < float("inf") or not 0 <= self.deviation < float("inf"):
            raise InvalidHyperparameter(f"alpha and deviation must be at least 0 and finite: {self}.")
        if self.starts_after < 0 or self.rounded_to < 0:
            raise InvalidHyperparameter(f"starts_after and rounded_to must be at least 0: {self}.")
        if not callable(self.strong) and self.strong not in AUGMENTATIONS:
            raise InvalidHyperparameter(
                f"strong must be one of {', '.join(AUGMENTATIONS)}, not {self.strong!r}."
            )
        divergence(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), self.reduction)
        self.inner: Learner
        self.card: LearnerCard
        self.inner, self.card = built_base(self.base, self.settings, cast(Any, type(self)).card)
        if self.views == 1 and self.alpha > 0:
            warnings.warn("With one view there is nothing to compare: the divergence is 0.", stacklevel=3)

    def begin(self, student: Student) -> None:
        """Give the base learner a student that serves views."""
        check_scenario(self.inner, student.scenario)
        if student.training.batch_size % self.views:
            check_batch(student.training.batch_size, self.views, student.training.batch_size)
        if student.training.epochs < self.views:
            warnings.warn(
                f"{student.training.epochs} epochs with {self.views} views reach only "
                f"{student.training.epochs} of {self.views} parts of the records; take 8 epochs per view or more.",
                stacklevel=2,
            )
        self.student = _ViewStudent(student, self)
        self.inner.begin(self.student)
        buffer = buffer_of(self.inner)
        if buffer is not None:
            _serve_views(buffer, self.student)

    def observe(self, experience: Experience) -> None:
        """The base learner's own loop, on batches of views."""
        self.inner.observe(experience)

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """The base learner's answers."""
        return self.inner.predict(batch)

    @property
    def figures(self) -> dict[str, float]:
        """Slots, visits and steps between two of them; what happens to answers on a record meanwhile.

        "lost between visits" is the accuracy right after a step minus that before the next visit (below 0 while
        the network still improves), "forgotten between visits" the share of right answers that became wrong.
        """
        seen = self.student
        found = {"slots": float(seen.slots), "visits": float(seen.visits), "views": float(self.views)}
        if seen.gaps:
            found["steps between visits"] = seen.gap / seen.gaps
        if seen.returns:
            found["lost between visits"] = seen.lost / seen.returns
            found["forgotten between visits"] = seen.forgotten / max(1, seen.known)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The base learner's state and the counts."""
        return {**self.inner.state_dict(), "views": self.student.counts()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.inner.load_state_dict(state)
        self.student.__dict__.update(zip(COUNTS, state["views"], strict=True))


class _ViewStudent(Student):
    """A student whose batches hold V views of each record while it is in an epoch, and the usual ones else."""

    def __init__(self, student: Student, setting: ViewBatch):
        self.__dict__.update(student.__dict__)
        self.setting = setting
        self.slots, self.visits, self.gap, self.gaps, self.lost, self.returns = 0, 0, 0, 0, 0, 0
        self.known, self.forgotten = 0, 0
        self.view: Tensor | None = None
        """Views of the batch that was served last; None outside epochs."""
        self._epoch: int | None = None
        self._cycle = torch.empty(0, dtype=torch.long)
        self._shown: list[tuple[Tensor, Tensor]] = []

    def counts(self) -> list[int]:
        return [getattr(self, name) for name in COUNTS]

    def epochs(self) -> Iterator[int]:
        """Numbers of the passes over the records: V epochs are one."""
        self._cycle, self._last, self._right = torch.empty(0, dtype=torch.long), {}, {}
        try:
            for epoch in super().epochs():
                self._epoch = epoch
                yield epoch // self.setting.views
        finally:
            self._epoch, self.view = None, None

    def batches(self, records: Records, batch_size: int | None = None) -> Iterator[Batch]:
        """The slots of the epoch, with a field "view"; outside epochs one plain pass."""
        if self._epoch is None:
            yield from super().batches(records, batch_size)
            return
        size, views, count = batch_size or self.training.batch_size, self.setting.views, len(records)
        check_batch(size, views, count)
        length = epoch_length(count, self.setting.rounded_to)
        if self._epoch % views == 0 or len(self._cycle) != count:
            self._cycle = torch.randperm(count, generator=self._order)
        places = slots(self._epoch, length, count, views)
        for start, stop in cuts(places % views, size, views):
            if stop - start == 1 and min(size, count) > 1:
                continue
            part = places[start:stop]
            chosen = self._cycle[part // views]
            batch = self.runtime.to_device(records.batch(chosen.numpy(), self.task.collate))
            self.view = (part % views).to(batch["label"].device)
            self._shown.clear()
            unique = torch.unique_consecutive(chosen)
            self._visited(len(part), unique.tolist())
            if self.setting.measure_rest:
                plain = self.runtime.to_device(records.batch(unique.numpy(), self.task.collate))
                self._compare(unique.tolist(), plain)
            yield {**batch, "view": self.view}
            if self.setting.measure_rest:
                self._right |= dict(zip(unique.tolist(), self._answers(plain), strict=True))  # pyright: ignore[reportPossiblyUnboundVariable]

    def augmented(self, batch: Batch) -> Batch:
        """The training's augmentation, and the strong one on top for further views."""
        weak = super().augmented(batch)
        further = batch["view"] > 0 if "view" in batch else None
        if further is None or not further.any():
            return weak
        return {**weak, "input": self._strengthened(weak["input"], further)}

    def logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Outputs, noted for the divergence where rows are views."""
        logits = super().logits(batch)
        if "view" in batch and torch.is_grad_enabled():
            rows = torch.arange(len(logits), device=logits.device)
            orphans = batch["view"] > rows  # their first view was in the batch before
            self._shown.append((logits, batch["view"].masked_fill(orphans, 0)))
        return logits

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Gradients of a loss with the divergence of all views shown since the last one."""
        shown, self._shown = self._shown, []
        alpha, epoch = self.setting.alpha, self._epoch
        if shown and alpha > 0 and self.setting.views > 1 and (epoch or 0) >= self.setting.starts_after:
            met = self.seen[: shown[0][0].shape[1]]
            logits = torch.cat([part[:, met] for part, _ in shown])
            loss = loss + alpha * divergence(
                logits, torch.cat([view for _, view in shown]), self.setting.reduction
            )
        super().backward(loss)

    def _strengthened(self, inputs: Tensor, further: Tensor) -> Tensor:
        strong, plain = self.setting.strong, inputs[further]
        if callable(strong):
            changed = strong(plain, self._views)
        elif strong == "noise":
            noise = torch.randn(plain.shape, generator=self._views).to(plain)
            changed = plain + self.setting.deviation * noise
        else:
            changed = view(plain, strong, self._views)
        if changed.shape != plain.shape:
            raise ModelMismatch(
                f"The strong augmentation made {tuple(changed.shape)} of {tuple(plain.shape)}; shapes must stay."
            )
        whole = inputs.clone()
        whole[further] = changed
        return whole

    def _visited(self, slots_: int, records: list[int]) -> None:
        self.slots, self.visits = self.slots + slots_, self.visits + len(records)
        for record in records:
            if record in self._last and self._last[record] < self.steps:
                self.gap, self.gaps = self.gap + self.steps - self._last[record], self.gaps + 1
            self._last[record] = self.steps

    def _compare(self, records: list[int], batch: Batch) -> None:
        """How many answers were lost since the last visit: right then minus right now."""
        for record, now in zip(records, self._answers(batch), strict=True):
            if record in self._right:
                right = self._right[record]
                self.lost, self.returns = self.lost + right - now, self.returns + 1
                self.known, self.forgotten = self.known + right, self.forgotten + (right and not now)

    @torch.no_grad()
    def _answers(self, batch: Batch) -> list[int]:
        with evaluating(self.model):
            answers = super().logits(batch)[:, self.seen[: self.outputs]].argmax(1)
        met = self.seen.nonzero().flatten()
        return (met[answers] == batch["label"]).int().tolist()


def _serve_views(buffer: Any, student: _ViewStudent) -> None:
    """A buffer that gives V views of each record while the student is in an epoch, and takes each once."""
    add, views = buffer.add, student.setting.views

    def add_once(*features: Tensor, **values: Tensor) -> None:
        if student.view is None:
            return add(*features, **values)
        rows = next(iter(values.values()))
        if len(rows) != len(student.view):
            raise ModelMismatch(
                f"The base learner offers {len(rows)} records of a batch of {len(student.view)} to its buffer: "
                "which of them are views of one record cannot be known."
            )
        first = student.view == 0
        return add(
            *(part[first] for part in features), **{name: part[first] for name, part in values.items()}
        )

    def in_views(draw: Callable[[int], Fields]) -> Callable[[int], Fields]:
        def drawn(count: int) -> Fields:
            if student.view is None:
                return draw(count)
            if not student.setting.replayed_views:
                found = draw(count)
                return found and {**found, "view": torch.zeros_like(found["label"])}
            found = draw(-(-count // views))
            if not found:
                return found
            rows = torch.arange(views * len(found["label"]))[:count]
            device = found["label"].device
            repeated = {name: part[(rows // views).to(part.device)] for name, part in found.items()}
            return {**repeated, "view": (rows % views).to(device)}

        return drawn

    buffer.add = add_once
    for name in ("draw", "draw_balanced"):
        if hasattr(buffer, name):
            setattr(buffer, name, in_views(getattr(buffer, name)))
