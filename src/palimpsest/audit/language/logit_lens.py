"""Logit lens: at which depth can the answer be read off by the head (checklist C2)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.audit.attacks.knowledge import known, not_run
from palimpsest.audit.language.asked import Question, questions
from palimpsest.audit.language.inside import (
    blocks_of,
    head_role,
    read_out,
    spread_out,
    states,
    tokens_of,
)
from palimpsest.core.auditing import audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import UNLEARNED, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.unlearner import check_range

Values = Float[NDArray[np.float64], "blocks questions"]


@audit("logit-lens", code="C2", tasks=("language",))
@dataclass(frozen=True)
class LogitLens:
    """Put final norm and head on the output of every block and look for the token that begins the answer.

    nostalgebraist, "interpreting GPT: the logit lens" (2020). The states are those where the true answer
    begins to differ from wrong ones. A method that works on the last layers alone leaves the answer readable
    before them. Every model is read twice: through the head that its states were trained for (of the unlearned
    model the original's, so that a head that was trained to hide answers does not help: see
    `palimpsest.audit.language.inside.head_role`), and through its own.

    Attributes:
        most: At most so many blocks are read, evenly spaced, the last among them.
    """

    most: int = 48

    def __post_init__(self) -> None:
        check_range("most", self.most, 1, float("inf"))

    def run(self, evidence: Evidence) -> Outcome:
        """Best probability and rank over the blocks, and the curves with K of every block."""
        asked = questions(evidence, "forget")
        try:
            chosen = spread_out(blocks_of(evidence), self.most)
            first = {
                role: self._read(evidence, role, head_role(evidence, role), asked) for role in evidence.roles
            }
            own = {role: self._read(evidence, role, role, asked) for role in evidence.roles}
        except InvalidAudit as problem:
            return not_run("logit-lens", "best", str(problem))
        note = "probability of the token that begins the answer, best block"
        findings = [
            _best(evidence, "best", first, f"{note}, through the head from before unlearning"),
            _best(evidence, "best_own_head", own, f"{note}, through the model's own head"),
            _rank(evidence, first),
        ]
        rows = [row for at, block in enumerate(chosen) for row in _rows(evidence, block, at, first, own)]
        return Outcome(tuple(findings), {"lens": tuple(rows)})

    def _read(
        self, evidence: Evidence, role: str, head: str, asked: Sequence[Question]
    ) -> tuple[Values, Values]:
        """Log-probability and rank of the tokens in every block."""
        chosen = spread_out(blocks_of(evidence), self.most)
        return evidence.remember(
            (self, head, tuple(item.question for item in asked)),
            lambda: lens(
                read_out(evidence, head, states(evidence, role, asked)[chosen]), tokens_of(evidence, asked)
            ),
            role,
        )


def lens(log_p: Float[Tensor, "blocks questions vocabulary"], tokens: Tensor) -> tuple[Values, Values]:
    """Log-probability of one token per question, and its rank from 1, in every block.

    Example:
        >>> import torch
        >>> log_p, rank = lens(torch.tensor([[[-0.1, -2.4]]]), torch.tensor([1]))
        >>> log_p.round(1).tolist(), rank.tolist()
        ([[-2.4]], [[2.0]])
    """
    own = log_p.gather(2, tokens.expand(len(log_p), -1)[:, :, None])
    rank = 1 + (log_p > own).sum(2)
    return own[:, :, 0].double().numpy(), rank.double().numpy()


def _best(
    evidence: Evidence,
    name: str,
    read: Mapping[str, tuple[Values, Values]],
    note: str,
) -> Finding:
    best = {role: np.exp(log_p.max(0)) for role, (log_p, _) in read.items()}
    return known(evidence, "logit-lens", name, best, note, "inside")


def _rank(evidence: Evidence, read: Mapping[str, tuple[Values, Values]]) -> Finding:
    best = {role: 1 / rank.min(0) for role, (_, rank) in read.items()}
    return known(evidence, "logit-lens", "best_reciprocal_rank", best, "1 / rank of the token, best block")


def _rows(
    evidence: Evidence,
    block: int,
    at: int,
    first: Mapping[str, tuple[Values, Values]],
    own: Mapping[str, tuple[Values, Values]],
) -> list[Row]:
    """One row per model: means over the questions; K of the unlearned one."""
    rows: list[Row] = []
    for head, read in (("from before", first), ("own", own)):
        p = {role: np.exp(log_p[at]) for role, (log_p, _) in read.items()}
        k = known(evidence, "logit-lens", f"block_{block}", p).k
        rows += [
            {
                "model": role,
                "head": head,
                "block": block,
                "log_probability": float(read[role][0][at].mean()),
                "probability": float(values.mean()),
                "mean_rank": float(read[role][1][at].mean()),
                "k": k if role == UNLEARNED else None,
            }
            for role, values in p.items()
        ]
    return rows
