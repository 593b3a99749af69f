"""Interpolation: how far from the original, and over which hills (checklist B5)?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from palimpsest.audit.attacks.bare import bare_network, distance
from palimpsest.audit.attacks.knowledge import Watched, known, measured, not_run
from palimpsest.core.auditing import Cost, audit
from palimpsest.core.evidence import ORIGINAL, Evidence
from palimpsest.core.finding import Finding, Outcome, Row
from palimpsest.core.scale import judged
from palimpsest.core.unlearner import check_range

State = dict[str, Tensor]


@audit("interpolation", code="B5", cost=Cost.ATTACK, tasks=("classification", "regression", "language"))
@dataclass(frozen=True)
class Interpolation:
    """Walk in a straight line from every model's weights to the original's.

    w(a) = (1 - a) w + a w_original. A model that never left the original's basin gains the knowledge back
    evenly on the way; between independently trained models lies a barrier where both fail (Frankle et
    al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671). A small
    relative distance and no barrier predict easy relearning; by themselves they show that a model
    descends from the original, not that it still knows.

    Attributes:
        points: Number of equal steps from a = 0 to a = 1.
        limit: At most this many records of forget and retain are measured at each point.
    """

    points: int = 10
    limit: int = 500

    def __post_init__(self) -> None:
        check_range("points", self.points, 2, 1000)
        check_range("limit", self.limit, 1, float("inf"))

    def run(self, evidence: Evidence) -> Outcome:
        """Relative distance, barrier, forget accuracy along the way, and the curves."""
        original = evidence.original
        if original is None:
            return not_run("interpolation", "distance", "the original model is not at hand")
        states = _states(evidence, original)
        if isinstance(states, str):
            return not_run("interpolation", "distance", states)
        forget = Watched.part(evidence, "forget", self.limit)
        retain = Watched.part(evidence, "retain", self.limit) if evidence.has("retain") else None
        walk = np.linspace(0, 1, self.points + 1)

        def walked(role: str) -> tuple[NDArray[np.bool_], NDArray[np.float64] | None]:
            models = [mixed(original, states[role], float(a)) for a in walk]
            right = np.stack([forget.right(model) for model in models])
            return right, None if retain is None else np.array([retain.right(m).mean() for m in models])

        both = {role: evidence.remember(self, partial(walked, role), role) for role in states}
        right = {role: values for role, (values, _) in both.items()}
        rates = {role: values for role, (_, values) in both.items() if values is not None}
        rows: list[Row] = [
            {
                "model": role,
                "a": float(a),
                "forget_accuracy": float(right[role][index].mean()),
                "retain_accuracy": float(rates[role][index]) if role in rates else None,
            }
            for role in states
            for index, a in enumerate(walk)
        ]
        return Outcome(tuple(self._findings(evidence, states, right, rates)), {"interpolation": tuple(rows)})

    def _findings(
        self,
        evidence: Evidence,
        states: Mapping[str, State],
        right: Mapping[str, NDArray[np.bool_]],
        rates: Mapping[str, NDArray[np.float64]],
    ) -> list[Finding]:
        distances = {role: distance(state, states[ORIGINAL]) for role, state in states.items()}
        inner = {role: values[1:-1].astype(np.float64).mean(0) for role, values in right.items()}
        note = f"mean accuracy over {self.points - 1} points strictly between the model and the original"
        findings = [
            judged(
                measured(evidence, "interpolation", "distance", distances, "|w - w_original| / |w_original|")
            ),
            known(evidence, "interpolation", "forget_between", inner, note),
        ]
        if rates:
            hills = {role: barrier(values) for role, values in rates.items()}
            note = "largest drop of retain accuracy below the straight line between the ends"
            findings.append(judged(measured(evidence, "interpolation", "barrier", hills, note)))
        return findings


def barrier(accuracy: NDArray[np.float64]) -> float:
    """Largest drop below the straight line between the first and the last value, at least 0.

    Example:
        >>> barrier(np.array([1.0, 0.2, 0.8]))
        0.7
    """
    line = np.linspace(accuracy[0], accuracy[-1], len(accuracy))
    return max(0.0, float((line - accuracy).max()))


@torch.no_grad()
def mixed(original: nn.Module, state: State, a: float) -> nn.Module:
    """The network (1 - a) state + a original; tensors of whole numbers are taken from the nearer end."""
    network = copy.deepcopy(original)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_((1 - a) * state[name].to(tensor) + a * tensor)
        elif a < 0.5:
            tensor.copy_(state[name])
    return network


def _states(evidence: Evidence, original: nn.Module) -> dict[str, State] | str:
    """The state of every model under the original's names, or why there is none."""
    states: dict[str, State] = {}
    for role in evidence.roles:
        bare = bare_network(evidence.model(role), original)
        if bare is None or not bare.complete:
            return f"the {role} model does not hold weights of the original's names and shapes"
        states[role] = evidence.runtime.place(bare.network).state_dict()
    return states
