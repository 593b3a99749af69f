"""Measurements for the claims of geometric disentanglement."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from palimpsest.core.errors import MissingNeed
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.forget.gradient import HISTORY_ATTRIBUTE, GradientMethod, GradientUnlearner
from palimpsest.forget.language.gradient_difference import GradientAscent
from palimpsest.forget.language.gu import GU
from palimpsest.forget.language.npo import NPO
from palimpsest.forget.objective import Context, Losses, Objective, Step
from palimpsest.forget.rules import RuleLike
from palimpsest.parts.tokens import scored, token_mean
from palimpsest.study.claims.measuring import Setting, measurement
from palimpsest.tasks.language import Language

FORGOTTEN = 0.2
"""Both runs go on until at most this share of the tokens of forget answers is predicted."""
EVERY = 2
"""Optimizer steps between two looks."""
AT_MOST = 80
"""Optimizer steps after which a run counts as one that does not forget."""
LOOKED_AT = 150
"""Retained records whose loss is measured, evenly spread."""
STRICT = GU(rank=8, mode="both")
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 5e-4}
TRAINING: dict[str, Any] = {
    "batch_size": 68, "epochs": AT_MOST, "warmup": 0, "schedule": "constant", "weight_decay": 0.0, "clip": None,
}  # fmt: skip


# Claim 1: algebra


@measurement("gu.left-along-retain")
def left_along_retain(setting: Setting) -> float:
    """Largest |<g_r, step>| / |g_r| |step| of five SGD steps of gradient ascent with GU."""
    return _largest_cosine(_history(setting, GU(), 5, optimizer="sgd", lr=0.1))


@measurement("gu.left-along-retain-off")
def left_along_retain_off(setting: Setting) -> float:
    """The same without a rule, at one step whose retained batch is looked at from outside."""
    step, before, after = _sgd_step(setting, "sum", 1e-5)
    if step.retain is None:
        raise MissingNeed("The claim needs retained records.")
    loss = token_mean(_task(setting).logits(before, step.retain), step.retain["labels"])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(before.parameters()))])
    moved = torch.cat(
        [(n - o).detach().flatten() for n, o in zip(after.parameters(), before.parameters(), strict=True)]
    )
    return abs(float(F.cosine_similarity(moved, gradient, dim=0)))


# Claim 2: one tiny step


@measurement("gu.tiny-retain-ratio")
def tiny_retain_ratio(setting: Setting) -> float:
    """How much one SGD step of 1e-3 of the parameters' length changes its retained records' loss: GU over none."""
    return _tiny_ratios(setting, 1e-3)[1]


@measurement("gu.tiny-forget-ratio")
def tiny_forget_ratio(setting: Setting) -> float:
    """How much the same step raises the loss of its forget records: GU over none."""
    return _tiny_ratios(setting, 1e-3)[0]


@measurement("gu.tinier-retain-ratio")
def tinier_retain_ratio(setting: Setting) -> float:
    """As the ratio of retained losses, for a step of 1e-5 of the parameters' length."""
    return _tiny_ratios(setting, 1e-5)[1]


@measurement("gu.tinier-forget-ratio")
def tinier_forget_ratio(setting: Setting) -> float:
    """As the ratio of forget losses, for a step of 1e-5 of the parameters' length."""
    return _tiny_ratios(setting, 1e-5)[0]


# Claims 3, 5 and 6: retained loss at equal forgetting


@measurement("gu.ascent-rise-ratio")
def ascent_rise_ratio(setting: Setting) -> float:
    """Rise of the retained loss under gradient ascent with corrected steps, over without."""
    return _rise(setting, GradientAscent(), STRICT) / _rise(setting, GradientAscent(), "sum")


@measurement("gu.ascent-rise-ratio-gradient")
def ascent_rise_ratio_gradient(setting: Setting) -> float:
    """The same where only gradients are projected, as the paper has it."""
    return _rise(setting, GradientAscent(), GU()) / _rise(setting, GradientAscent(), "sum")


@measurement("gu.npo-rise-ratio")
def npo_rise_ratio(setting: Setting) -> float:
    """The same for NPO without a retain term, with corrected steps."""
    objective = NPO(retain="none")
    return _rise(setting, objective, STRICT) / _rise(setting, objective, "sum")


@measurement("gu.rank-ratio")
def rank_ratio(setting: Setting) -> float:
    """Rise of the loss of retained records that were never drawn: eight protected gradients over one."""
    eight, one = (_rise(setting, GradientAscent(), GU(rank=k, mode="both"), unseen=True) for k in (8, 1))
    return eight / one


@measurement("gu.pcgrad-rise-ratio")
def pcgrad_rise_ratio(setting: Setting) -> float:
    """Rise of the retained loss under gradient ascent: corrected steps over PCGrad."""
    return _rise(setting, GradientAscent(), STRICT) / _rise(setting, GradientAscent(), "pcgrad")


@measurement("gu.pcgrad-step-ratio")
def pcgrad_step_ratio(setting: Setting) -> float:
    """Mean |<g_r, step>| of ten AdamW steps held to equality, over that of PCGrad."""
    rules: tuple[RuleLike, ...] = (GU(mode="both", equality=True), {"name": "pcgrad", "metric": "adam"})
    ours, theirs = (
        np.mean([abs(row["realised_product"]) for row in _history(setting, rule, 10, **ADAMW)])
        for rule in rules
    )
    return float(ours / theirs)


# Claim 4: the step that AdamW takes


@measurement("gu.realised-cosine")
def realised_cosine(setting: Setting) -> float:
    """Largest <g_j, step> / |g_j| |step| over all protected gradients of ten AdamW steps, corrected."""
    rows = _history(setting, GU(mode="realised"), 10, **ADAMW, weight_decay=0.01)
    return max(row["realised_cosine"] for row in rows)


@measurement("gu.entangled-steps")
def entangled_steps(setting: Setting) -> float:
    """Share of ten AdamW steps with |cosine| above 1e-3 where only gradients are projected."""
    rows = _history(setting, GU(), 10, **ADAMW, weight_decay=0.01)
    return float(np.mean([abs(row["realised_cosine"]) > 1e-3 for row in rows]))


# Runs


class Reached(Exception):
    """Enough was forgotten: the run ends here."""


@dataclass(frozen=True)
class Watched:
    """An objective whose run is looked at, and ends where enough is forgotten.

    Attributes:
        objective: What is minimised.
        kept: Retained records whose loss is measured.
        curve: (token accuracy on forget answers, loss of retained ones), filled as the run goes.
    """

    objective: GradientMethod
    kept: Records
    curve: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    @property
    def needs_original(self) -> bool:
        """As the objective."""
        return self.objective.needs_original

    @property
    def needs_retain(self) -> bool:
        """As the objective."""
        return self.objective.needs_retain

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The objective's losses, after a look every few steps."""
        losses_of, model, task = self.objective.begin(context), context.model, context.task

        def losses(step: Step) -> Losses:
            if step.number % EVERY == 0:
                accuracy = token_measures(model, context.split.forget, task, context.runtime)[0]
                self.curve.append((accuracy, token_measures(model, self.kept, task, context.runtime)[1]))
                if accuracy <= FORGOTTEN:
                    raise Reached
            return losses_of(step)

        return losses


@torch.no_grad()
def token_measures(
    model: nn.Module, records: Records, task: Language, runtime: Runtime
) -> tuple[float, float]:
    """Share of answer tokens that are predicted, and their mean loss."""
    right = tokens = loss = 0.0
    with evaluating(model):
        for batch in runtime.batches(records, task):
            logits, labels = task.logits(model, batch)[:, :-1], batch["labels"][:, 1:]
            mask = scored(batch["labels"])
            right += float((logits.argmax(-1) == labels)[mask].sum())
            loss += float(F.cross_entropy(logits[mask], labels[mask], reduction="sum"))
            tokens += float(mask.sum())
    return right / tokens, loss / tokens


def _rise(setting: Setting, objective: GradientMethod, rule: RuleLike, unseen: bool = False) -> float:
    """By how much the loss of retained records rises until enough is forgotten; NaN if it never is.

    Args:
        setting: Whose model is unlearned.
        objective: What is minimised.
        rule: What becomes of gradients.
        unseen: Whether a third of the retained records is kept from the run, and measured.
    """
    split, kept = setting.split, _retained(setting.split)
    if unseen:
        apart = np.arange(len(kept)) % 3 == 0
        split, kept = dataclasses.replace(split, retain=kept.select(~apart)), kept.select(apart)
    looked = kept.select(np.unique(np.linspace(0, len(kept) - 1, min(LOOKED_AT, len(kept))).astype(int)))
    watched = Watched(objective, looked)
    training: dict[str, Any] = {**TRAINING, **ADAMW, "max_steps": AT_MOST}
    unlearner = GradientUnlearner(objective=watched, rule=rule, **training)
    try:
        unlearner.unlearn(setting.original, split, _task(setting), setting.runtime)
    except Reached:
        return rise_at(watched.curve, FORGOTTEN)
    return float("nan")


def rise_at(curve: list[tuple[float, float]], accuracy: float) -> float:
    """Rise of the loss of a curve where its accuracy first comes down to a value, between two looks."""
    (above, before), (below, after) = curve[-2:] if len(curve) > 1 else [curve[0], curve[0]]
    share = (above - accuracy) / (above - below) if above > below else 1.0
    return before + share * (after - before) - curve[0][1]


def _history(setting: Setting, rule: RuleLike, steps: int, **settings: Any) -> list[dict[str, float]]:
    """Rows of a short run of gradient ascent."""
    unlearned = _unlearned(setting, rule, steps, **settings)
    return getattr(unlearned, HISTORY_ATTRIBUTE)


def _unlearned(
    setting: Setting, rule: RuleLike, steps: int, objective: Objective | None = None, **settings: Any
) -> nn.Module:
    training: dict[str, Any] = {**TRAINING, "max_steps": steps, **settings}
    method = GradientUnlearner(objective=objective or GradientAscent(), rule=rule, **training)
    return method.unlearn(setting.original, setting.split, _task(setting), setting.runtime)


def _largest_cosine(rows: list[dict[str, float]]) -> float:
    return max(abs(row["realised_cosine"]) for row in rows)


@dataclass(frozen=True)
class Remembering(Watched):
    """An objective whose batches are kept, and that watches nothing."""

    seen: list[Step] = field(default_factory=list[Step])

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The objective's losses."""
        losses_of = self.objective.begin(context)

        def losses(step: Step) -> Losses:
            self.seen.append(step)
            return losses_of(step)

        return losses


def _sgd_step(setting: Setting, rule: RuleLike, relative: float) -> tuple[Step, nn.Module, nn.Module]:
    """One SGD step of a share of the parameters' length, in double precision.

    Returns:
        Its batches (GU draws retained records; without a rule they are those that it would have drawn), and the
        model before and after it.
    """
    before = setting.runtime.place(copy.deepcopy(setting.original)).double()
    setting = dataclasses.replace(setting, original=before)
    length = torch.cat([parameter.detach().flatten() for parameter in before.parameters()]).norm()
    slope = _history(setting, "sum", 1, optimizer="sgd", lr=1e-9)[0]["norm"]
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": float(relative * length / slope)}
    seen = Remembering(GradientAscent(), _retained(setting.split))
    _unlearned(setting, GU(rank=1), 1, seen, **settings)
    return seen.seen[0], before, _unlearned(setting, rule, 1, **settings)


def _tiny_ratios(setting: Setting, relative: float) -> tuple[float, float]:
    """Change of the losses of a step's own forget and retain batch with GU, over that without."""
    changes: dict[str, list[float]] = {}
    for name, rule in (("off", "sum"), ("on", GU(rank=1))):
        step, before, after = _sgd_step(setting, rule, relative)
        batches = step.forget, step.retain
        changes[name] = [_loss(after, batch, setting) - _loss(before, batch, setting) for batch in batches]
    ratios = [abs(on / off) for on, off in zip(changes["on"], changes["off"], strict=True)]
    return ratios[0], ratios[1]


@torch.no_grad()
def _loss(model: nn.Module, batch: Batch | None, setting: Setting) -> float:
    """Token-mean loss in double precision."""
    if batch is None:
        raise MissingNeed("The claim needs retained records.")
    with evaluating(model):
        logits, mask = _task(setting).logits(model, batch)[:, :-1], scored(batch["labels"])
        return float(F.cross_entropy(logits[mask], batch["labels"][:, 1:][mask]))


def _retained(split: ForgetSplit) -> Records:
    if split.retain is None:
        raise MissingNeed("The claim needs retained records.")
    return split.retain


def _task(setting: Setting) -> Language:
    return cast(Language, setting.task)
