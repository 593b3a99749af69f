"""Which parameters of a model move: selection by name, freezing, and steps under a mask."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from palimpsest.core.errors import ModelMismatch, UnknownName, shorten

Mask = Mapping[str, Bool[Tensor, "..."]]
"""Which entries may move, by parameter name, each of its parameter's shape."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that put a prefix before parameter names (data parallel, compiled)."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, a tied one once (under its first name), without wrapper prefixes.

    Raises:
        ModelMismatch: If the model has none.
    """
    found = {name: p for name, p in unwrapped(model).named_parameters() if p.requires_grad}
    if not found:
        raise ModelMismatch(
            "The model has no trainable parameters: set requires_grad on those that may move."
        )
    return found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters, by name: the point that anchors and restorations refer to."""
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def matching(model: nn.Module, *patterns: str) -> dict[str, nn.Parameter]:
    """Parameters whose name fits one of the patterns, in order of definition, a tied one once.

    Args:
        model: Where to look.
        *patterns: A parameter ("head.weight"), a module ("blocks.2": all that it holds), or either with
            shell wildcards ("*.bias", "blocks.[01].*"). A tied parameter answers to all of its names.

    Raises:
        UnknownName: For a pattern that nothing fits; suggests the nearest name.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> list(matching(net, "1", "*.bias"))
        ['0.bias', '1.weight', '1.bias']
    """
    inner = unwrapped(model)
    aliases: dict[int, list[str]] = {}
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)

    def fits(pattern: str, name: str) -> bool:
        return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)

    every_name = [name for names in aliases.values() for name in names]
    for pattern in patterns:
        if not any(fits(pattern, name) for name in every_name):
            raise UnknownName(
                "parameter or layer", pattern, {*every_name, *dict(inner.named_modules())} - {""}
            )
    return {
        name: parameter
        for name, parameter in inner.named_parameters()
        if any(fits(pattern, alias) for pattern in patterns for alias in aliases[id(parameter)])
    }


@contextmanager
def only_trainable(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, nn.Parameter]]:
    """All parameters but the named ones frozen; every parameter's own flag is restored after.

    An optimizer must be built inside. Running statistics of frozen batch-norm layers still move in
    training mode: put those layers into evaluation mode if they must not.

    Raises:
        UnknownName: For a name that is no parameter; suggests the nearest.
    """
    parameters = dict(unwrapped(model).named_parameters())
    for name in names:
        if name not in parameters:
            raise UnknownName("parameter", name, parameters)
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        yield {name: parameters[name] for name in parameters if name in names}
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])


def check_mask(mask: Mask, model: nn.Module) -> None:
    """Check that a mask names every trainable parameter of a model, and has their shapes.

    Raises:
        ModelMismatch: Naming the parameters that do not fit.
    """
    parameters = trainable(model)
    odd = sorted(set(mask) ^ set(parameters))
    if odd:
        raise ModelMismatch(
            f"The mask and the model differ in the names of {len(odd)} parameters: {shorten(odd)}."
        )
    for name, parameter in parameters.items():
        if mask[name].shape != parameter.shape or mask[name].dtype != torch.bool:
            raise ModelMismatch(
                f"The mask of '{name}' must be boolean of shape {tuple(parameter.shape)}; it is "
                f"{mask[name].dtype} of shape {tuple(mask[name].shape)}."
            )


@contextmanager
def masked_updates(model: nn.Module, optimizer: torch.optim.Optimizer, mask: Mask) -> Iterator[None]:
    """Every step of the optimizer moves only the entries where the mask is true.

    Before a step the gradients outside the mask are set to zero. After it the entries outside are put
    back to their values at entry and their optimizer state (momentum, moments) is set to zero, because
    weight decay and momentum would otherwise move them without any gradient.

    Args:
        model: That is trained.
        optimizer: Over its trainable parameters.
        mask: Of all trainable parameters.

    Raises:
        ModelMismatch: If the mask does not fit the model.
    """
    check_mask(mask, model)
    parameters, anchor = trainable(model), snapshot(model)
    free = {name: mask[name].to(parameter.device) for name, parameter in parameters.items()}

    def cut_gradients(*_: Any) -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~free[name], 0.0)

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(torch.where(free[name], parameter, anchor[name]))
            for key, value in optimizer.state.get(parameter, {}).items():
                if key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(~free[name], 0)

    hooks = [optimizer.register_step_pre_hook(cut_gradients), optimizer.register_step_post_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
