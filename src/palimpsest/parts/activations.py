"""Activations and pooled features by layer name, through forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import ModelMismatch, UnknownName

LAYER_WIDTH = 2048
"""A pooled activation has at most this many numbers per record; larger maps are average-pooled."""
MOST_LAYERS = 12
"""At most this many layers are watched by default, evenly spaced from first to last."""


@dataclass
class Captured:
    """What the hooks saw during the last forward pass.

    Attributes:
        layers: Pooled outputs by module name, in order of execution, each [batch, dim].
        head_input: Input of the head (the last linear layer that ran), flattened to [batch, dim].
        head: Name of the head.
    """

    layers: dict[str, Float[Tensor, "batch dim"]] = field(default_factory=dict)
    head_input: Float[Tensor, "batch dim"] | None = None
    head: str | None = None


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Leaf modules that own a weight of two or more dimensions, in order of definition, no embeddings."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        leaf = not any(True for _ in module.children())
        if leaf and isinstance(weight, Tensor) and weight.dim() >= 2 and not isinstance(module, nn.Embedding):
            found[name] = module
    return found


def watched_layers(model: nn.Module, most: int = MOST_LAYERS) -> list[str]:
    """Names of the weight layers to watch: all, or `most` of them evenly spaced with first and last."""
    names = list(weight_layers(model))
    if len(names) <= most:
        return names
    return [names[round(index * (len(names) - 1) / (most - 1))] for index in range(most)]


def pool(activation: Tensor, width: int = LAYER_WIDTH) -> Float[Tensor, "batch dim"]:
    """An activation as one vector per record.

    Token sequences [batch, tokens, dim] are averaged over tokens. Feature maps [batch, channels,
    height, width] are flattened, after average pooling to the largest grid that fits `width` numbers.
    """
    if activation.dim() == 3:
        return activation.mean(1)
    if activation.dim() == 4 and activation[0].numel() > width:
        side = max(1, int((width / activation.shape[1]) ** 0.5))
        side_h, side_w = min(side, activation.shape[2]), min(side, activation.shape[3])
        activation = F.adaptive_avg_pool2d(activation, (side_h, side_w))
    return activation.flatten(1)


@contextmanager
def capture(
    model: nn.Module, layers: Sequence[str] | None = None, head: str | None = None
) -> Generator[Captured]:
    """Watch a model's forward passes.

    Args:
        model: To watch; hooks are removed at exit.
        layers: Modules whose pooled outputs to keep; `watched_layers` by default.
        head: Module whose input are the features; by default the last linear layer that runs, or the
            last weight layer if no linear one does.

    Raises:
        UnknownName: For a name that is no module of the model.
    """
    modules = dict(model.named_modules())
    for name in [*(layers or ()), *([head] if head else [])]:
        if name not in modules:
            raise UnknownName("layer", name, modules)
    seen = Captured()
    linear_ran = False

    def keep_input(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal linear_ran
        is_linear = isinstance(module, nn.Linear)
        if inputs and isinstance(inputs[0], Tensor) and (is_linear or not linear_ran or head):
            linear_ran = linear_ran or is_linear
            seen.head, seen.head_input = name, pool(inputs[0].detach(), inputs[0][0].numel())

    def keep_output(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            seen.layers.pop(name, None)
            seen.layers[name] = pool(first.detach())

    handles = []
    for name in watched_layers(model) if layers is None else layers:
        handles.append(modules[name].register_forward_hook(partial(keep_output, name)))
    heads = {head: modules[head]} if head else weight_layers(model)
    for name, module in heads.items():
        handles.append(module.register_forward_pre_hook(partial(keep_input, name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def features_with_graph(model: nn.Module, run: Callable[[], object], head: str | None = None) -> Tensor:
    """Input of the head during `run()`, with its graph, for methods that train on features."""
    kept: list[Tensor] = []
    modules = dict(model.named_modules())
    name = head or head_name(model)
    handle = modules[name].register_forward_pre_hook(lambda _m, inputs: kept.append(inputs[0]))
    try:
        run()
    finally:
        handle.remove()
    return pool(kept[-1], kept[-1][0].numel())


def output_with_graph(model: nn.Module, run: Callable[[], object], layer: str) -> Tensor:
    """Output of a module during `run()` as one vector per record, with its graph.

    Raises:
        UnknownName: For a name that is no module of the model.
        ModelMismatch: If the module did not run, or gives no tensor of two or more dimensions.
    """
    kept: list[object] = []

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        kept.append(first.clone() if isinstance(first, Tensor) else first)  # an inplace ReLU may follow

    handle = module_of(model, layer).register_forward_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    if not kept:
        raise ModelMismatch(f"Layer '{layer}' does not run in the model's forward pass.")
    found = kept[-1]
    if not isinstance(found, Tensor) or found.dim() < 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ModelMismatch(f"Layer '{layer}' gives no vector per record, but {shape}.")
    return pool(found, found[0].numel())


def head_name(model: nn.Module) -> str:
    """Name of the head by definition order: the last linear layer, or else the last weight layer."""
    layers = weight_layers(model)
    if not layers:
        raise UnknownName("layer", "head", dict(model.named_modules()))
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    return (linear or list(layers))[-1]


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`.

    Raises:
        UnknownName: If there is none; suggests the nearest.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        raise UnknownName("layer", name, modules)
    return modules[name]


def flat_parameters(model: nn.Module) -> Float[Tensor, " parameters"]:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
