"""The last layers of a network: which they are, training them alone, and giving them fresh weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from palimpsest.core.errors import InvalidHyperparameter, ModelMismatch, NonFinite, shorten
from palimpsest.parts.parameters import matching, trainable, unwrapped

COUNTED = (_ConvNd, nn.Linear, nn.MultiheadAttention)
"""Layers that count; attention is the linear layer of its inputs, its output projection another."""
ON_THE_WAY = (_NormBase, nn.LayerNorm, nn.GroupNorm)
"""Normalisation layers, which come along with the layers that they lie between."""


def counts(module: nn.Module) -> bool:
    """Whether a module is a layer that counts; so is GPT-2's linear layer, which transformers call Conv1D."""
    return isinstance(module, COUNTED) or type(module).__name__ == "Conv1D"


def _on_the_way(module: nn.Module) -> bool:
    return isinstance(module, ON_THE_WAY) or type(module).__name__.endswith("RMSNorm")


def last_parameters(model: nn.Module, k: int) -> list[str]:
    """Names of the parameters of the last `k` convolutional or linear layers.

    Modules are walked backwards in order of definition until `k` convolutions and linear layers are
    reached; normalisation layers on the way are included, whatever lies before the k-th is not. A weight that
    the head shares with the embeddings goes by its first name.

    Raises:
        InvalidHyperparameter: If `k` is below 1 or above the number of such layers.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
        >>> last_parameters(net, 1)
        ['3.weight', '3.bias']
        >>> last_parameters(net, 2)
        ['0.weight', '0.bias', '1.weight', '1.bias', '3.weight', '3.bias']
    """
    inner = unwrapped(model)
    modules = [(name, module) for name, module in inner.named_modules()]
    layers = sum(counts(module) for _, module in modules)
    if not 1 <= k <= layers:
        raise InvalidHyperparameter(
            f"k must lie between 1 and the {layers} convolutional and linear layers of the model, not {k!r}."
        )
    reached, chosen = 0, set[int]()
    for _, module in reversed(modules):
        if not (counts(module) or _on_the_way(module)):
            continue
        chosen |= {id(parameter) for parameter in module.parameters(recurse=False)}
        reached += counts(module)
        if reached == k:
            break
    return [name for name, parameter in inner.named_parameters() if id(parameter) in chosen]


def parameters_to_train(model: nn.Module, k: int, layers: Collection[str] = ()) -> list[str]:
    """Names of the last `k` layers' parameters, or of those of the named layers; frozen ones stay frozen.

    Raises:
        InvalidHyperparameter: If there are no `k` layers.
        UnknownName: For a name that nothing fits; suggests the nearest.
        ModelMismatch: If none of them is trainable.
    """
    free = trainable(model)
    wanted = list(matching(model, *layers)) if layers else last_parameters(model, k)
    chosen = [name for name in wanted if name in free]
    if not chosen:
        raise ModelMismatch(f"None of the parameters that are to be trained is trainable: {shorten(wanted)}.")
    return chosen


def train_only(model: nn.Module, names: Collection[str]) -> None:
    """Training mode, with the running statistics of layers that hold none of the parameters standing still."""
    model.train()
    for name, module in unwrapped(model).named_modules():
        own = {f"{name}.{part}" if name else part for part, _ in module.named_parameters(recurse=False)}
        if isinstance(module, _NormBase) and own.isdisjoint(names):
            module.eval()


@torch.no_grad()
def draw_anew(model: nn.Module, names: Collection[str]) -> None:
    """Kaiming-normal weights and zero biases for the named parameters of convolutional and linear layers.

    In place, from torch's global random state (enter `runtime.seeded`). Normalisation layers keep theirs.
    """
    known = dict(unwrapped(model).named_parameters())
    wanted = {id(known[name]) for name in names}
    for module in unwrapped(model).modules():
        if not counts(module):
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in wanted:
                continue
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
            else:
                nn.init.zeros_(parameter)


@torch.no_grad()
def put_back(model: nn.Module, names: Collection[str], initial: Mapping[str, Tensor]) -> None:
    """The named parameters of convolutional and linear layers set to the weights that training started from.

    Raises:
        ModelMismatch: If one of them is not there or has another shape.
        NonFinite: If one holds NaN or Inf.
    """
    parameters = dict(unwrapped(model).named_parameters())
    counted = {
        id(parameter)
        for module in unwrapped(model).modules()
        if counts(module)
        for parameter in module.parameters(recurse=False)
    }
    wanted = [name for name in names if id(parameters[name]) in counted]
    for name in wanted:
        if name not in initial or initial[name].shape != parameters[name].shape:
            raise ModelMismatch(
                f"The initial weights have no '{name}' of shape {tuple(parameters[name].shape)}."
            )
        if not torch.isfinite(initial[name]).all():
            raise NonFinite(f"The initial weights hold NaN or Inf in '{name}'.")
    for name in wanted:
        parameters[name].copy_(initial[name])
