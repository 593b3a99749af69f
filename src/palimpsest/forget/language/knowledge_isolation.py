"""Knowledge isolation: find the layers that hold the facts, then unlearn there, with a retain weight that adapts."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.gradient import GradientMethod
from palimpsest.forget.language.joint_loss import AdaptiveMultiplier, Baseline, joint_loss
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.scopes import ScopeLike
from palimpsest.parts.tokens import scored, token_losses, token_mean
from palimpsest.tasks.language import Language

FORGET = "knowledge_isolation_forget"
"""Field of mixed records: whether the record is to be forgotten."""
LOOKED_AT = 500
"""Rows of either side that are looked at after an epoch, as the released code does without a validation set."""
log = logging.getLogger("palimpsest")


@dataclass
class IsolationReport:
    """What a run tells, found at the unlearned model (`palimpsest.forget.gradient.REPORT_ATTRIBUTE`).

    Attributes:
        multipliers: The retain weight m of every batch that held retained rows.
        reference: Baseline of the retain loss, in nats.
        epochs: Epochs that were run.
        accuracy: Share of forget rows still predicted word for word, after every epoch that was looked at.
        joint: Joint loss after every epoch that was looked at.
        stopped: Why training ended before its time; empty if it did not.
        kept: Epoch, from 1, whose parameters were kept.
    """

    multipliers: list[float] = field(default_factory=list[float])
    reference: float = 0.0
    epochs: int = 0
    accuracy: list[float] = field(default_factory=list[float])
    joint: list[float] = field(default_factory=list[float])
    stopped: str = ""
    kept: int = 0


@unlearner(
    "knowledge-isolation",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "SHA256 at SemEval-2025 Task 4: Selective Amnesia - Constrained Unlearning for Large Language Models via "
        "Knowledge Isolation",
        "SemEval 2025",
        "2504.12996",
    ),
    search={
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 15, integer=True),
        "high": Span(1.5, 4.0),
    },
)
@dataclass(frozen=True, kw_only=True)
class KnowledgeIsolation(GradientMethod):
    """Gradient ascent on forgotten answers in the MLPs that hold them, against retained ones with weight m.

    Causal tracing over the forget facts finds the layers (scope "traced"; it needs plain questions that name
    their `subject`). There, and nowhere else, -L_forget + m L_retain is minimised on mixed batches: one
    shuffled pass over forget and retained records together, so that a batch holds as many of either as chance
    has it. m is `low` in the first epoch, and rises later with the excess of a batch's retain loss over the
    mean of that epoch (see `joint_loss.AdaptiveMultiplier`).

    The ascent has no bound. It ends after the epoch in which at most `chance` of the forget rows are still
    predicted word for word, and says so (log, and `IsolationReport.stopped`); or `cap` the loss at which
    forget rows push no further. The published code has neither: chance=None. It keeps the checkpoint with the
    lowest joint loss (keep="best"), which favours the largest forget loss; the last is kept by default.

    Differs from the released code in: padding on the right instead of the left, which no loss sees; the correct
    baseline by default; retain losses of evaluation never enter the baseline; evaluation once per epoch instead
    of every 4 steps; parameters in the precision of the given model. As there, every batch (not the window of
    `accumulate` batches) has means and an m of its own, so that accumulating is not the same as a larger batch.
    Under a rule that looks at retained records ("gu", ...) forget and retain terms are handed over apart.

    Attributes:
        scope: "traced", or its settings ({"name": "traced", "count": 2, "window": 3, "kind": "all"}); or layers
            by hand: {"name": "blocks", "layers": [0, 1], "kind": "mlp"}. Any other scope works as well.
        scale: a of m.
        base: b of m.
        offset: c of m.
        low: Smallest m.
        high: Largest m: 2.3 in the code, 2.8 in the paper.
        baseline: "mean", or "official" with the defect of the released code.
        ratio: Retained records per forget record, drawn once; None takes all (the published data has 1).
        cap: Forget loss, in nats per token, beyond which a batch's forget rows push no further.
        chance: Share of forget rows predicted word for word at which training ends; None never looks.
        keep: "last", or "best" joint loss of the epochs.
    """

    scope: ScopeLike = "traced"
    lr: float = 1.5e-5
    epochs: int = 8
    batch_size: int = 12
    accumulate: int = 10
    weight_decay: float = 0.0
    warmup: float = 0.0
    scale: float = 0.3
    base: float = 6.0
    offset: float = 0.8
    low: float = 1.2
    high: float = 2.3
    baseline: Baseline = "mean"
    ratio: float | None = None
    cap: float | None = None
    chance: float | None = 0.05
    keep: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.multiplier()
        for name in ("ratio", "cap"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, math.inf, open_low=True)
        if self.chance is not None:
            check_range("chance", self.chance, 0, 1)
        if self.keep not in ("last", "best"):
            raise InvalidHyperparameter(f"keep is 'last' or 'best', not {self.keep!r}.")

    def multiplier(self) -> AdaptiveMultiplier:
        """The retain weight at the start of a run."""
        return AdaptiveMultiplier(self.scale, self.base, self.offset, self.low, self.high, self.baseline)

    @property
    def needs_retain(self) -> bool:
        """Always."""
        return True

    def rows(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Records:
        """Forget and retained records together: what batches are drawn from."""
        if split.retain is None:
            raise MissingNeed("Knowledge isolation needs retained records: pass ForgetSplit.retain.")
        kept = split.retain
        if self.ratio is not None and (most := max(1, round(self.ratio * len(split.forget)))) < len(kept):
            kept = kept.select(sorted(runtime.numpy("mixed retain").choice(len(kept), most, replace=False)))
        mixed = [(True, item) for item in split.forget] + [(False, item) for item in kept]
        items = [
            {**{key: value for key, value in item.items() if key not in ("id", "index")}, FORGET: gone}
            for gone, item in mixed
        ]
        return Records(items, ids=[f"mixed/{item['id']}" for _, item in mixed])

    def begin(self, context: Context) -> Isolation:
        """The losses of a step, with the state of m."""
        return Isolation(self, context)


class Isolation:
    """One run: m with its baseline, and what is looked at after every epoch."""

    def __init__(self, settings: KnowledgeIsolation, context: Context):
        self.settings, self.context = settings, context
        self.multiplier, self.report = settings.multiplier(), IsolationReport()
        self.best: dict[str, Tensor] = {}
        self.gone = torch.tensor([bool(item[FORGET]) for item in context.split.forget])
        context.report, context.after_epoch = self.report, self.after_epoch

    def __call__(self, step: Step) -> Losses:
        """-L_forget and m L_retain of a mixed batch; a side without rows has no part in it."""
        batch = step.forget
        logits, labels = self.context.task.logits(self.context.model, batch), batch["labels"]
        gone = torch.tensor(batch[FORGET], device=labels.device)
        forget, retain = side(logits, labels, gone), side(logits, labels, ~gone)
        multiplier = self.multiplier.update(
            0.0 if retain is None else float(retain.detach()), int((~gone).sum()), step.epoch
        )
        self.report.reference = self.multiplier.reference
        if retain is not None:
            self.report.multipliers.append(multiplier)
        if forget is None:
            assert retain is not None
            return Losses(Term(0.0 * retain), Term(retain), alpha=multiplier)
        if self.settings.cap is not None:
            forget = forget.clamp(max=self.settings.cap)
        return Losses(Term(-forget), None if retain is None else Term(retain), alpha=multiplier)

    def after_epoch(self, last: bool) -> bool:
        """Whether training ends here; after the last epoch the best parameters are put back, if asked for."""
        self.report.epochs += 1
        self.report.kept = self.report.epochs
        at_chance, accuracy = False, 1.0
        if self.settings.chance is not None or self.settings.keep == "best":
            accuracy, joint = self._looked_at()
            self.report.accuracy.append(accuracy)
            self.report.joint.append(joint)
            at_chance = self.settings.chance is not None and accuracy <= self.settings.chance
        if at_chance and not last:
            self.report.stopped = (
                f"After epoch {self.report.epochs} of {self.context.epochs} {accuracy:.1%} of the forget rows were "
                f"predicted word for word, at most {self.settings.chance:.1%}."
            )
            log.info("Knowledge isolation stopped. %s", self.report.stopped)
        if self.settings.keep == "best":
            self._keep(last or at_chance)
        return at_chance

    @torch.no_grad()
    def _keep(self, last: bool) -> None:
        """Remember the parameters with the lowest joint loss so far; put them back at the end."""
        moving = {name: each for name, each in self.context.model.named_parameters() if each.requires_grad}
        best = min(range(len(self.report.joint)), key=self.report.joint.__getitem__)
        self.report.kept = best + 1
        if best == len(self.report.joint) - 1:
            self.best = {name: each.detach().clone() for name, each in moving.items()}
        elif last:
            for name, each in moving.items():
                each.copy_(self.best[name])

    @torch.no_grad()
    def _looked_at(self) -> tuple[float, float]:
        """Share of forget rows whose every token is the likeliest, and joint loss over all that is looked at."""
        found: list[float] = []
        accuracy = 0.0
        for wanted in (self.gone, ~self.gone):
            records = self.context.split.forget.select(wanted.nonzero().flatten().tolist()[:LOOKED_AT])
            loss, tokens, whole = 0.0, 0, 0
            with evaluating(self.context.model):
                for batch in self.context.runtime.batches(records, self.context.task, 32):
                    logits, labels = self.context.task.logits(self.context.model, batch), batch["labels"]
                    mask = scored(labels)
                    loss += float(token_losses(logits, labels).sum())
                    tokens += int(mask.sum())
                    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~mask
                    whole += int(right.all(1).sum())
            found.append(loss / max(tokens, 1))
            accuracy = whole / len(records) if wanted is self.gone else accuracy
        forget, retain = torch.tensor(found)
        change = self.multiplier.update(float(retain), 1, 1)
        return accuracy, float(joint_loss(forget, retain, change))


def side(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor | None:
    """Mean token loss of some rows of a batch; None where there are none."""
    return token_mean(logits[rows], labels[rows]) if bool(rows.any()) else None
