"""What becomes of the gradients of forget and retain losses in one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from palimpsest.core.registry import Registry
from palimpsest.core.runtime import Runtime
from palimpsest.core.unlearner import named


class Update(Protocol):
    """One optimizer step, in the making."""

    def add(self, forget: Tensor, retain: Tensor | None, alpha: float = 1.0) -> None:
        """Take the losses of one microbatch, weighed by their share in the step.

        Args:
            forget: With its weight gamma.
            retain: Without its weight, so that it can be protected even where alpha is 0.
            alpha: Weight of the retain loss in what is minimised.
        """
        ...

    def finish(self, retained: Callable[[], float] | None = None) -> dict[str, float]:
        """Step, and tell what was seen: losses and what the rule measured.

        Args:
            retained: Measures the loss of this step's retained records with the parameters as they stand; for
                rules that try out steps.
        """
        ...


class Rule(Protocol):
    """A rule, with its settings as fields of a frozen dataclass."""

    needs_retain: ClassVar[bool]

    @property
    def alpha(self) -> float:
        """Weight of the token-mean loss that a rule which needs one gets where the objective has no retain term.

        At 0 it is protected, and not minimised.
        """
        ...

    def begin(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        runtime: Runtime | None = None,
    ) -> Update:
        """The updates of one run; state (older gradients) lives in what is returned."""
        ...


RuleLike = str | Mapping[str, Any] | Rule
RULES: Registry[type[Rule]] = Registry("rule", "palimpsest.forget", "palimpsest.rules")
"""Rules by name. Third parties register through the entry-point group `palimpsest.rules`."""

C = TypeVar("C")


def rule(name: str) -> Callable[[type[C]], type[C]]:
    """Class decorator that makes a dataclass a rule called `name`."""

    def decorate(cls: type[C]) -> type[C]:
        RULES.register(name)(cast(type[Rule], cls))
        return cls

    return decorate


def rule_of(given: RuleLike) -> Rule:
    """A rule from its name, from a mapping of "name" and settings, or as it is.

    Raises:
        UnknownName: For a rule or a setting that does not exist; suggests the nearest.
        InvalidHyperparameter: For a mapping without a name.
    """
    return named("rule", RULES, given)


@rule("sum")
@dataclass(frozen=True)
class Sum:
    """Descend on the sum of both losses: what every published loop does."""

    needs_retain: ClassVar[bool] = False
    alpha: ClassVar[float] = 0.0

    def begin(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        runtime: Runtime | None = None,
    ) -> SumUpdate:
        """Plain accumulation."""
        return SumUpdate(parameters, optimizer, clip)


class SumUpdate:
    """Accumulates the gradient of the sum."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, clip: float | None
    ):
        self.parameters, self.optimizer, self.clip = list(parameters), optimizer, clip
        self.seen = {"forget_loss": 0.0, "retain_loss": 0.0}

    def add(self, forget: Tensor, retain: Tensor | None, alpha: float = 1.0) -> None:
        """Add the gradient of a microbatch."""
        retain = None if retain is None else alpha * retain
        total = forget if retain is None else forget + retain
        total.backward()
        self.seen["forget_loss"] += float(forget.detach())
        self.seen["retain_loss"] += 0.0 if retain is None else float(retain.detach())

    def finish(self, retained: Callable[[], float] | None = None) -> dict[str, float]:
        """Clip and step."""
        row = {**self.seen, "norm": clipped(self.parameters, self.clip)}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seen = dict.fromkeys(self.seen, 0.0)
        return row


def clipped(parameters: Sequence[nn.Parameter], clip: float | None) -> float:
    """Norm of all gradients together before they are cut to `clip` (None leaves them)."""
    return float(nn.utils.clip_grad_norm_(parameters, float("inf") if clip is None else clip))
