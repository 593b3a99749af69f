"""Weights on disk: safetensors only, whole or not at all, with how they were trained."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor, nn

from palimpsest.core.errors import (
    CannotWrite,
    ModelMismatch,
    PickleRefused,
    UnreadableCheckpoint,
    shorten,
)
from palimpsest.core.writing import write_bytes
from palimpsest.parts.reinitialise import check_finite
from palimpsest.parts.training import RECIPE_ATTRIBUTE, TrainingRecipe, recipe_of

PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"}
FORMAT = "palimpsest-1"


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds.

    Attributes:
        weights: Tensors by name.
        recipe: How the model was trained, if the file says so.
        notes: Further text that was stored.
        sha256: Of the file's bytes.
    """

    weights: Mapping[str, Tensor]
    recipe: TrainingRecipe | None
    notes: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""


def save_model(model: nn.Module, path: str | Path, notes: Mapping[str, str] | None = None) -> str:
    """Write a model's weights, buffers and training recipe as safetensors.

    Tensors that share memory (tied weights) are each written, so that any reader finds all names.

    Args:
        model: To save; left as it is.
        path: A local file, or an fsspec URL ("s3://bucket/model.safetensors").
        notes: Further text to keep in the file.

    Returns:
        SHA-256 of the file.

    Raises:
        CannotWrite: For lack of permission or space; an older file stays as it was.
    """
    weights = {
        name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()
    }
    about = {"format": FORMAT, **(notes or {})}
    recipe = recipe_of(model)
    if recipe is not None:
        about["recipe"] = json.dumps(recipe.to_dict(), sort_keys=True)
    data = encode(weights, about)
    if "://" in str(path):
        try:
            with fsspec.open(str(path), "wb") as file:
                file.write(data)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError as problem:
            raise CannotWrite(f"Cannot write {path}: {problem}.") from problem
    else:
        write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a weights file.

    Raises:
        PickleRefused: For a pickle, by its suffix or its first bytes.
        UnreadableCheckpoint: If the file is absent, cut short or of another format.
    """
    try:
        with fsspec.open(str(path), "rb") as file:
            data: bytes = file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except OSError as problem:
        raise UnreadableCheckpoint(f"Cannot read {path}: {problem}.") from problem
    try:
        weights = decode(data)
        size = int.from_bytes(data[:8], "little")
        about: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError) as problem:
        # Only now: the first bytes of a sound file are a length, and may look like a pickle's.
        if Path(str(path)).suffix.lower() in PICKLES or data[:2] == b"PK" or data[:1] == b"\x80":
            raise PickleRefused(
                f"{path} is a pickle, and loading one can run any code. Convert it where you trust it: "
                "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
            ) from problem
        raise UnreadableCheckpoint(
            f"{path} is no safetensors file, or was cut short: {problem}."
        ) from problem
    stored = about.pop("recipe", None)
    recipe = TrainingRecipe.from_dict(json.loads(stored)) if stored else None
    return Checkpoint(weights, recipe, about, hashlib.sha256(data).hexdigest())


def load_model(path: str | Path, model: nn.Module) -> nn.Module:
    """A copy of a model with the weights (and the training recipe) of a file.

    Args:
        path: A safetensors file, local or an fsspec URL.
        model: Of the architecture that was saved; not changed.

    Raises:
        PickleRefused, UnreadableCheckpoint: If the file cannot be read safely.
        ModelMismatch: If names or shapes differ from the model's, naming them.
        NonFinite: If weights hold NaN or Inf.
    """
    stored = read_checkpoint(path)
    loaded = copy.deepcopy(model)
    check_fits(stored.weights, loaded.state_dict(), path)
    with torch.no_grad():
        loaded.load_state_dict(dict(stored.weights))
    check_finite(loaded, f"model in {path}")
    if stored.recipe is not None:
        setattr(loaded, RECIPE_ATTRIBUTE, stored.recipe)
    return loaded.eval()


def check_fits(weights: Mapping[str, Tensor], state: Mapping[str, Any], path: str | Path) -> None:
    """Check that weights are those of a model.

    Raises:
        ModelMismatch: Listing what is missing, what is too much, and whose shape differs.
    """
    missing, extra = sorted(set(state) - set(weights)), sorted(set(weights) - set(state))
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(state[name].shape)}"
        for name in state
        if name in weights and weights[name].shape != state[name].shape
    ]
    said = [
        f"{word}: {shorten(names)}"
        for word, names in (("missing", missing), ("not in the model", extra), ("other shapes", shapes))
        if names
    ]
    if said:
        raise ModelMismatch(f"The weights in {path} do not fit the model; {'; '.join(said)}.")
