"""CE-U: cross entropy to one's own guess without the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.search_space import Span
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.objectives import ceu_loss
from palimpsest.forget.terms import BalancedMethod, Retain
from palimpsest.parts.tokens import IGNORED, token_counts


@unlearner(
    "ce-u",
    needs={Need.MODEL, Need.FORGET_DATA},
    tasks=("language",),
    paper=Paper("CE-U: Cross Entropy Unlearning", "arXiv", "2503.01224"),
    search={"lr": Span(1e-5, 1e-3, log=True), "epochs": Span(1, 10, integer=True)},
)
@dataclass(frozen=True, kw_only=True)
class CEU(BalancedMethod):
    """Learn the model's own next-token distribution with the true token taken out, as it stands at each step.

    No retained records are used; run long, it ruins the model as gradient ascent does, only without NaN.

    Attributes:
        skip: So many first tokens of every answer are left alone.
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: "none" as published, "nll" (token-mean loss) or "kl" (from the original).
    """

    skip: int = 1
    retain: Retain = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("skip", self.skip, 0, math.inf)

    def collate(self, context: Context, items: Sequence[dict[str, Any]], epoch: int) -> Batch:
        """A batch whose answers begin after the skipped tokens, so that the mean counts only the others."""
        batch = context.task.collate(items)
        return {**batch, "labels": without_first(batch["labels"], self.skip)}

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """The terms of a step.

        Raises:
            InvalidRecords: If every answer is as short as what is skipped.
        """
        task = context.task
        lengths = [
            int(token_counts(batch["labels"]).max())
            for batch in context.runtime.batches(context.split.forget, task)
        ]
        if max(lengths) <= self.skip:
            raise InvalidRecords(
                f"CE-U skips the first {self.skip} tokens of every answer, and no answer to forget has more than "
                f"{max(lengths)}: set a smaller skip."
            )

        def losses(step: Step) -> Losses:
            logits = task.logits(context.model, step.forget)
            forget = Term(ceu_loss(logits, step.forget["labels"], 0), "token")
            return self.balanced(context, step, forget)

        return losses


def without_first(labels: Int[Tensor, "batch tokens"], skip: int) -> Int[Tensor, "batch tokens"]:
    """Labels without the first `skip` scored ones of every row.

    Example:
        >>> without_first(torch.tensor([[-100, 5, 6, 7], [3, 4, 5, -100]]), 1)
        tensor([[-100, -100,    6,    7],
                [   3, -100,    5, -100]])
    """
    counted = labels[:, 1:] != IGNORED  # the first label of a row is never scored
    kept = counted & (counted.cumsum(1) > skip)
    later = torch.where(kept, labels[:, 1:], torch.full_like(labels[:, 1:], IGNORED))
    return torch.cat([labels[:, :1], later], 1)
