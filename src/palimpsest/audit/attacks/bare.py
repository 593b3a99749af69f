"""The bare network of a model: its weights, taken out of wrappers, hooks and adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from palimpsest.core.evidence import ORIGINAL, Evidence

ADAPTED = "adapted layers"


@dataclass(frozen=True)
class BareNetwork:
    """Weights of a model, loaded into a plain copy of the original's architecture.

    Attributes:
        network: The original's architecture and forward code with the found weights; hooks that were
            registered on the audited model are not in it.
        place: Where in the model the weights were found: "" for the model itself, the name of a
            submodule, or `ADAPTED` if parts of the tensors' names had to be skipped.
        complete: Whether the place holds exactly the original's tensors, so that nothing that carries
            the function of the model beside them was left out.
    """

    network: nn.Module
    place: str
    complete: bool

    @property
    def where(self) -> str:
        """The place in words."""
        return f"found in '{self.place}'" if self.place else "the model itself"


def bare_network(model: nn.Module, original: nn.Module) -> BareNetwork | None:
    """Look for the original's tensors, by name and shape, inside a model.

    First the model itself and its submodules are compared (a filter or guard around a network); of
    several that match, the one whose weights are closest to the original's counts. Then single tensors
    whose names carry extra parts are looked for (`fc.base_layer.weight` for `fc.weight`: an adapter
    around a layer).

    Returns:
        None if the original has no parameters, or some tensor of it has no counterpart.
    """
    if not any(True for _ in original.parameters()):
        return None
    places = complete_places(model, original)
    if places:
        place = min(
            places, key=lambda name: 0.0 if not name else distance(places[name], original.state_dict())
        )
        return BareNetwork(_loaded(original, places[place]), place, True)
    tensors = _skipping(original.state_dict(), model.state_dict())
    return None if tensors is None else BareNetwork(_loaded(original, tensors), ADAPTED, False)


def complete_places(model: nn.Module, original: nn.Module) -> dict[str, dict[str, Tensor]]:
    """State of every submodule (the model itself is "") that has exactly the original's tensors."""
    wanted = {name: tensor.shape for name, tensor in original.state_dict().items()}
    places: dict[str, dict[str, Tensor]] = {}
    for name, module in model.named_modules():
        state = module.state_dict()
        if {key: tensor.shape for key, tensor in state.items() if isinstance(tensor, Tensor)} == wanted:
            places[name] = state
    return {"": places[""]} if "" in places else places


def attack_copy(evidence: Evidence, role: str) -> nn.Module:
    """The copy of a model that an attacker who holds the weights trains.

    Where the model holds one complete bare network, that is attacked: who holds the weights leaves out
    the wrapper around them. Every parameter can be trained, frozen or not: the attacker decides. The copy
    is on the runtime's device, in evaluation mode.
    """
    model, original = evidence.model(role), evidence.original
    target: nn.Module | None = None
    if original is not None and role != ORIGINAL and len(complete_places(model, original)) == 1:
        bare = bare_network(model, original)
        target = bare.network if bare is not None else None
    target = copy.deepcopy(model) if target is None else target
    for parameter in target.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return evidence.runtime.place(target).eval()


def distance(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Relative distance |w - w_ref| / |w_ref| over all floating-point tensors of the reference."""
    moved = size = 0.0
    for name, tensor in reference.items():
        if tensor.is_floating_point():
            here = state[name].detach().double().cpu()
            there = tensor.detach().double().cpu()
            moved += float((here - there).square().sum())
            size += float(there.square().sum())
    return (moved / size) ** 0.5 if size else 0.0


def _loaded(original: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    network = copy.deepcopy(original)
    with torch.no_grad():
        network.load_state_dict(tensors)
    return network


def _skipping(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """For every wanted name the tensor of its shape whose name is the wanted one with parts put in."""
    matched: dict[str, Tensor] = {}
    for name, tensor in wanted.items():
        shape = tensor.shape
        matches = [key for key, other in found.items() if other.shape == shape and _contains(key, name)]
        if not matches:
            return None
        matched[name] = found[min(matches, key=lambda key: (key.count("."), key))]
    return matched


def _contains(name: str, wanted: str) -> bool:
    """Whether the parts of `wanted` occur in `name` in order, ending alike."""
    parts = iter(name.split("."))
    ends_alike = name.rpartition(".")[2] == wanted.rpartition(".")[2]
    return ends_alike and all(part in parts for part in wanted.split("."))
