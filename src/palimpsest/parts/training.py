"""Ordinary training, and the recipe that a retraining repeats."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFiniteLoss
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime
from palimpsest.core.task import Task
from palimpsest.parts.parameters import trainable
from palimpsest.parts.reinitialise import check_finite

RECIPE_ATTRIBUTE = "palimpsest_recipe"


@dataclass(frozen=True)
class TrainingRecipe:
    """How a model is trained; `retrain` repeats it without the forget records.

    Attributes:
        epochs: Passes over the data.
        lr: Learning rate at the start.
        batch_size: Records per step.
        optimizer: "adam", "adamw" or "sgd".
        momentum: Of SGD.
        weight_decay: Of the optimizer.
        schedule: "constant", or "cosine" to zero over all steps.
        warmup: Share of the steps over which the learning rate rises to `lr`, as is usual for transformers.
        clip: Largest gradient norm; None does not clip.
        gradient_restriction: Weight alpha of `gradient_norms`, which is added to every batch's mean loss so
            that gradients stay small: the training that influence approximation unlearning wants (0.005
            is published). It takes a second backward pass; 0 is ordinary training.
        group_by_length: Whether records of similar length share a batch, as in the Trainer of transformers: less
            padding. For tasks whose records have lengths (language).
    """

    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 64
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.0
    clip: float | None = None
    gradient_restriction: float = 0.0
    group_by_length: bool = False

    def __post_init__(self) -> None:
        positive = 0 < self.lr < float("inf") and 0 <= self.momentum < 1 and self.weight_decay >= 0
        if self.epochs < 1 or self.batch_size < 1 or not positive:
            raise InvalidHyperparameter(
                "epochs and batch_size must be at least 1, lr above 0 and finite, momentum in [0, 1), "
                f"weight_decay at least 0: {self}."
            )
        if self.optimizer not in ("adam", "adamw", "sgd") or self.schedule not in ("constant", "cosine"):
            raise InvalidHyperparameter(
                f"Unknown optimizer or schedule: {self.optimizer!r}, {self.schedule!r}."
            )
        if not 0 <= self.warmup < 1:
            raise InvalidHyperparameter(f"warmup is a share of the steps in [0, 1), not {self.warmup!r}.")
        if not 0 <= self.gradient_restriction < float("inf"):
            raise InvalidHyperparameter(
                f"gradient_restriction must be at least 0 and finite, not {self.gradient_restriction!r}."
            )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the model's trainable parameters."""
        parameters = list(trainable(model).values())
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, weight_decay=self.weight_decay)

    def build_schedule(
        self, optimizer: torch.optim.Optimizer, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler | None:
        """How the learning rate changes over all steps; None if it does not."""
        schedulers = torch.optim.lr_scheduler
        rise = round(self.warmup * steps)
        if not rise:
            return schedulers.CosineAnnealingLR(optimizer, steps) if self.schedule == "cosine" else None
        rest = steps - rise

        def factor(done: int) -> float:
            if done < rise:
                return (done + 1) / rise
            return 0.5 + 0.5 * math.cos(math.pi * (done - rise) / rest) if self.schedule == "cosine" else 1.0

        return schedulers.LambdaLR(optimizer, factor)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for checkpoints and hashes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainingRecipe:
        """The inverse of `to_dict`; unknown keys are refused."""
        unknown = set(data) - {item.name for item in fields(cls)}
        if unknown:
            raise InvalidHyperparameter(f"A training recipe has no {sorted(unknown)}.")
        return cls(**data)


def train(
    model: nn.Module,
    records: Records,
    task: Task,
    epochs: int = 20,
    seed: int = 0,
    runtime: Runtime | None = None,
    recipe: TrainingRecipe | None = None,
    **settings: Any,
) -> nn.Module:
    """Train a copy of a model and remember how.

    Args:
        model: Where to start; not changed.
        records: Training records.
        task: The domain.
        epochs: Passes over the data.
        seed: Of batch order and dropout.
        runtime: Device and progress; by default this machine with `seed`.
        recipe: A complete recipe, instead of `epochs` and `settings`.
        **settings: Other fields of `TrainingRecipe`.

    Returns:
        The trained copy, on the runtime's device; its recipe is found by `recipe_of`.

    Raises:
        NonFinite, InvalidLabels, ModelMismatch: Before any work, if data and model do not fit.
        NonFiniteLoss: If training diverges.
    """
    runtime = runtime or Runtime(seed=seed)
    recipe = recipe or TrainingRecipe(epochs=epochs, **settings)
    check_finite(model)
    task.check(model, records)
    return fit(copy.deepcopy(model), records, task, runtime, recipe)


def fit(
    model: nn.Module, records: Records, task: Task, runtime: Runtime, recipe: TrainingRecipe
) -> nn.Module:
    """The training loop, in place; for callers that own the model."""
    model = runtime.place(model)
    optimizer = recipe.build_optimizer(model)
    steps = recipe.epochs * -(-len(records) // recipe.batch_size)
    schedule = recipe.build_schedule(optimizer, steps)
    order = runtime.generator("training order")
    restricted = recipe.gradient_restriction > 0
    lengths = lengths_of(records, task) if recipe.group_by_length else None
    model.train()
    with runtime.seeded("training"), differentiable_twice() if restricted else nullcontext():
        for _ in runtime.track(range(recipe.epochs), "training"):
            for batch in runtime.batches(records, task, recipe.batch_size, shuffle=order, lengths=lengths):
                if len(batch["id"]) == 1 and min(recipe.batch_size, len(records)) > 1:
                    continue  # batch norm has no statistics of a single record
                loss = training_loss(model, batch, task, recipe.gradient_restriction)
                step(model, optimizer, loss, batch, recipe.clip)
                if schedule is not None:
                    schedule.step()
    model.eval()
    setattr(model, RECIPE_ATTRIBUTE, recipe)
    mark = getattr(task, "mark", None)  # a task may note on the model what it was trained under
    if mark is not None:
        mark(model)
    return model


def lengths_of(records: Records, task: Task) -> Sequence[int]:
    """Length of every record, from the task's own `lengths`.

    Raises:
        InvalidHyperparameter: If records of the task have none.
    """
    lengths = getattr(task, "lengths", None)
    if lengths is None:
        raise InvalidHyperparameter(
            f"group_by_length needs records that have lengths, as texts do; those of {type(task).__name__} have none."
        )
    return lengths(records)


def training_loss(
    model: nn.Module, batch: dict[str, Any], task: Task, gradient_restriction: float = 0.0
) -> Float[Tensor, ""]:
    """Mean loss of a batch, plus `gradient_restriction` times its `gradient_norms` if that is not 0."""
    loss = task.loss_per_example(model, batch).mean()
    if not gradient_restriction:
        return loss
    return loss + gradient_restriction * gradient_norms(loss, list(trainable(model).values()))


def gradient_norms(loss: Float[Tensor, ""], parameters: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
    """Gradient restriction: the sum over parameter tensors of the length of the loss's gradient, with its graph.

    sum_k ||dL/dtheta_k||, one Euclidean norm per tensor (a weight and its bias count apart), not squared
    ("Efficient Machine Unlearning via Influence Approximation", arXiv 2507.23257). Tensors that the loss
    does not depend on are left out, and a gradient that is exactly zero (a dead layer) adds nothing, not
    even to the derivative.

    Args:
        loss: Mean loss of a batch, with its graph, of operations that can be differentiated twice.
        parameters: Tensors that train.

    Raises:
        ModelMismatch: If the loss depends on nothing that trains.
    """
    if not loss.requires_grad:
        raise ModelMismatch("The loss depends on no trainable parameter: there is no gradient to restrict.")
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    # vector_norm has the subgradient 0 at 0, where the square root of a sum of squares would give NaN
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients if gradient is not None]
    return torch.stack(norms).sum() if norms else loss.new_zeros(())


def differentiable_twice() -> AbstractContextManager[object]:
    """Attention by its plain formula: the fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    batch: dict[str, Any],
    clip: float | None = None,
) -> None:
    """One descent step on a scalar loss.

    Raises:
        NonFiniteLoss: If the loss is NaN or Inf, naming records of the batch; nothing is applied.
    """
    if not torch.isfinite(loss):
        raise NonFiniteLoss(f"The loss became {loss.item()} on a batch with records {batch['id'][:3]}.")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def recipe_of(model: nn.Module) -> TrainingRecipe | None:
    """The recipe that `train` left on a model, or None."""
    return getattr(model, RECIPE_ATTRIBUTE, None)
