"""Sparse wiring that grows and is cut: unit types, connections of fixed number, frozen units.

"SHARP: Sparsity and Hidden Activation RePlay for Neuro-Inspired Continual Learning" (Gurbuz, Moorman,
Dovrolis, ICDL 2024, arXiv 2305.18563). Units are plastic (0), learners of this experience (1), or as many
experiences old as their type says, less one; inputs have the type 99.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import ModelMismatch
from palimpsest.parts.activations import head_name, weight_layers

INPUT, PLASTIC, LEARNER = 99, 0, 1


def top_units(activation: Float[Tensor, " units"], percent: float) -> Int[Tensor, " picked"]:
    """The fewest units whose activation is `percent` of the whole, most active first.

    Example:
        >>> top_units(torch.tensor([0.5, 3.0, 0.0, 1.5, 2.0, 1.0]), 75.0).tolist()
        [1, 4, 3]
    """
    values, order = torch.sort(activation, descending=True, stable=True)
    reached = values.double().cumsum(0)
    count = int((reached < percent / 100 * reached[-1]).sum()) + 1
    return order[:count]


def share_of_activation(phase: int, horizon: int, least: float) -> float:
    """Percent of activation that learners of a phase (from 1) make up: max(50 (1 + cos(pi t / K)), least).

    t is the phase, but 2 in the first, as in the released code.
    """
    return max(50 * (1 + math.cos(math.pi * max(2, phase) / horizon)), least)


def cut(
    source: Int[Tensor, " sources"], target: Int[Tensor, " targets"], mask: Bool[Tensor, "targets columns"]
) -> Bool[Tensor, "targets columns"]:
    """Existing connections from plastic units to others, which are to go.

    Where a convolution feeds a linear layer, each of its channels is a block of columns.
    """
    columns = source.repeat_interleave(mask.shape[1] // len(source))
    return mask & (columns == PLASTIC)[None, :] & (target != PLASTIC)[:, None]


def grown(
    target: Int[Tensor, " targets"],
    mask: Bool[Tensor, "targets columns"],
    count: int,
    random: torch.Generator,
) -> Bool[Tensor, "targets columns"]:
    """New connections to plastic units, drawn uniformly among the absent ones; fewer if there is no more room."""
    free = (~mask & (target == PLASTIC)[:, None]).flatten().nonzero().flatten()
    drawn = free[torch.randperm(len(free), generator=random).to(free.device)[:count]]
    new = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    new[drawn] = True
    return new.view_as(mask)


class Wiring:
    """The layers of a feed-forward network before its head, as units and connections.

    Args:
        model: Convolutions and linear layers in a chain, with ReLU between; freshly drawn here, in place, from
            torch's random state.
        sparsity: Share of connections that are absent. A first convolution stays dense.
        early: Leading layers whose outputs are stored; all convolutions, or the first layer, by default.
        random: Draws the connections.

    Raises:
        ModelMismatch: If the network is no such chain.
    """

    def __init__(self, model: nn.Module, sparsity: float, early: int | None, random: torch.Generator):
        found = weight_layers(model)
        head = found.pop(head_name(model))
        self.layers = list(found.values())
        check_chain(model, self.layers, head)
        convolutions = sum(isinstance(layer, nn.Conv2d) for layer in self.layers)
        self.early = early if early is not None else max(1, convolutions)
        if not 1 <= self.early < len(self.layers):
            raise ModelMismatch(
                f"Of {len(self.layers)} layers before the head {self.early} cannot be early ones: at least one must "
                "come after them."
            )
        device = weights(self.layers[0]).device
        sizes = [units_in(self.layers[0]), *(len(weights(layer)) for layer in self.layers)]
        self.types = [torch.full((size,), PLASTIC, device=device) for size in sizes]
        self.types[0].fill_(INPUT)
        self.masks: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            nn.init.kaiming_normal_(weights(layer), nonlinearity="relu")
            nn.init.zeros_(biases(layer))
            shape = weights(layer).shape[:2]
            dense = number == 0 and isinstance(layer, nn.Conv2d)
            kept = torch.rand(shape, generator=random) >= (0.0 if dense else sparsity)
            self.masks.append(kept.to(device))
        self.frozen = [torch.zeros(size, dtype=torch.bool, device=device) for size in sizes[1:]]
        self.connections = [int(mask.sum()) for mask in self.masks]
        self._open = False
        self.layers[-1].register_forward_hook(self._silence)
        self.erase()

    @property
    def density(self) -> float:
        """Share of connections that are there."""
        return sum(int(mask.sum()) for mask in self.masks) / sum(mask.numel() for mask in self.masks)

    @torch.no_grad()
    def erase(self) -> None:
        """Weights of absent connections are 0."""
        for layer, mask in zip(self.layers, self.masks, strict=True):
            weights(layer).mul_(_spread(mask, layer))

    def hold(self) -> None:
        """Gradients of absent connections and of all that comes into frozen units are 0."""
        for layer, mask, frozen in zip(self.layers, self.masks, self.frozen, strict=True):
            weight, bias = weights(layer).grad, biases(layer).grad
            if weight is not None and bias is not None:
                weight.mul_(_spread(mask & ~frozen[:, None], layer))
                bias.masked_fill_(frozen, 0.0)

    @torch.no_grad()
    def select(self, activations: Sequence[Float[Tensor, " units"]], percent: float) -> None:
        """Young units (plastic, learners) become learners if they are among the most active, else plastic."""
        for number, activation in enumerate(activations):
            types = self.types[number + 1]
            top = torch.zeros(len(types), dtype=torch.bool, device=types.device)
            top[top_units(activation, percent)] = True
            young = types <= LEARNER
            types[young] = top[young].to(types.dtype) * LEARNER
            if not (types == PLASTIC).any():
                warnings.warn(
                    f"Layer {number} has no plastic unit left: its capacity is used up.", stacklevel=3
                )

    def rewire(self, random: torch.Generator) -> None:
        """Cut what leads from plastic to other units, and grow as many connections to plastic ones."""
        for number, mask in enumerate(self.masks):
            source, target = self.types[number], self.types[number + 1]
            mask &= ~cut(source, target, mask)
            missing = self.connections[number] - int(mask.sum())
            new = grown(target, mask, missing, random)
            mask |= new
            if int(new.sum()) < missing:
                warnings.warn(
                    f"Layer {number} has room for {int(new.sum())} of {missing} new connections: it gets sparser.",
                    stacklevel=3,
                )
        self.erase()

    def mature(self, kept: int | None) -> None:
        """All but plastic units grow older; early units freeze at once, others after `kept` more experiences.

        With None nothing freezes.
        """
        for number, types in enumerate(self.types[1:]):
            types[types != PLASTIC] += 1
            if kept is not None:
                self.frozen[number] = types > (1 if number < self.early else kept + 1)

    @torch.no_grad()
    def redraw(self) -> None:
        """Fresh incoming weights for plastic units, from torch's random state."""
        for number, layer in enumerate(self.layers):
            plastic = self.types[number + 1] == PLASTIC
            fresh = torch.empty_like(weights(layer))
            nn.init.kaiming_normal_(fresh, mode="fan_out", nonlinearity="relu")
            weights(layer)[plastic] = fresh[plastic]
            biases(layer)[plastic] = 0.0
        self.erase()

    @contextmanager
    def listening(self) -> Generator[list[Tensor]]:
        """Activations after ReLU of every layer's forward passes, plastic units of the last layer included."""
        heard: list[Tensor] = [torch.empty(0)] * len(self.layers)

        def hear(number: int) -> Any:
            def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                heard[number] = F.relu(output)

            return hook

        handles = [layer.register_forward_hook(hear(number)) for number, layer in enumerate(self.layers)]
        self._open = True
        try:
            yield heard
        finally:
            self._open = False
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaying(self, activations: Tensor) -> Generator[None]:
        """Forward passes go on from stored outputs of the early layers, whatever goes in."""
        handle = self.layers[self.early - 1].register_forward_hook(lambda *_: activations)
        try:
            yield
        finally:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        return {"types": self.types, "masks": self.masks, "frozen": self.frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        device = self.types[0].device
        for name in ("types", "masks", "frozen"):
            setattr(self, name, [part.to(device).clone() for part in state[name]])

    def _silence(self, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output if self._open else output * (self.types[-1] != PLASTIC)


def check_chain(model: nn.Module, layers: Sequence[nn.Module], head: nn.Module) -> None:
    """Check that a network is a chain of convolutions and linear layers with biases.

    Raises:
        ModelMismatch: If not, naming what does not fit.
    """
    for layer in layers:
        plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if not plain or layer.bias is None:
            raise ModelMismatch(
                f"Wiring needs plain convolutions and linear layers with biases, not {type(layer).__name__}."
            )
    owned = {id(parameter) for layer in [*layers, head] for parameter in layer.parameters()}
    strange = [name for name, parameter in model.named_parameters() if id(parameter) not in owned]
    if strange:
        raise ModelMismatch(
            f"Wiring needs a chain of convolutions and linear layers: '{strange[0]}' belongs to none."
        )
    if not layers or not isinstance(layers[-1], nn.Linear):
        raise ModelMismatch("The last layer before the head must be linear.")
    for before, after in pairwise(layers):
        if units_in(after) % len(weights(before)):
            raise ModelMismatch(f"{units_in(after)} inputs do not follow {len(weights(before))} outputs.")


def weights(layer: nn.Module) -> Tensor:
    """The weight of a layer."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def biases(layer: nn.Module) -> Tensor:
    """The bias of a layer."""
    assert isinstance(layer.bias, Tensor)
    return layer.bias


def units_in(layer: nn.Module) -> int:
    """Inputs of a layer: channels or features."""
    return weights(layer).shape[1]


def _spread(mask: Tensor, layer: nn.Module) -> Tensor:
    """A mask of connections in the shape of the layer's weight."""
    weight = weights(layer)
    return mask.view(*mask.shape, *[1] * (weight.dim() - 2)).to(weight.dtype)
