"""Low-rank adapters over peft: put on, merged, taken off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, MissingDependency
from palimpsest.parts.decoder import stack_of


def add_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
    targets: Sequence[str] | str = "all-linear",
) -> nn.Module:
    """A model wrapped with adapters, which alone train; its own weights are used, not copied.

    Args:
        model: To adapt, in place.
        r: Rank.
        alpha: Scale; twice the rank by default.
        dropout: On the adapters' inputs.
        layers: Numbers of the blocks to adapt; all by default.
        targets: Names of linear layers ("q_proj"), or "all-linear": every one but the head.

    Raises:
        MissingDependency: Without peft.
        InvalidHyperparameter: For a rank below 1, or targets that the model has not.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as missing:
        raise MissingDependency("peft", "language") from missing
    if r < 1:
        raise InvalidHyperparameter(f"The rank of an adapter is at least 1, not {r}.")
    settings: dict[str, Any] = {}
    if layers is not None:
        stack = stack_of(model)
        for number in layers:
            stack.block(number)
        settings["layers_to_transform"] = list(layers)
        settings["layers_pattern"] = stack.name.rpartition(".")[2]
        if targets == "all-linear":  # peft knows layers only beside named targets
            targets = sorted(
                {
                    name.rpartition(".")[2]
                    for name, part in stack.blocks[0].named_modules()
                    if isinstance(part, nn.Linear)
                }
            )
    config = LoraConfig(
        r=r, lora_alpha=2 * r if alpha is None else alpha, lora_dropout=dropout,  # pyright: ignore[reportArgumentType]
        target_modules=targets if isinstance(targets, str) else list(targets), bias="none", **settings,
    )  # fmt: skip
    try:
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType, reportReturnType]
    except ValueError as problem:
        raise InvalidHyperparameter(f"The adapters do not fit the model: {problem}") from problem


def has_lora(model: nn.Module) -> bool:
    """Whether a model carries adapters."""
    return hasattr(model, "merge_and_unload")


def merged(model: nn.Module) -> nn.Module:
    """The plain model with the adapters added to its weights; in place. A model without any is given back."""
    return model.merge_and_unload() if has_lora(model) else model  # pyright: ignore[reportCallIssue]


def taken_off(model: nn.Module) -> nn.Module:
    """The plain model as it was before the adapters; in place. A model without any is given back."""
    return model.unload() if has_lora(model) else model  # pyright: ignore[reportCallIssue]
