"""Direction ablation: is the answer back when one direction of the hidden states is taken out (checklist C4)?"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from palimpsest.audit.attacks.knowledge import (
    RETAIN_LIMIT,
    Watched,
    gain,
    known,
    measured,
    not_run,
)
from palimpsest.audit.language.asked import language_of, questions
from palimpsest.audit.language.inside import (
    blocks_of,
    first_of,
    network_of,
    put_first,
    spread_out,
    states,
)
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import ORIGINAL, Evidence
from palimpsest.core.finding import Outcome, Row
from palimpsest.core.unlearner import check_range
from palimpsest.parts.decoder import stack_of

TINY = 1e-6
"""Length of a difference of means, relative to the states, below which there is no direction."""

Directions = Mapping[int, Float[Tensor, " dim"]]
"""By number of the block, each of unit length."""


@audit("ablation", code="C4", cost=Cost.ATTACK, tasks=("language",))
@dataclass(frozen=True)
class Ablation:
    """Take the mean shift that unlearning made out of the hidden states, at one block and then at all.

    The direction of a block is the difference of mean states on forget questions between a model and the
    original (Łucki et al., arXiv 2409.18025, after Arditi et al., arXiv 2406.11717); the model then runs with
    h - (h.d) d at every position. Methods that push forget states along one direction (RMU) are undone by it.
    The original differs in no direction and is left as it is; the controls' differences are taken out alike.

    Attributes:
        most: At most so many blocks are tried one by one, evenly spaced, the last among them.
    """

    most: int = 8

    def __post_init__(self) -> None:
        check_range("most", self.most, 1, float("inf"))

    def run(self, evidence: Evidence) -> Outcome:
        """Forget and retain accuracy with the direction out of every block, and out of the best single one."""
        language_of(evidence)
        if evidence.original is None:
            return not_run("ablation", "all_blocks", "the original model is not at hand")
        try:
            count = blocks_of(evidence)
        except InvalidAudit as problem:
            return not_run("ablation", "all_blocks", str(problem))
        forget = Watched.part(evidence, "forget")
        retain = Watched.part(evidence, "retain", RETAIN_LIMIT) if evidence.has("retain") else None
        singles = [[block] for block in spread_out(count, self.most)]
        tried = {
            role: evidence.remember(
                self, partial(self._try, evidence, role, [*singles, list(range(count))], forget, retain), role
            )
            for role in evidence.roles
        }
        right = {role: values for role, (values, _) in tried.items()}
        everywhere = known(
            evidence, "ablation", "all_blocks", {role: values[-1] for role, values in right.items()},
            "the direction taken out of every block", "inside",
        )  # fmt: skip
        single = known(
            evidence, "ablation", "best_block", {role: _best(values[:-1]) for role, values in right.items()},
            f"out of one block, the best of {len(singles)} for every model", "inside",
        )  # fmt: skip
        findings = [everywhere, *gain(evidence, everywhere), single, *gain(evidence, single)]
        if retain is not None:
            rates = {role: values[-1] for role, (_, values) in tried.items()}
            note = "with the direction taken out of every block"
            findings.append(measured(evidence, "ablation", "retain_accuracy", rates, note, "utility"))
        rows: list[Row] = [
            {
                "model": role,
                "blocks": "all" if at == len(singles) else str(singles[at][0]),
                "order": at,
                "forget_accuracy": float(values[at].mean()),
                "retain_accuracy": rates_of[at] if rates_of else None,
            }
            for role, (values, rates_of) in tried.items()
            for at in range(len(values))
        ]
        return Outcome(tuple(findings), {"ablation": tuple(rows)})

    def _try(
        self,
        evidence: Evidence,
        role: str,
        sets: list[list[int]],
        forget: Watched,
        retain: Watched | None,
    ) -> tuple[NDArray[np.bool_], list[float]]:
        """Right answers on forget [sets, questions] and accuracy on retain [sets], each set of blocks in turn."""
        model = evidence.runtime.place(network_of(evidence, role))
        directions = shifts(evidence, role)
        right: list[NDArray[np.bool_]] = []
        rates: list[float] = []
        for blocks in sets:
            with ablated(model, {block: directions[block] for block in blocks if block in directions}):
                right.append(forget.right(model))
                if retain is not None:
                    rates.append(float(retain.right(model).mean()))
        return np.stack(right), rates


def shifts(evidence: Evidence, role: str) -> dict[int, Float[Tensor, " dim"]]:
    """Unit directions in which a model's mean states on forget questions left the original's, by block."""
    asked = questions(evidence, "forget")
    mine, first = states(evidence, role, asked).mean(1), states(evidence, ORIGINAL, asked).mean(1)
    if mine.shape != first.shape:
        raise InvalidAudit(f"The {role} model and the original have hidden states of different widths.")
    length = (mine - first).norm(dim=1)
    moved = length > TINY * first.norm(dim=1)
    return {
        block: (mine[block] - first[block]) / length[block] for block in torch.nonzero(moved)[:, 0].tolist()
    }


@contextmanager
def ablated(model: nn.Module, directions: Directions) -> Generator[nn.Module]:
    """The model with directions taken out of the outputs of blocks: h - (h.d) d; as before at exit."""
    blocks = stack_of(model).blocks

    def take_out(direction: Tensor, _module: nn.Module, _inputs: object, output: object) -> object:
        hidden = first_of(output)
        unit = direction.to(hidden)
        return put_first(output, hidden - (hidden @ unit)[..., None] * unit)

    handles = [
        blocks[number].register_forward_hook(partial(take_out, direction))
        for number, direction in directions.items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _best(values: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The row with the most right answers."""
    return values[int(values.mean(1).argmax())]
