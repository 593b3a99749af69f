"""Forget and retain gradients of one optimizer step, kept apart: what rules that project have in common.

Both are accumulated in single precision over the microbatches of a step, each by a backward pass of its own
(never as a difference of sums), and averaged over processes once the step is complete. Everything is flat: one
vector over all parameters that move, so that a projection has one coefficient for all of them.

Gradients are taken with `torch.autograd.grad`, which a DDP wrapper does not notice: it neither averages half of
them nor waits for the other half. For that reason reentrant activation checkpointing cannot be used.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, MissingNeed, ModelMismatch
from palimpsest.core.runtime import Runtime
from palimpsest.forget.projection import adam_metric
from palimpsest.forget.rules import clipped

Vector = Float[Tensor, " dim"]
ADAPTIVE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam)
"""Optimizers with a second moment that the metric is taken from."""


@dataclass(frozen=True)
class Pair:
    """Both gradients of one complete step.

    Attributes:
        forget: Of gamma times the forget loss as it is minimised.
        retain: Of the retain loss, without its weight.
        alpha: That weight.
        row: Losses, for the history.
    """

    forget: Vector
    retain: Vector
    alpha: float
    row: dict[str, float]

    @property
    def finite(self) -> bool:
        """Whether neither holds NaN or Inf."""
        return bool(torch.isfinite(self.forget).all() and torch.isfinite(self.retain).all())


class GradientPair:
    """Accumulates the two gradients, and steps with what a rule made of them.

    Args:
        parameters: That move; all of them belong to the optimizer.
        optimizer: That steps.
        clip: Largest norm of the gradient it is given; None does not clip.
        runtime: Knows the processes; without one there is a single process.

    Raises:
        InvalidHyperparameter: If there are no parameters, some are not the optimizer's, or the optimizer is
            of a kind whose step cannot be foreseen (AMSGrad, maximising, loss scaling, DeepSpeed).
        ModelMismatch: If parameters are sharded: an inner product needs whole gradients.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        runtime: Runtime | None = None,
    ):
        self.parameters, self.optimizer, self.clip = list(parameters), optimizer, clip
        self.runtime = runtime or Runtime()
        self.plain: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        check_whole(self.parameters)
        check_optimizer(self.parameters, optimizer)
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self._begin()

    def _begin(self) -> None:
        self._forget = torch.zeros(sum(self.sizes), device=self.parameters[0].device)
        self._retain = torch.zeros_like(self._forget)
        self._alpha: float | None = None
        self._row = {"forget_loss": 0.0, "retain_loss": 0.0, "protected_loss": 0.0}

    @property
    def slices(self) -> list[slice]:
        """Where every parameter lies in a flat vector."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def add(self, forget: Tensor, retain: Tensor | None, alpha: float = 1.0) -> None:
        """Add the two gradients of a microbatch.

        Raises:
            MissingNeed: If there is no retain loss: there is nothing to protect then.
            InvalidHyperparameter: If alpha changes within a step.
        """
        if retain is None:
            raise MissingNeed("The rule protects a retain loss at every step: give it retained records.")
        if self._alpha not in (None, alpha):
            raise InvalidHyperparameter(
                f"alpha must stay the same within an optimizer step, not go from {self._alpha} to {alpha}."
            )
        self._alpha = alpha
        self._accumulate(self._forget, forget, keep_graph=True)
        self._accumulate(self._retain, retain)
        self._row["forget_loss"] += float(forget.detach())
        self._row["protected_loss"] += float(retain.detach())
        self._row["retain_loss"] += alpha * float(retain.detach())

    def _accumulate(self, total: Vector, loss: Tensor, keep_graph: bool = False) -> None:
        found = torch.autograd.grad(
            loss, self.parameters, retain_graph=keep_graph, allow_unused=True, materialize_grads=True
        )
        for part, gradient in zip(self.slices, found, strict=True):
            total[part] += gradient.detach().flatten().to(total)

    def take(self) -> Pair:
        """Both gradients of the whole step, over all microbatches and processes; begins the next step.

        Raises:
            MissingNeed: If nothing was added.
        """
        if self._alpha is None:
            raise MissingNeed("No losses were given in this optimizer step.")
        pair = Pair(self.runtime.mean(self._forget), self.runtime.mean(self._retain), self._alpha, self._row)
        if not pair.retain.any():
            warnings.warn("The retain gradient is zero: this step protects nothing new.", stacklevel=3)
        self._begin()
        return pair

    def step(self, gradient: Vector) -> float:
        """One step of the optimizer with this gradient; gives its norm before clipping."""
        for parameter, part in zip(self.parameters, self.slices, strict=True):
            parameter.grad = gradient[part].view_as(parameter).to(parameter)
        norm = clipped(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def skip(self, pair: Pair) -> dict[str, float]:
        """No step; says so, in the history as well."""
        warnings.warn("A gradient holds NaN or Inf: the optimizer step is left out.", stacklevel=3)
        self.optimizer.zero_grad(set_to_none=True)
        return {**pair.row, "skipped": 1.0, "projections": 0.0}

    def position(self) -> Vector:
        """A copy of the parameters, flat, in single precision."""
        home = self.parameters[0].device
        return torch.cat([p.detach().flatten().to(home, torch.float32) for p in self.parameters]).clone()

    @torch.no_grad()
    def move(self, position: Vector) -> None:
        """Set the parameters, in place: the optimizer's state stays as it is."""
        for parameter, part in zip(self.parameters, self.slices, strict=True):
            parameter.copy_(position[part].view_as(parameter))

    def metric(self) -> Vector | None:
        """Adam's denominator for every parameter as its state stands, flat; None before the first step.

        Raises:
            ModelMismatch: If only some of the parameters have a second moment.
        """
        groups = {id(p): group for group in self.plain.param_groups for p in group["params"]}
        states = [self.plain.state.get(parameter, {}) for parameter in self.parameters]
        known = ["exp_avg_sq" in state for state in states]
        if not any(known):
            return None
        if not all(known):
            raise ModelMismatch(
                f"The optimizer has a second moment for {sum(known)} of {len(known)} parameters: their lengths do "
                "not compare. Begin with a fresh optimizer."
            )
        parts: list[Tensor] = []
        for parameter, state in zip(self.parameters, states, strict=True):
            group = groups[id(parameter)]
            moment = state["exp_avg_sq"].flatten().to(self._forget)
            parts.append(adam_metric(moment, int(state["step"]), group["betas"][1], group["eps"]))
        return torch.cat(parts)


def check_whole(parameters: Sequence[nn.Parameter]) -> None:
    """Check that there are parameters, and that this process holds all of each.

    Raises:
        InvalidHyperparameter: If there are none.
        ModelMismatch: If one is sharded.
    """
    if not parameters:
        raise InvalidHyperparameter("No parameters are selected: there is nothing to project.")
    if any(hasattr(p, "device_mesh") or getattr(p, "_is_flat_param", False) for p in parameters):
        raise ModelMismatch(
            "The parameters are sharded (FSDP, tensor parallel): projections need whole gradients. Use DDP, or rule='sum'."
        )


def check_optimizer(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Check that a step can be projected under this optimizer.

    Raises:
        InvalidHyperparameter: If it lacks parameters, scales losses, maximises, or is AMSGrad or DeepSpeed's.
    """
    plain: Any = getattr(optimizer, "optimizer", optimizer)
    if getattr(optimizer, "scaler", None) is not None or any(p.dtype == torch.float16 for p in parameters):
        raise InvalidHyperparameter(
            "float16 with loss scaling cannot be projected: its gradients are scaled. Use bfloat16 or float32."
        )
    if type(plain).__module__.startswith("deepspeed"):
        raise InvalidHyperparameter(
            "DeepSpeed's optimizers hide gradients and steps: use DDP, or rule='sum'."
        )
    held = {id(p) for group in plain.param_groups for p in group["params"]}
    missing = sum(id(parameter) not in held for parameter in parameters)
    if missing:
        raise InvalidHyperparameter(
            f"{missing} of {len(parameters)} selected parameters do not belong to the optimizer."
        )
    for setting in ("amsgrad", "maximize"):
        if any(group.get(setting) for group in plain.param_groups):
            raise InvalidHyperparameter(
                f"An optimizer with {setting}=True cannot be projected: set it to False."
            )


def second_moment_used(metric: str, optimizer: torch.optim.Optimizer) -> bool:
    """Whether lengths are measured by the optimizer's second moment: as "auto" finds it, or as asked for.

    Raises:
        InvalidHyperparameter: If "adam" is asked for and the optimizer has none, or its eps is 0.
    """
    plain = getattr(optimizer, "optimizer", optimizer)
    adaptive = isinstance(plain, ADAPTIVE)
    if metric == "adam" and not adaptive:
        raise InvalidHyperparameter(
            f"metric='adam' needs an optimizer with a second moment (adam, adamw), not {type(plain).__name__}: "
            "use metric='identity' or 'auto'."
        )
    if metric == "identity" or not adaptive:
        return False
    if any(group["eps"] <= 0 for group in plain.param_groups):
        raise InvalidHyperparameter(
            "The metric of Adam needs eps above 0: entries without gradient divide by it."
        )
    return True
