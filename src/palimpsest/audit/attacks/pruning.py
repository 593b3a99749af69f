"""Pruning: does removing the smallest weights bring the forgotten back (checklist B5)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from palimpsest.audit.attacks.knowledge import (
    RETAIN_LIMIT,
    Watched,
    answers_after,
    gain,
    known,
    measured,
    not_run,
)
from palimpsest.audit.attacks.weights import matrix_weights
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Finding, Outcome, Row

Scope = Literal["global", "layer"]


@audit("pruning", code="B5", cost=Cost.ATTACK, tasks=("classification", "regression", "language"))
@dataclass(frozen=True)
class Pruning:
    """Set the smallest weights of every model to zero and see whether forget records are known again.

    Many methods hide knowledge behind small changes of many weights, and compression undoes those first.
    All linear and convolution weights take part, the head's included; biases, embeddings and
    normalisations stay.

    Attributes:
        shares: Of the weights that are removed, each strictly between 0 and 1.
        scope: "global" ranks all weights together, "layer" those of each layer by themselves.
    """

    shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    scope: Scope = "global"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))  # recipes give lists
        for share in self.shares:
            if not 0 < share < 1:
                raise InvalidHyperparameter(f"shares must lie strictly between 0 and 1, not {share!r}.")
        if self.scope not in get_args(Scope):
            raise InvalidHyperparameter(f"scope must be 'global' or 'layer', not {self.scope!r}.")

    def run(self, evidence: Evidence) -> Outcome:
        """Forget and retain accuracy and gain at every share."""
        for role in evidence.roles:
            if not matrix_weights(evidence.model(role)):
                why = f"the {role} model has no linear or convolution weights"
                return not_run("pruning", "forget", why)
        forget = Watched.part(evidence, "forget")
        retain = Watched.part(evidence, "retain", RETAIN_LIMIT) if evidence.has("retain") else None
        findings: list[Finding] = []
        rows: list[Row] = []
        for share in (0.0, *self.shares):

            def change(model: nn.Module, share: float = share) -> None:
                prune(list(matrix_weights(model).values()), share, self.scope)

            after = answers_after(evidence, (self, share), change, forget, retain)
            rows += after.rows(share=share)
            if share:
                label, note = f"{100 * share:g}", f"{share:.0%} of the weights removed, {self.scope} ranking"
                attacked = known(evidence, "pruning", f"forget_{label}", after.right, note, bears="inside")
                findings += [attacked, *gain(evidence, attacked)]
                if after.retain:
                    findings.append(
                        measured(evidence, "pruning", f"retain_{label}", after.retain, note, "utility")
                    )
        return Outcome(tuple(findings), {"pruning": tuple(rows)})


@torch.no_grad()
def prune(weights: Sequence[Tensor], share: float, scope: Scope = "global") -> None:
    """Set round(share * count) weights of smallest magnitude to zero, in place.

    Among equal magnitudes the first in the order of the weights go first.

    Example:
        >>> weight = torch.tensor([[3.0, -1.0], [0.5, -2.0]])
        >>> prune([weight], 0.5)
        >>> weight.tolist()
        [[3.0, 0.0], [0.0, -2.0]]
    """
    groups = [list(weights)] if scope == "global" else [[weight] for weight in weights]
    for group in groups:
        magnitudes = torch.cat([weight.abs().flatten() for weight in group])
        gone = magnitudes.argsort(stable=True)[: round(share * len(magnitudes))]
        removed = torch.zeros_like(magnitudes, dtype=torch.bool)
        removed[gone] = True
        sizes = [weight.numel() for weight in group]
        for weight, part in zip(group, removed.split(sizes), strict=True):
            weight.masked_fill_(part.view(weight.shape), 0.0)
