"""PDU: flat logits on forget answers, under a bound on the retain loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.gradient import GradientMethod
from palimpsest.forget.objective import Context, Losses, Step, Term, token_term
from palimpsest.forget.primal_dual import dual_update, flatness_loss
from palimpsest.parts.tokens import token_counts


@unlearner(
    "pdu",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper("Constrained Entropic Unlearning: A Primal-Dual Framework", "arXiv", "2506.05314"),
    search={
        "slack": Span(1.05, 3.0, log=True),
        "dual_step": Span(0.5, 10.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(5, 20, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class PDU(GradientMethod):
    """Make the logits of forget answers flat, with as much weight on retained ones as keeps their loss bounded.

    The forget term is the mean of (largest logit - mean logit)^2 where answer tokens are predicted; the
    retain term is weighed by a dual variable that rises while the retain loss lies above the bound and falls
    below it. The published code does not shift the mask of the answer; this one does.

    Attributes:
        bound: Largest mean token loss on retained records, in nats. Either this or `slack` must be set.
        slack: The bound as a multiple of what the loss is before unlearning.
        multiplier: Dual variable at the start.
        dual_step: Its step size.
        dual_warmup: Epochs before it moves.
        dual: When it moves: after every "step", or after every "epoch" by the mean over its steps.
        gamma: Weight of the forget term.

    Raises:
        InvalidHyperparameter: If neither or both of bound and slack are set.
    """

    bound: float | None = None
    slack: float | None = None
    multiplier: float = 1.0
    dual_step: float = 1.0
    dual_warmup: int = 5
    dual: Literal["step", "epoch"] = "step"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bound is None) == (self.slack is None):
            raise InvalidHyperparameter(
                "PDU needs a bound on the retain loss: set bound (in nats per token, a bit above what the model has now) "
                f"or slack (as a multiple of that), one of them, not bound={self.bound} and slack={self.slack}."
            )
        for name in ("bound", "slack"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, math.inf, open_low=True)
        check_range("multiplier", self.multiplier, 0, math.inf)
        check_range("dual_step", self.dual_step, 0, math.inf, open_low=True)
        check_range("dual_warmup", self.dual_warmup, 0, math.inf)
        check_range("gamma", self.gamma, 0, math.inf, open_low=True)
        if self.dual not in ("step", "epoch"):
            raise InvalidHyperparameter(f"dual is 'step' or 'epoch', not {self.dual!r}.")

    @property
    def needs_retain(self) -> bool:
        """Always."""
        return True

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """Find the bound, then the terms of a step with the dual variable as it was before it."""
        bound = self.bound
        if bound is None:
            bound = (self.slack or 1.0) * retain_loss(context)
        state = DualState(self.multiplier)

        def losses(step: Step) -> Losses:
            if step.retain is None:
                raise InvalidHyperparameter("PDU was given no retained records.")
            state.advance(step, self, bound, context.runtime)
            logits = context.task.logits(context.model, step.forget)
            forget = Term(flatness_loss(logits, step.forget["labels"]), "token")
            kept = token_term(context, step.retain).value
            state.see(step, float(kept.detach()))
            return Losses(forget, Term(kept - bound, "token"), self.gamma, state.multiplier)

        return losses


@dataclass
class DualState:
    """The dual variable, and the retain losses seen since it last moved.

    Attributes:
        multiplier: As it stands.
        seen: Weighed retain losses by optimizer step.
        last: The step before, None at the start: its number and epoch.
    """

    multiplier: float
    seen: dict[int, float] = field(default_factory=dict[int, float])
    last: tuple[int, int] | None = None

    def see(self, step: Step, loss: float) -> None:
        """Add what a microbatch says of the retain loss of its step."""
        self.seen[step.number] = self.seen.get(step.number, 0.0) + step.shares["retain", "token"] * loss
        self.last = (step.number, step.epoch)

    def advance(self, step: Step, settings: PDU, bound: float, runtime: Runtime) -> None:
        """Move, if a step (or epoch) of optimisation ended before this microbatch and the warm-up is over."""
        if self.last is None:
            return
        number, epoch = self.last
        ended = step.number > number if settings.dual == "step" else step.epoch > epoch
        if not ended:
            return
        own = torch.tensor(sum(self.seen.values()) / len(self.seen), device=runtime.torch_device)
        mean = float(runtime.mean(own))
        self.seen.clear()
        if epoch >= settings.dual_warmup:
            self.multiplier = dual_update(self.multiplier, mean, bound, settings.dual_step)


@torch.no_grad()
def retain_loss(context: Context) -> float:
    """Mean token loss on the retained records, in evaluation mode."""
    split, task = context.split, context.task
    total, count = 0.0, 0
    if split.retain is None:
        raise InvalidHyperparameter("PDU was given no retained records.")
    with evaluating(context.model):
        for batch in context.runtime.batches(split.retain, task, 32):
            total += float(task.token_losses(context.model, batch).sum())
            count += int(token_counts(batch["labels"]).sum())
    return total / max(count, 1)
