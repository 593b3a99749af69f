"""Heads: outputs that grow with the classes, and outputs that do not take part."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from palimpsest.core.errors import ModelMismatch
from palimpsest.parts.activations import head_name, module_of


def masked(
    logits: Float[Tensor, "batch classes"], allowed: Bool[Tensor, "*batch classes"]
) -> Float[Tensor, "batch classes"]:
    """Logits with minus infinity where a class does not take part; `allowed` is for all rows, or one per row."""
    return logits.masked_fill(~allowed, float("-inf"))


def head_of(model: nn.Module, name: str | None = None) -> nn.Module:
    """The output layer: by name, or the last linear layer.

    Raises:
        ModelMismatch: If it has no weight [outputs, features].
    """
    head = module_of(model, name or head_name(model))
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ModelMismatch(
            f"The head must have a weight [outputs, features]; '{type(head).__name__}' has none."
        )
    return head


def outputs_of(model: nn.Module, name: str | None = None) -> int:
    """Number of outputs of the head."""
    return len(_weight(head_of(model, name)))


def resize_head(model: nn.Module, outputs: int, name: str | None = None) -> None:
    """Give the head so many outputs, in place: old rows stay, new ones are drawn as the layer draws its own.

    From torch's global random state; enter `runtime.seeded`. The layer itself is replaced by a new one of the
    same kind, with the same hooks; an optimiser must be built anew.

    Raises:
        ModelMismatch: If the layer cannot draw its parameters (no `reset_parameters`).
    """
    name = name or head_name(model)
    old = head_of(model, name)
    weight = _weight(old)
    if len(weight) == outputs:
        return
    reset = getattr(old, "reset_parameters", None)
    if reset is None:
        raise ModelMismatch(
            f"The head '{name}' ({type(old).__name__}) cannot grow: it has no reset_parameters()."
        )
    new = copy.deepcopy(old)
    kept = min(len(weight), outputs)
    with torch.no_grad():
        for part, parameter in old.named_parameters(recurse=False):
            if parameter.shape[:1] == weight.shape[:1]:
                fresh = nn.Parameter(
                    parameter.new_empty((outputs, *parameter.shape[1:])), parameter.requires_grad
                )
                setattr(new, part, fresh)
        if hasattr(new, "out_features"):
            setattr(new, "out_features", outputs)  # noqa: B010
        new.reset_parameters()  # pyright: ignore[reportCallIssue]
        for part, parameter in old.named_parameters(recurse=False):
            fresh = getattr(new, part)
            if fresh.shape == parameter.shape:
                fresh.copy_(parameter)
            else:
                fresh[:kept] = parameter[:kept]
    place, _, attribute = name.rpartition(".")
    setattr(module_of(model, place) if place else model, attribute, new)


def _weight(head: nn.Module) -> Tensor:
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight
