"""Models by name: ours, torchvision's, timm's, or any factory of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, MissingDependency, ModelMismatch, UnknownName
from palimpsest.core.modes import seeded
from palimpsest.core.registry import Registry
from palimpsest.models.causal import load_causal_lm
from palimpsest.parts.reinitialise import starting

MODELS: Registry[Callable[..., nn.Module]] = Registry("model", "palimpsest.models", "palimpsest.models")
"""Model factories by name, called with `input_shape` and `classes`."""

model = MODELS.register


def build_model(
    name: str, input_shape: tuple[int, ...], classes: int, seed: int = 0, **settings: Any
) -> nn.Module:
    """A freshly initialised model.

    Args:
        name: A name from `palimpsest.models` ("mlp", "small_cnn", "small_resnet"); "torchvision:resnet18";
            "timm:vit_tiny_patch16_224"; "hf:gpt2" for a causal language model by Hub name or folder; or "package.module:factory" for any importable callable that takes
            `input_shape` and `classes`.
        input_shape: Shape of one input, without batch.
        classes: Number of logits.
        seed: Of the initial weights.
        **settings: Passed on to the factory (`pretrained=True` loads weights where the library can).

    Raises:
        UnknownName: If there is no such model; suggests the nearest.
        MissingDependency: If torchvision or timm is not installed.
        InvalidHyperparameter: If the factory does not take the settings.
    """
    source, _, rest = name.partition(":")
    with seeded(seed):
        try:
            if source == "torchvision" and rest:
                return _torchvision(rest, classes, settings)
            if source == "timm" and rest:
                return _timm(rest, input_shape, classes, settings)
            if source == "hf" and rest:
                return starting(load_causal_lm(rest, **settings), partial(load_causal_lm, rest, **settings))
            if rest:
                return _imported(source, rest)(input_shape=input_shape, classes=classes, **settings)
            return MODELS.get(name)(input_shape=input_shape, classes=classes, **settings)
        except TypeError as problem:
            raise InvalidHyperparameter(f"Model '{name}': {problem}") from problem


def _torchvision(name: str, classes: int, settings: dict[str, Any]) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as missing:
        raise MissingDependency("torchvision", "vision") from missing
    if name not in models.list_models():
        raise UnknownName("torchvision model", name, models.list_models())
    return models.get_model(name, num_classes=classes, **settings)


def _timm(name: str, input_shape: tuple[int, ...], classes: int, settings: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as missing:
        raise MissingDependency("timm", "vision") from missing
    if name not in timm.list_models():
        raise UnknownName("timm model", name, timm.list_models())
    if "in_chans" not in settings and len(input_shape) == 3:
        settings = {**settings, "in_chans": input_shape[0]}
    return timm.create_model(name, num_classes=classes, **settings)


def _imported(module: str, attribute: str) -> Callable[..., nn.Module]:
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as problem:
        raise ModelMismatch(f"Cannot import the model factory '{module}:{attribute}': {problem}") from problem
