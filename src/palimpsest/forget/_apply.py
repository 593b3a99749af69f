"""The verb `forget`: check everything, then run one method."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from palimpsest.core.errors import ModelMismatch, NonFiniteLoss
from palimpsest.core.needs import Need, require
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.core.unlearner import UNLEARNERS, Unlearner, build
from palimpsest.parts.reinitialise import check_finite
from palimpsest.parts.training import RECIPE_ATTRIBUTE, recipe_of


def forget(
    model: nn.Module,
    split: ForgetSplit,
    method: str | Unlearner,
    task: Task,
    seed: int = 0,
    runtime: Runtime | None = None,
    **settings: Any,
) -> nn.Module:
    """Make a model forget `split.forget`.

    Args:
        model: The trained model; not changed.
        split: The erasure request.
        method: Name of a method (`palimpsest methods` lists them), or an instance.
        task: The domain.
        seed: Of everything random in the method.
        runtime: Device and progress; by default this machine with `seed`.
        **settings: Hyperparameters of the method, under the names of its fields.

    Returns:
        A new model of the same class (a guard returns a wrapper with the same `forward`).

    Raises:
        UnknownName: For an unknown method or hyperparameter.
        MissingNeed: If the method needs something that is not at hand.
        NonFinite, InvalidLabels, ModelMismatch: If model and records do not fit. All before any work.
        NonFiniteLoss: If the method diverged.
    """
    unlearner = method if isinstance(method, Unlearner) else build_unlearner(method, settings)
    runtime = runtime or Runtime(seed=seed)
    card = unlearner.card
    if "any" not in card.tasks and task.name not in card.tasks:
        raise ModelMismatch(f"Method '{card.name}' works for {', '.join(card.tasks)}, not for {task.name}.")
    if Need.TRAINING_RECIPE not in card.needs:  # who trains anew trains on everything that is retained
        split = split.for_methods
    require(unlearner.card.name, unlearner.card.needs, needs_met(model, split, unlearner, task))
    check_finite(model)
    task.check(runtime.place(model), split.forget, labels=Need.FORGET_LABELS in card.needs)
    if split.retain is not None and Need.RETAIN_DATA in card.needs:  # what a method does not need is not read
        task.check(model, split.retain, labels=Need.RETAIN_LABELS in card.needs)
        check_split = getattr(task, "check_split", None)
        if check_split is not None:
            check_split(split)
    recipe = recipe_of(model)
    with torch.enable_grad():  # whatever the caller has switched off around us
        unlearned = unlearner.unlearn(model, split, task, runtime)
    for name, tensor in unlearned.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteLoss(f"Method '{unlearner.card.name}' diverged: '{name}' holds NaN or Inf.")
    if recipe is not None:
        setattr(unlearned, RECIPE_ATTRIBUTE, recipe)
    unlearned.eval()
    return unlearned


def build_unlearner(name: str, settings: dict[str, Any]) -> Unlearner:
    """A method by name with its hyperparameters."""
    return build("method", UNLEARNERS.get(name), name, settings)


def needs_met(
    model: nn.Module | None,
    split: ForgetSplit,
    unlearner: Unlearner | None = None,
    task: Task | None = None,
) -> frozenset[Need]:
    """What is at hand: from the model, the parts of the split, the method's own settings, and the domain.

    In a domain whose records are their own labels (a text that is to be continued) labels are always there.
    """
    have = {Need.FORGET_DATA}
    if model is not None:
        have.add(Need.MODEL)
        if recipe_of(model) is not None:
            have.add(Need.TRAINING_RECIPE)
    if split.forget.has_field("label") or split.forget.has_column("label"):
        have.add(Need.FORGET_LABELS)
    if split.retain is not None:
        have.add(Need.RETAIN_DATA)
        read = unlearner is None or Need.RETAIN_LABELS in unlearner.card.needs
        if read and (split.retain.has_field("label") or split.retain.has_column("label")):
            have.add(Need.RETAIN_LABELS)
    if getattr(task, "labelled", False):
        have |= {Need.FORGET_LABELS} | ({Need.RETAIN_LABELS} if split.retain is not None else set())
    return frozenset(have | getattr(unlearner, "supplies", frozenset()))
