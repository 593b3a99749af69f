"""Originals and retrained controls: trained once, kept as weights, loaded wherever they are needed."""

from __future__ import annotations

from torch import nn

import palimpsest.forget as forget_verb
from palimpsest.core.errors import UnreadableCheckpoint
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task
from palimpsest.models import build_model
from palimpsest.parts.checkpoint import load_model, read_checkpoint
from palimpsest.parts.training import TrainingRecipe, train
from palimpsest.study.plan import RETRAIN
from palimpsest.study.recipe import Recipe


def place_of(place: str, key: str) -> str:
    """Where the weights of a key lie, in a folder or fsspec URL."""
    return f"{place}/{key}.safetensors"


def is_sound(place: str, key: str, sha256: str) -> bool:
    """Whether the weights of a key are there and are the bytes that were written."""
    try:
        return read_checkpoint(place_of(place, key)).sha256 == sha256
    except UnreadableCheckpoint:
        return False


def architecture(recipe: Recipe, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """The recipe's network with fresh weights."""
    return build_model(recipe.model.name, input_shape, classes, seed=seed, **recipe.model.settings)


def train_original(
    network: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime, recipe: TrainingRecipe
) -> nn.Module:
    """The model that a request is about: trained on forget and retain records."""
    return train(network, split.train, task, runtime=runtime, recipe=recipe)


def train_control(
    network: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime, recipe: TrainingRecipe
) -> nn.Module:
    """A model retrained without the forget records, every parameter shown to be re-initialised.

    It is what the method "retrain" gives, under a seed that no cell has.
    """
    return forget_verb.forget(network, split, RETRAIN, task, runtime=runtime, recipe=recipe)


def load(place: str, key: str, sha256: str, network: nn.Module) -> nn.Module:
    """The weights of a key, in a network of their architecture.

    Raises:
        UnreadableCheckpoint: If they are not the bytes that were written.
    """
    return load_model(place_of(place, key), network, sha256)
