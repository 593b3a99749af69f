"""Terms that many objectives share: losses of answers, retain terms, likelihoods under the original."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.modes import evaluating
from palimpsest.core.records import Batch, Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.unlearner import check_range
from palimpsest.forget.gradient import GradientMethod
from palimpsest.forget.objective import Context, Losses, Step, Term, token_term
from palimpsest.forget.objectives import kl_retain_loss
from palimpsest.parts.tokens import token_counts
from palimpsest.tasks.language import Language

Retain = Literal["nll", "kl", "none"]
RETAIN_TERMS = ("nll", "kl", "none")


@dataclass(frozen=True, kw_only=True)
class BalancedMethod(GradientMethod):
    """A gradient method that weighs its forget term against a retain term of the user's choice.

    Attributes:
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "nll" (token-mean loss), "kl" (from the original) or "none".
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain: Retain = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_retain(self.retain, self.gamma, self.alpha)

    @property
    def needs_original(self) -> bool:
        """Only for the KL retain term."""
        return self.retain == "kl"

    @property
    def needs_retain(self) -> bool:
        """Unless there is no retain term."""
        return self.retain != "none"

    def balanced(self, context: Context, step: Step, forget: Term) -> Losses:
        """The losses of a step, from its forget term."""
        return Losses(forget, retain_term(context, step, self.retain), self.gamma, self.alpha)


def retain_term(context: Context, step: Step, kind: Retain) -> Term | None:
    """The retain term of a step: token-mean loss, KL from the original over all positions, or none.

    The KL counts every position, prompt and padding too, as the published code does.
    """
    if kind == "none" or step.retain is None:
        return None
    if kind == "nll":
        return token_term(context, step.retain)
    logits = context.task.logits(context.model, step.retain)
    with torch.no_grad():
        before = context.task.logits(context.reference, step.retain)
    return Term(kl_retain_loss(logits, before), "row")


def answer_losses(context: Context, batch: Batch) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Summed loss of every answer, and its number of tokens."""
    return context.task.token_losses(context.model, batch).sum(1), token_counts(batch["labels"])


def references(context: Context, records: Records) -> Callable[[Batch], Float[Tensor, " batch"]]:
    """Summed losses of answers under the original, looked up by record.

    Computed once with the model as it stands at the beginning, which is the original: a method that
    compares likelihoods of sequences needs no second model in memory.
    """
    table = sequence_table(context.model, records, context.task, context.runtime)

    def look_up(batch: Batch) -> Tensor:
        return torch.tensor([table[name] for name in batch["id"]], device=context.runtime.torch_device)

    return look_up


@torch.no_grad()
def sequence_table(model: nn.Module, records: Records, task: Language, runtime: Runtime) -> dict[str, float]:
    """Summed loss of every record's answer, by id, in evaluation mode."""
    table: dict[str, float] = {}
    with evaluating(model):
        for batch in runtime.batches(records, task, 32):
            losses = task.token_losses(model, batch).sum(1)
            table.update(zip(batch["id"], losses.float().tolist(), strict=True))
    return table


def check_retain(kind: str, gamma: float, alpha: float) -> None:
    """Check the choice of a retain term and both weights.

    Raises:
        InvalidHyperparameter: For another name, or a weight that is not above 0 (alpha may be 0).
    """
    if kind not in RETAIN_TERMS:
        raise InvalidHyperparameter(f"retain is one of {', '.join(RETAIN_TERMS)}, not {kind!r}.")
    check_range("gamma", gamma, 0, math.inf, open_low=True)
    check_range("alpha", alpha, 0, math.inf)
