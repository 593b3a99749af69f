"""RMU: steer hidden states on forget text to a fixed random direction, hold them on retained text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter, UnknownName
from palimpsest.core.modes import evaluating
from palimpsest.core.needs import Need
from palimpsest.core.records import Batch
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.forget.gradient import GradientMethod
from palimpsest.forget.objective import Context, Losses, Step, Term
from palimpsest.forget.scopes import Opened, ScopeLike, only, scope
from palimpsest.forget.steering import StateReduction, draw_control_vector, state_distance
from palimpsest.parts.decoder import Stack, parts_of, stack_of
from palimpsest.parts.parameters import matching
from palimpsest.parts.tokens import IGNORED
from palimpsest.tasks.language import Language

Counted = Literal["all", "answer", "padded"]


@scope("down-projections")
@dataclass(frozen=True)
class DownProjections:
    """The last projection of the MLP in a few neighbouring blocks: what RMU trains.

    Attributes:
        last: Number of the last of the blocks; the middle one by default.
        blocks: How many blocks, `last` and those before it.
    """

    last: int | None = None
    blocks: int = 3

    def __post_init__(self) -> None:
        check_range("blocks", self.blocks, 1, math.inf)

    def open(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Opened:
        """Everything else frozen; biases of the projections too."""
        last = middle(stack_of(model)) if self.last is None else self.last
        stack_of(model).block(last)
        layers = range(max(0, last - self.blocks + 1), last + 1)
        names = list(matching(model, *(f"{part}.weight" for part in parts_of(model, layers, "down"))))
        return only(model, names)


@unlearner(
    "rmu",
    intention="suppression",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA},
    tasks=("language",),
    paper=Paper(
        "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", "ICML 2024", "2403.03218"
    ),
    search={
        "steering": Span(1.0, 8.0, log=True),
        "alpha": Span(1.0, 100.0, log=True),
        "lr": Span(1e-4, 3e-3, log=True),
        "epochs": Span(3, 15, integer=True),
    },
)
@dataclass(frozen=True, kw_only=True)
class RMU(GradientMethod):
    """Misdirect the representation of forget text at one block; only three matrices move.

    The hidden states that leave block `layer` are drawn towards steering * u / |u|, with u from U(0, 1) in every
    coordinate, drawn once (per topic) and all positive; on retained records they are held where the
    original has them. What is forgotten can be found again one block below, and comes back by fine-tuning
    on a little of it, as the authors say.

    The defaults are those of WMDP's code and of its Zephyr-7B run (steering 6.5, alpha 1200), with the middle
    block in the place of block 7. Open-unlearning's variant is steering=2, alpha=1, layer=7, tokens="answer",
    scope="all". Topics come mixed in every batch, each row drawn to the vector of its own topic; the published
    code alternates batches of one topic.

    Attributes:
        steering: Length of the control vector, or a mapping of topic and length. In absolute terms, or in
            multiples of the usual norm of the states.
        relative: Whether `steering` counts the mean norm of the original's states on the forget records.
        alpha: Weight of the retain term.
        gamma: Weight of the forget term.
        layer: Number of the block; the middle one by default.
        tokens: Which positions count: "all" that are not padding, those of the "answer" (open-unlearning,
            at the tokens themselves, not where they are predicted), or "padded": padding too, as WMDP's code.
        reduction: "sequence": mean over the positions of a row, then over rows. "released":
            open-unlearning's division of [batch] by [batch, 1]; the same only for rows of equal length.
        topic: Column that names the topic of a forget record; one control vector is drawn for each.
    """

    scope: ScopeLike = "down-projections"
    lr: float = 5e-5
    schedule: Literal["linear", "constant"] = "constant"
    warmup: float = 0.0
    steering: float | Mapping[str, float] = 6.5
    relative: bool = False
    alpha: float = 1200.0
    gamma: float = 1.0
    layer: int | None = None
    tokens: Counted = "all"
    reduction: StateReduction = "sequence"
    topic: str | None = None

    def __post_init__(self) -> None:
        if self.scope == "down-projections":
            object.__setattr__(self, "scope", DownProjections(self.layer))
        super().__post_init__()
        lengths = self.steering if isinstance(self.steering, Mapping) else {"": self.steering}
        for length in lengths.values():
            check_range("steering", length, 0, math.inf, open_low=True)
        if isinstance(self.steering, Mapping) and self.topic is None:
            raise InvalidHyperparameter(
                "A steering length per topic needs topic=, the column that names topics."
            )
        check_range("alpha", self.alpha, 0, math.inf)
        check_range("gamma", self.gamma, 0, math.inf)
        if self.tokens not in ("all", "answer", "padded"):
            raise InvalidHyperparameter(f"tokens is 'all', 'answer' or 'padded', not {self.tokens!r}.")
        if self.reduction not in ("sequence", "released"):
            raise InvalidHyperparameter(f"reduction is 'sequence' or 'released', not {self.reduction!r}.")

    @property
    def needs_original(self) -> bool:
        """Always: retained states are held where it has them."""
        return True

    @property
    def needs_retain(self) -> bool:
        """Always."""
        return True

    def begin(self, context: Context) -> Callable[[Step], Losses]:
        """Draw the control vectors, then the two terms of a step."""
        number = middle(stack_of(context.reference)) if self.layer is None else self.layer
        stack_of(context.reference).block(number)
        targets = self.targets(context, number)

        def distance(states: Tensor, target: Tensor, batch: Batch) -> Term:
            return Term(state_distance(states, target, counted(batch, self.tokens), self.reduction))

        def losses(step: Step) -> Losses:
            forget, retain = step.forget, step.retain
            if retain is None:
                raise InvalidHyperparameter("RMU was given no retained records.")
            gone = distance(
                block_states(context.model, context.task, forget, number), targets(forget), forget
            )
            with torch.no_grad():
                before = block_states(context.reference, context.task, retain, number)
            kept = distance(block_states(context.model, context.task, retain, number), before, retain)
            return Losses(gone, kept, self.gamma, self.alpha)

        return losses

    def targets(self, context: Context, number: int) -> Callable[[Batch], Tensor]:
        """Where the states of every row of a batch are steered, [batch, 1, dim]."""
        records, runtime = context.split.forget, context.runtime
        names = [""] * len(records)
        if self.topic is not None:
            names = [str(name) for name in records.column(self.topic)]
        topic_of = dict(zip(records.ids, names, strict=True))
        topics = sorted(set(names))
        if isinstance(self.steering, Mapping):
            for name in [*topics, *self.steering]:
                if name not in topics or name not in self.steering:
                    raise UnknownName("topic", name, topics if name not in topics else self.steering)
        usual, dim = usual_norm(context, number)
        vectors = {
            name: draw_control_vector(
                dim,
                (self.steering[name] if isinstance(self.steering, Mapping) else self.steering)
                * (usual if self.relative else 1.0),
                runtime.generator("control vector", name),
                runtime.torch_device,
            )
            for name in topics
        }
        return lambda batch: torch.stack([vectors[topic_of[name]] for name in batch["id"]])[:, None]


def middle(stack: Stack) -> int:
    """Number of the middle block; of two, the earlier."""
    return (len(stack) - 1) // 2


def block_states(
    model: nn.Module, task: Language, batch: Batch, number: int
) -> Float[Tensor, "batch tokens dim"]:
    """Hidden states that leave a block, with their graph."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = stack_of(model).blocks[number].register_forward_hook(keep)
    try:
        task.logits(model, batch)
    finally:
        handle.remove()
    return kept[-1]


def counted(batch: Batch, tokens: Counted) -> Bool[Tensor, "batch tokens"]:
    """The positions that count."""
    if tokens == "answer":
        return batch["labels"] != IGNORED
    mask = batch["attention_mask"].bool()
    return mask if tokens == "all" else torch.ones_like(mask)


@torch.no_grad()
def usual_norm(context: Context, number: int) -> tuple[float, int]:
    """Mean norm of the original's states on the forget records at a block, and their size."""
    total, count, dim = 0.0, 0, 0
    with evaluating(context.reference):
        for batch in context.runtime.batches(context.split.forget, context.task, 32):
            states, mask = (
                block_states(context.reference, context.task, batch, number),
                batch["attention_mask"].bool(),
            )
            total += float(states.norm(dim=-1)[mask].sum())
            count, dim = count + int(mask.sum()), states.shape[-1]
    return total / max(count, 1), dim
