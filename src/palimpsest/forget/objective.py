"""What an objective of gradient-based unlearning says, and what it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.core.errors import MissingNeed
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.parts.tokens import joint_mean
from palimpsest.tasks.language import Language

Side = Literal["forget", "retain"]
Per = Literal["row", "token"]


@dataclass(frozen=True)
class Term:
    """A mean over the rows, or over the scored tokens, of a batch; to be minimised.

    Attributes:
        value: With its graph.
        per: What it is a mean over, so that microbatches and processes are weighed rightly.
    """

    value: Float[Tensor, ""]
    per: Per = "row"


@dataclass(frozen=True)
class Losses:
    """What an objective says of one batch.

    Attributes:
        forget: Its forget term, with the sign of the method (ascent is minus the loss).
        retain: Its retain term, or None.
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
    """

    forget: Term
    retain: Term | None = None
    gamma: float = 1.0
    alpha: float = 1.0


@dataclass(frozen=True)
class Step:
    """What the loop hands to an objective.

    Attributes:
        forget: Batch of forget records.
        retain: As many retained records, drawn with replacement; None where the method needs none.
        epoch: From 0.
        number: Optimizer steps before this one.
        shares: Share of this batch in its optimizer step over all microbatches and processes, times the
            number of processes (whose gradients are averaged), by side and what is counted.
    """

    forget: Batch
    retain: Batch | None
    epoch: int
    number: int
    shares: dict[tuple[Side, Per], float]


@dataclass
class Context:
    """What an objective may look at when it begins.

    Attributes:
        model: That is unlearned; equal to the original until the first step.
        split: The request.
        task: Language.
        runtime: Seed and device.
        steps: Optimizer steps of the whole run.
        epochs: Passes over the forget records.
        original: A frozen copy of the model, where the objective asked for one.
        after_epoch: Set by an objective that looks at the model after every epoch: told whether it was the
            last, it says whether training stops.
        report: Set by an objective that has something to tell; found at the unlearned model.
    """

    model: nn.Module
    split: ForgetSplit
    task: Language
    runtime: Runtime
    steps: int
    epochs: int
    original: nn.Module | None = None
    after_epoch: Callable[[bool], bool] | None = None
    report: object | None = None

    @property
    def reference(self) -> nn.Module:
        """The frozen copy.

        Raises:
            MissingNeed: If the objective did not ask for one.
        """
        if self.original is None:
            raise MissingNeed("The objective looks at a reference model that it did not ask for.")
        return self.original


def token_term(context: Context, batch: Batch) -> Term:
    """Token-mean loss of a batch."""
    return Term(joint_mean(context.task.token_losses(context.model, batch), batch["labels"]), "token")


class Objective(Protocol):
    """What is minimised.

    It may also have `rows` (the records that the loop goes over in the place of the forget records, made
    before anything else) and `collate` (how they become a batch), as `GradientMethod` has.
    """

    @property
    def needs_original(self) -> bool:
        """Whether a frozen copy of the model is kept beside it.

        Objectives that look at likelihoods of sequences compute them once, at the beginning, and need none.
        """
        ...

    @property
    def needs_retain(self) -> bool:
        """Whether every step is given retained records."""
        ...

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """Prepare (reference values, control vectors, dual variables); gives the losses of a step."""
        ...
