"""The one loop of gradient-based unlearning of language models: objective x rule x scope.

An objective (one file per method in `forget.language`) says what to minimise on forget and retain batches, a
rule (`forget.rules`) what becomes of the two gradients, a scope (`forget.scopes`) which parameters move. Every
method is an objective with training settings (`GradientMethod`), and takes any rule and scope.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, NonFiniteLoss
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Card, check_range
from palimpsest.forget.objective import Context, Losses, Objective, Per, Side, Step, Term, token_term
from palimpsest.forget.rules import Rule, RuleLike, rule_of
from palimpsest.forget.scopes import ScopeLike, scope_of
from palimpsest.parts.tokens import token_counts
from palimpsest.tasks.language import Language

HISTORY_ATTRIBUTE = "palimpsest_history"
"""Of an unlearned model: one row per optimizer step with losses and what the rule measured."""
REPORT_ATTRIBUTE = "palimpsest_report"
"""Of an unlearned model: what its objective reports of the run (`Context.report`), if it does."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an objective is minimised.

    Attributes:
        rule: What becomes of forget and retain gradients: "sum", "gu", "pcgrad", or a mapping of a name and
            settings ({"name": "gu", "rank": 4}), or a rule itself.
        scope: Which parameters move: "all", "lora", "mlp", ..., or a mapping, or a scope itself.
        lr: Peak learning rate.
        epochs: Passes over the forget records.
        batch_size: Forget records of one pass through the model.
        accumulate: Passes per optimizer step.
        max_steps: At most so many optimizer steps.
        optimizer: "adamw", "adam" or "sgd".
        weight_decay: Of the optimizer.
        schedule: "linear" to zero, or "constant".
        warmup: Epochs over which the learning rate rises.
        clip: Largest gradient norm; None does not clip.
    """

    rule: RuleLike = "sum"
    scope: ScopeLike = "all"
    lr: float = 1e-5
    epochs: int = 10
    batch_size: int = 16
    accumulate: int = 1
    max_steps: int | None = None
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    weight_decay: float = 0.01
    schedule: Literal["linear", "constant"] = "linear"
    warmup: float = 1.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        low = {"epochs": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "weight_decay": 0}
        for name, least in low.items():
            check_range(name, getattr(self, name), least, math.inf)
        check_range("lr", self.lr, 0, 1e6, open_low=True)
        for name in ("clip", "max_steps"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, math.inf, open_low=True)
        if self.optimizer not in ("adamw", "adam", "sgd") or self.schedule not in ("linear", "constant"):
            raise InvalidHyperparameter(
                f"Unknown optimizer or schedule: {self.optimizer!r}, {self.schedule!r}."
            )
        rule_of(self.rule)
        scope_of(self.scope)

    def steps(self, records: int) -> int:
        """Optimizer steps for so many forget records."""
        steps = self.epochs * self.steps_per_epoch(records)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def steps_per_epoch(self, records: int) -> int:
        """Optimizer steps of one pass over so many forget records."""
        return -(-records // (self.batch_size * self.accumulate))

    def build_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over the parameters in scope."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.lr, weight_decay=self.weight_decay)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(parameters, self.lr, weight_decay=self.weight_decay)

    def factor(self, done: int, steps: int, warmup: int) -> float:
        """Learning rate after `done` steps, as a share of the peak."""
        if done < warmup:
            return (done + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        return max(0.0, (steps - done) / max(1, steps - warmup))


@dataclass(frozen=True, kw_only=True)
class GradientUnlearner(Training):
    """Minimise any objective under any rule, within any scope.

    Attributes:
        objective: What to minimise; every gradient method of `forget.language` is one.
        after_epoch: Shown the model and the number of the epoch (from 0) at the end of each; training stops
            where it says True. It must not change the model.
    """

    objective: Objective
    after_epoch: Callable[[nn.Module, int], bool] | None = None

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """A new model; the history of its training is found under `HISTORY_ATTRIBUTE`.

        Raises:
            MissingNeed: If objective or rule need retained records that are not at hand.
            NonFiniteLoss: If a loss becomes NaN or Inf, naming records of the batch.
        """
        rule, scope = rule_of(self.rule), scope_of(self.scope)
        needs_retain = self.objective.needs_retain or rule.needs_retain
        if needs_retain and split.retain is None:
            raise MissingNeed("The objective or its rule needs retained records: pass ForgetSplit.retain.")
        student = runtime.place(copy.deepcopy(model))
        request, rows = split, getattr(self.objective, "rows", None)
        if rows is not None:
            split = dataclasses.replace(split, forget=rows(student, split, task, runtime))
        original = copy.deepcopy(student).eval() if self.objective.needs_original else None
        for parameter in [] if original is None else original.parameters():
            parameter.requires_grad_(False)
        steps, per_epoch = self.steps(len(split.forget)), self.steps_per_epoch(len(split.forget))
        with runtime.seeded("gradient unlearning"):
            opened = scope.open(student, request, task, runtime)
            optimizer = self.build_optimizer(opened.parameters)
            shared, optimizer = runtime.shared(opened.model, optimizer)
            context = Context(shared, split, task, runtime, steps, self.epochs, original)
            losses_of = self.objective.begin(context)
            update = rule.begin(opened.parameters, optimizer, self.clip, runtime)
            warmup = min(round(self.warmup * per_epoch), steps - 1)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda done: self.factor(done, steps, warmup)
            )
            history: list[dict[str, float]] = []
            shared.train()
            epoch = 0
            for window in runtime.track(self._windows(context, needs_retain), "unlearning", steps):
                if window[0].epoch > epoch and self._stops(shared, epoch):
                    break
                epoch = window[0].epoch
                for step in window:
                    losses = losses_of(step)
                    if rule.needs_retain:
                        losses = _with_retain(losses, context, step, rule)
                    forget, retain = _weighed(losses, step)
                    update.add(forget, retain, losses.alpha)
                row = update.finish(partial(_retained_loss, context, window))
                history.append({"epoch": window[0].epoch, **row})
                schedule.step()
            else:
                self._stops(shared, epoch)
            unlearned = opened.close()
        setattr(unlearned, HISTORY_ATTRIBUTE, history)
        if context.report is not None:
            setattr(unlearned, REPORT_ATTRIBUTE, context.report)
        return unlearned.eval()

    def _stops(self, model: nn.Module, epoch: int) -> bool:
        """Whether the epoch that has just ended was the last."""
        if self.after_epoch is None:
            return False
        with evaluating(model):
            return self.after_epoch(model, epoch)

    def _windows(self, context: Context, needs_retain: bool) -> Iterator[list[Step]]:
        """The microbatches of every optimizer step: forget records in random order, partners drawn anew."""
        split, runtime = context.split, context.runtime
        order, partners = runtime.generator("forget order"), runtime.numpy("retain partners")
        count, number = len(split.forget), 0
        for epoch in range(self.epochs):
            shuffled = torch.randperm(count, generator=order).numpy()
            for start in range(0, count, self.batch_size * self.accumulate):
                if number == context.steps:
                    break
                gone = shuffled[start : start + self.batch_size * self.accumulate]
                kept = None
                if needs_retain and split.retain is not None:
                    kept = partners.integers(len(split.retain), size=len(gone))
                yield self._microbatches(context, gone, kept, epoch, number)
                number += 1
            last = number == context.steps
            if (context.after_epoch is not None and context.after_epoch(last)) or last:
                return

    def _microbatches(
        self,
        context: Context,
        gone: np.ndarray[Any, Any],
        kept: np.ndarray[Any, Any] | None,
        epoch: int,
        number: int,
    ) -> list[Step]:
        split, task, runtime = context.split, context.task, context.runtime
        collate = getattr(self.objective, "collate", None)

        def dressed(items: Sequence[dict[str, Any]]) -> Batch:
            return task.collate(items) if collate is None else collate(context, items, epoch)

        forget = [runtime.to_device(split.forget.batch(own, dressed)) for own in self._own(gone, runtime)]
        retain: list[Batch | None] = [None] * len(forget)
        if kept is not None and split.retain is not None:
            retain = [
                runtime.to_device(split.retain.batch(own, task.collate)) for own in self._own(kept, runtime)
            ]
        counts = [_counts(*batches) for batches in zip(forget, retain, strict=True)]
        totals = {key: runtime.total(sum(count[key] for count in counts)) for key in counts[0]}
        steps: list[Step] = []
        for batch, partners, count in zip(forget, retain, counts, strict=True):
            shares = {key: runtime.processes * count[key] / max(totals[key], 1) for key in count}
            steps.append(Step(batch, partners, epoch, number, shares))
        return steps

    def _own(self, chosen: np.ndarray[Any, Any], runtime: Runtime) -> list[np.ndarray[Any, Any]]:
        """The rows of this process, in microbatches."""
        pieces = np.array_split(chosen, -(-len(chosen) // self.batch_size))
        return [piece[runtime.rank :: runtime.processes] for piece in pieces]


@dataclass(frozen=True, kw_only=True)
class GradientMethod(Training, ABC):
    """A published method: an objective with the training settings that it was published with.

    Not a method by itself. `GradientUnlearner(objective=NPO(beta=0.1), rule=..., scope=...)` and
    `NPO(beta=0.1, rule=..., scope=...)` are the same.
    """

    card: ClassVar[Card]

    @property
    def needs_original(self) -> bool:
        """Whether a frozen copy of the model is kept."""
        return False

    @property
    def needs_retain(self) -> bool:
        """Whether every step is given retained records."""
        return False

    def rows(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Records:
        """What the loop goes over: the forget records, unless a method makes others of them."""
        return split.forget

    def collate(self, context: Context, items: Sequence[dict[str, Any]], epoch: int) -> Batch:
        """How forget records become a batch."""
        return context.task.collate(items)

    @abstractmethod
    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """Prepare; gives the losses of a step."""

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> nn.Module:
        """A new model, by `GradientUnlearner`."""
        return self.composed().unlearn(model, split, task, runtime)

    def composed(self, after_epoch: Callable[[nn.Module, int], bool] | None = None) -> GradientUnlearner:
        """The same as an objective with its training settings, for whom wants to look at every epoch."""
        settings = {item.name: getattr(self, item.name) for item in dataclasses.fields(Training)}
        return GradientUnlearner(objective=self, after_epoch=after_epoch, **settings)


def _counts(forget: Batch, retain: Batch | None) -> dict[tuple[Side, Per], int]:
    """Rows and scored tokens of both batches."""
    counts: dict[tuple[Side, Per], int] = {}
    sides: tuple[tuple[Side, Batch | None], ...] = (("forget", forget), ("retain", retain))
    for side, batch in sides:
        counts[side, "row"] = 0 if batch is None else len(batch["id"])
        counts[side, "token"] = 0 if batch is None else int(token_counts(batch["labels"]).sum())
    return counts


def _with_retain(losses: Losses, context: Context, step: Step, rule: Rule) -> Losses:
    """Losses for a rule that looks at retained records: its own retain term where the objective has none.

    Raises:
        InvalidHyperparameter: If the forget term has no weight: there is nothing to project.
    """
    check_range("gamma", losses.gamma, 0, math.inf, open_low=True)
    if losses.retain is not None:
        return losses
    return dataclasses.replace(losses, retain=_nll(context, step), alpha=rule.alpha)


def _nll(context: Context, step: Step) -> Term:
    """Token-mean loss of the retained records: what a rule protects where the objective has no retain term."""
    if step.retain is None:
        raise MissingNeed("The rule protects retained records: pass ForgetSplit.retain.")
    return token_term(context, step.retain)


@torch.no_grad()
def _retained_loss(context: Context, window: Sequence[Step]) -> float:
    """Token-mean loss of all retained records of an optimizer step, over all processes, in evaluation mode."""
    with evaluating(context.model):
        own = [step.shares["retain", "token"] * _nll(context, step).value for step in window]
    return float(context.runtime.mean(torch.stack(own).sum()))


def _weighed(losses: Losses, step: Step) -> tuple[Tensor, Tensor | None]:
    """Forget loss with its weight, and retain loss without; both with their shares.

    Raises:
        NonFiniteLoss: If one is NaN or Inf; nothing is applied.
        InvalidHyperparameter: If the forget loss depends on nothing that moves.
    """
    sides: list[Tensor | None] = []
    terms: tuple[tuple[Side, Term | None, float], ...] = (
        ("forget", losses.forget, losses.gamma), ("retain", losses.retain, 1.0),
    )  # fmt: skip
    for side, term, weight in terms:
        if term is None:
            sides.append(None)
            continue
        if side == "forget" and not term.value.requires_grad:
            raise InvalidHyperparameter(
                "The forget loss depends on no parameter that the scope lets move: choose another scope (or layer)."
            )
        if not torch.isfinite(term.value):
            names = (step.forget if side == "forget" or step.retain is None else step.retain)["id"][:3]
            raise NonFiniteLoss(
                f"The {side} loss became {term.value.item()} on a batch with records {names}."
            )
        sides.append(weight * step.shares[side, term.per] * term.value)
    assert sides[0] is not None
    return sides[0], sides[1]
