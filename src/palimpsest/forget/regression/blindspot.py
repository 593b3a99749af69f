"""Blindspot unlearning: on the forget records, imitate a network that has never seen them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InvalidHyperparameter, InvalidSplit, MissingNeed, ModelMismatch
from palimpsest.core.needs import Need
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Span
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import Paper, check_range, unlearner
from palimpsest.parts.activations import head_name, module_of, weight_layers
from palimpsest.parts.pairing import mixed
from palimpsest.parts.parameters import trainable
from palimpsest.parts.reinitialise import reinitialised
from palimpsest.parts.training import TrainingRecipe, fit, step
from palimpsest.tasks.regression import Regression

Activations = Sequence[Float[Tensor, "batch ..."]]
Outputs = Float[Tensor, "batch outputs"]
Distance = Callable[[Tensor, Tensor], Float[Tensor, " batch"]]
EPSILON = 1e-12
"""An attention map is divided by its length, or by this if that is smaller."""


@unlearner(
    "blindspot",
    needs={Need.MODEL, Need.FORGET_DATA, Need.RETAIN_DATA, Need.RETAIN_LABELS},
    tasks=("regression",),
    paper=Paper("Deep Regression Unlearning", "ICML 2023", "2210.08196"),
    search={"lr": Span(1e-4, 1e-2, log=True), "epochs": Span(1, 5, integer=True)},
)
@dataclass(frozen=True)
class Blindspot:
    """Forget by imitating a briefly trained network that has never seen the forget records.

    A fresh network of the same architecture, the blindspot model B, is trained for a few epochs on the
    retained records alone. Then a copy M of the original runs over all training records: on the forget rows
    of a batch it is drawn to B's outputs and attention maps, on the others to their true targets,

    loss = q (mean |M(x) - B(x)| + at_beta sum over layers of attention difference) + (1 - q) mean |M(x) - y|,

    with q the share of forget rows in the batch; a batch of one kind has its part only. The targets of the
    forget records are not used. Use it where a model answers in numbers, so that no wrong class can be
    taught. B must be weak: trained for as long as the original it would be the retrained model itself, and
    nothing would have been saved.

    The paper takes absolute errors for ages and squared ones for similarity scores: both terms use the
    task's own loss (of quantiles, absolute differences between outputs). at_beta weighs maps against errors
    in the units of the model's outputs (`Regression.scale`).

    Deviations: an activation [batch, units] (fully connected layers) has no axis to average over; in the
    released code its map collapses to a constant 1 and gives no gradient. Here the squared activations
    themselves, normalised, are its map; `as_released` brings the collapse back. B is in evaluation mode by
    decision; in the released code it is by accident. The scheduler that the released code makes and never
    steps is left out, and so is its augmentation: what the records give is used. A last batch of a single
    record is left out, because batch norm has no statistics of it.

    Attributes:
        at_beta: Weight of the attention difference; 0 switches it off.
        lr: Learning rate of Adam for unlearning.
        epochs: Passes over all training records; 1 (AgeDB) and 5 (STS-B) are published. The last weights
            are kept.
        batch_size: Records per step, of both kinds as they come; 16 or more, so that both occur.
        blindspot_epochs: Passes of B over the retained records: a few, 2 to 10 % of a full training.
        blindspot_lr: Learning rate of Adam for B.
        layers: Modules whose outputs give attention maps; by default every layer with weights but the head.
            The published code takes every convolution block: name the blocks to compare after normalisation
            and rectification.
        as_released: Let maps of [batch, units] collapse.
    """

    at_beta: float = 50.0
    lr: float = 1e-3
    epochs: int = 1
    batch_size: int = 256
    blindspot_epochs: int = 2
    blindspot_lr: float = 0.01
    layers: tuple[str, ...] | None = None
    as_released: bool = False

    def __post_init__(self) -> None:
        check_range("at_beta", self.at_beta, 0, 1e9)
        if self.epochs < 1 or self.blindspot_epochs < 1 or self.batch_size < 2:
            raise InvalidHyperparameter(
                "epochs and blindspot_epochs must be at least 1, batch_size at least 2, not "
                f"{self.epochs}, {self.blindspot_epochs} and {self.batch_size}."
            )
        _ = self.recipe, self.blindspot_recipe

    @property
    def recipe(self) -> TrainingRecipe:
        """The optimizer of unlearning."""
        return TrainingRecipe(self.epochs, self.lr, self.batch_size)

    @property
    def blindspot_recipe(self) -> TrainingRecipe:
        """How B is trained."""
        return TrainingRecipe(self.blindspot_epochs, self.blindspot_lr, self.batch_size)

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Regression, runtime: Runtime) -> nn.Module:
        """A copy of the model that answers the forget records as B does.

        Raises:
            MissingNeed: If the retained records are not at hand.
            ModelMismatch: If at_beta is above 0 and the model shows no activations.
            NonFiniteLoss: If training diverges.
        """
        if split.retain is None:
            raise MissingNeed("Blindspot unlearning needs the retained records.")
        student = runtime.place(copy.deepcopy(model))
        trainable(student)
        layers = self._watched(student)
        blindspot = fit(reinitialised(model, runtime), split.retain, task, runtime, self.blindspot_recipe)
        blindspot.requires_grad_(False).eval()
        optimizer = self.recipe.build_optimizer(student)
        order = runtime.generator("blindspot order")
        student.train()
        with (
            runtime.seeded("blindspot"),
            watching(student, layers) as mine,
            watching(blindspot, layers) as theirs,
        ):
            for _ in runtime.track(range(self.epochs), "blindspot"):
                for batch, gone in mixed(split.train, split.forget, task, runtime, self.batch_size, order):
                    with torch.no_grad():
                        taught = task.logits(blindspot, batch)
                    given = task.logits(student, batch)
                    losses = task.loss_of_logits(given, batch)
                    loss = batch_loss(
                        given, taught, self._mapped(mine), self._mapped(theirs), losses, gone, self.at_beta,
                        task.distance,
                    )  # fmt: skip
                    step(student, optimizer, loss, batch)
        return student.eval()

    def _watched(self, model: nn.Module) -> list[str]:
        """Layers whose maps are compared.

        Raises:
            UnknownName: If one that was named does not exist.
            ModelMismatch: If there are none.
        """
        if not self.at_beta:
            return []
        if self.layers is not None:
            for name in self.layers:
                module_of(model, name)
        found = list(self.layers or [])
        if self.layers is None and weight_layers(model):
            head = head_name(model)
            found = [name for name in weight_layers(model) if name != head]
        if not found:
            raise ModelMismatch(
                "The model has no layer with weights before its head, so it shows no activations to compare: set "
                "at_beta=0, or name modules with layers=(...)."
            )
        return found

    def _mapped(self, seen: dict[str, Tensor]) -> list[Tensor]:
        """Activations in order; [batch, units] gets an axis to average over, unless it is to collapse."""
        return [a.unsqueeze(1) if a.dim() == 2 and not self.as_released else a for a in seen.values()]


def attention_map(activation: Float[Tensor, "batch axis ..."]) -> Float[Tensor, "batch positions"]:
    """Where an activation is strong: its square, averaged over axis 1, flattened, of length 1 per record.

    Of [batch, channels, height, width] a map over pixels, of [batch, time, dim] one over features. Of
    [batch, units] nothing is left but a constant 1: see `Blindspot`.
    """
    mean = activation.square().mean(1)
    return F.normalize(mean.reshape(len(mean), -1), dim=1, eps=EPSILON)


def attention_difference(
    one: Float[Tensor, "batch axis ..."], other: Float[Tensor, "batch axis ..."]
) -> Float[Tensor, ""]:
    """Mean squared difference of two attention maps, over records and positions.

    Raises:
        ModelMismatch: If the shapes differ.
    """
    if one.shape != other.shape:
        raise ModelMismatch(
            f"Activations of shape {tuple(one.shape)} and {tuple(other.shape)} cannot be compared."
        )
    return (attention_map(one) - attention_map(other)).square().mean()


def forget_loss(
    student: Outputs,
    blindspot: Outputs,
    student_activations: Activations,
    blindspot_activations: Activations,
    at_beta: float,
    distance: Distance,
) -> Float[Tensor, ""]:
    """Mean distance of the outputs plus `at_beta` times the sum over layers of the attention difference.

    Args:
        student: Outputs of the model that forgets.
        blindspot: Outputs of B on the same records.
        student_activations: By layer.
        blindspot_activations: By layer, in the same order.
        at_beta: Weight; at 0 activations are not looked at.
        distance: Of two outputs, per record.

    Raises:
        ModelMismatch: If lists or shapes of activations differ, or there are none and at_beta is above 0.
    """
    loss = distance(student, blindspot).mean()
    if not at_beta:
        return loss
    if not student_activations or len(student_activations) != len(blindspot_activations):
        raise ModelMismatch(
            f"Attention is compared layer by layer: the model shows {len(student_activations)} activations, the "
            f"blindspot model {len(blindspot_activations)}."
        )
    pairs = zip(student_activations, blindspot_activations, strict=True)
    return loss + at_beta * torch.stack([attention_difference(a, b) for a, b in pairs]).sum()


def batch_loss(
    student: Outputs,
    blindspot: Outputs,
    student_activations: Activations,
    blindspot_activations: Activations,
    losses: Float[Tensor, " batch"],
    forgotten: Bool[Tensor, " batch"],
    at_beta: float,
    distance: Distance,
) -> Float[Tensor, ""]:
    """Loss of a batch of both kinds: q times the forget loss of its forget rows, 1 - q times the others' mean.

    Args:
        student: Outputs of the model that forgets, for all rows.
        blindspot: Outputs of B.
        student_activations: By layer, for all rows.
        blindspot_activations: By layer, in the same order.
        losses: Of the student against the true targets; those of forget rows are not used.
        forgotten: Which rows are to be forgotten.
        at_beta: Weight of the attention difference.
        distance: Of two outputs, per record.

    Raises:
        InvalidSplit: If `forgotten` is not one truth value (or 0 and 1) per row.
        ModelMismatch: If activations cannot be compared.
    """
    gone = as_mask(forgotten, len(student))
    share = float(gone.float().mean())
    parts: list[Tensor] = []
    if gone.any():
        mine, theirs = ([a[gone] for a in layers] for layers in (student_activations, blindspot_activations))
        parts.append(share * forget_loss(student[gone], blindspot[gone], mine, theirs, at_beta, distance))
    if not gone.all():
        parts.append((1 - share) * losses[~gone].mean())
    return torch.stack(parts).sum()


def as_mask(flags: Tensor, length: int) -> Bool[Tensor, " batch"]:
    """Flags of 0 and 1 as a mask.

    Raises:
        InvalidSplit: If there is another value, or another number of them.
    """
    if flags.shape != (length,):
        raise InvalidSplit(
            f"There must be one forget flag per record: {tuple(flags.shape)} for {length} records."
        )
    if flags.dtype != torch.bool and not torch.isin(flags, torch.tensor([0, 1], device=flags.device)).all():
        raise InvalidSplit(f"Forget flags must be 0 or 1, not {flags.unique().tolist()[:5]}.")
    return flags.bool()


@contextmanager
def watching(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of named modules at the last forward pass, with their graph; hooks are removed at exit."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or first.dim() < 2:
            raise ModelMismatch(f"The layer '{name}' gives no activation [batch, ...]: name others.")
        seen[name] = first

    handles = [module_of(model, name).register_forward_hook(partial(keep, name)) for name in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
