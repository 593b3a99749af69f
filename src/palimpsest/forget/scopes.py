"""Which parameters of a model move: all, named layers, parts of blocks, adapters, the most salient entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.registry import Registry
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.unlearner import check_range, named
from palimpsest.parts.decoder import parts_of
from palimpsest.parts.lora import add_lora, has_lora, merged
from palimpsest.parts.parameters import matching, trainable
from palimpsest.tasks.language import Language


@dataclass
class Opened:
    """A model with some of its parameters free.

    Attributes:
        model: To train; the model itself, or one with adapters around it.
        parameters: That move.
        close: Gives the unlearned model, with the flags of its parameters as they were.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    close: Callable[[], nn.Module]


class Scope(Protocol):
    """A scope, with its settings as fields of a frozen dataclass."""

    def open(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Opened:
        """Free what is in scope, in place; everything else is frozen until `close`."""
        ...


ScopeLike = str | Mapping[str, Any] | Scope
SCOPES: Registry[type[Scope]] = Registry("scope", "palimpsest.forget", "palimpsest.scopes")
"""Scopes by name. Third parties register through the entry-point group `palimpsest.scopes`."""

C = TypeVar("C")


def scope(name: str) -> Callable[[type[C]], type[C]]:
    """Class decorator that makes a dataclass a scope called `name`."""

    def decorate(cls: type[C]) -> type[C]:
        SCOPES.register(name)(cast(type[Scope], cls))
        return cls

    return decorate


def scope_of(given: ScopeLike) -> Scope:
    """A scope from its name, from a mapping of "name" and settings, or as it is.

    Raises:
        UnknownName: For a scope or a setting that does not exist; suggests the nearest.
        InvalidHyperparameter: For a mapping without a name.
    """
    return named("scope", SCOPES, given)


@scope("all")
@dataclass(frozen=True)
class Everything:
    """All parameters that the model itself lets train (of a model with adapters, the adapters)."""

    def open(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Opened:
        """The model as it is."""
        return Opened(model, list(trainable(model).values()), lambda: model)


@scope("named")
@dataclass(frozen=True)
class Named:
    """Parameters by name, module or pattern.

    Attributes:
        patterns: As `parts.parameters.matching` takes them ("model.layers.3.mlp", "*.down_proj.weight").
    """

    patterns: Sequence[str]

    def open(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Opened:
        """Everything else frozen."""
        return only(model, list(matching(model, *self.patterns)))


@scope("blocks")
@dataclass(frozen=True)
class Blocks:
    """Parts of some blocks of the transformer.

    Attributes:
        layers: Numbers of the blocks; all by default.
        kind: "mlp", "self_attn", "down" (last projection of the MLP) or "all".
        norms: Whether normalisations inside whole blocks move as well.
    """

    layers: Sequence[int] | None = None
    kind: str = "mlp"
    norms: bool = True

    def open(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Opened:
        """Everything else frozen."""
        names = list(matching(model, *parts_of(model, self.layers, self.kind)))
        if not self.norms:
            names = [name for name in names if model.get_parameter(name).dim() > 1]
        return only(model, names)


@scope("lora")
@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on frozen weights.

    A model that has adapters already keeps them: they alone train, and no others are put on.

    Attributes:
        r: Rank.
        alpha: Scale; twice the rank by default.
        dropout: On the adapters' inputs.
        layers: Numbers of the blocks; all by default.
        targets: Names of linear layers, or "all-linear".
        merge: Whether the adapters are added to the weights at the end. Unmerged, whoever holds the model can
            take them off again, and an audit does.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    layers: Sequence[int] | None = None
    targets: Sequence[str] | str = "all-linear"
    merge: bool = True

    def open(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Opened:
        """The model with adapters."""
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        if has_lora(model):
            return Opened(model, list(trainable(model).values()), lambda: model)
        adapted = runtime.place(add_lora(model, self.r, self.alpha, self.dropout, self.layers, self.targets))

        def close() -> nn.Module:
            if not self.merge:
                return adapted
            plain = merged(adapted)
            for name, parameter in plain.named_parameters():
                parameter.requires_grad_(flags.get(name, True))
            return plain

        return Opened(adapted, list(trainable(adapted).values()), close)


@scope("saliency")
@dataclass(frozen=True)
class Saliency:
    """The entries that the forget loss depends on most: a mask as SalUn's, for any objective.

    Attributes:
        share: Share of all entries that move.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        check_range("share", self.share, 0, 1, open_low=True)

    def open(self, model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime) -> Opened:
        """The model with gradients of other entries set to zero, and the entries put back at the end."""
        parameters = trainable(model)
        anchor = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        mask = salient(model, split, task, runtime, self.share)
        hooks = [
            parameter.register_hook(lambda gradient, own=mask[name]: gradient * own)
            for name, parameter in parameters.items()
        ]

        @torch.no_grad()
        def close() -> nn.Module:
            for hook in hooks:
                hook.remove()
            for name, parameter in parameters.items():
                parameter.copy_(torch.where(mask[name], parameter, anchor[name]))
            return model

        return Opened(model, list(parameters.values()), close)


def salient(
    model: nn.Module, split: ForgetSplit, task: Language, runtime: Runtime, share: float
) -> dict[str, Tensor]:
    """Masks of the entries with the largest gradient of the forget loss, `share` of all together."""
    parameters = trainable(model)
    model.zero_grad(set_to_none=True)
    for batch in runtime.batches(split.forget, task, 16):
        (task.loss_per_example(model, batch).sum() / len(split.forget)).backward()
    sizes = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.abs()
        for name, parameter in parameters.items()
    }
    model.zero_grad(set_to_none=True)
    every = torch.cat([size.flatten() for size in sizes.values()])
    kept = max(1, round(share * every.numel()))
    threshold = every.kthvalue(every.numel() - kept + 1).values
    return {name: size >= threshold for name, size in sizes.items()}


def only(model: nn.Module, names: Sequence[str]) -> Opened:
    """A model with the named parameters free, their flags restored at the end.

    Raises:
        InvalidHyperparameter: If nothing is left to move.
    """
    if not names:
        raise InvalidHyperparameter("The scope leaves no parameter to move.")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(names))

    def close() -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        return model

    return Opened(model, [model.get_parameter(name) for name in names], close)
