"""Weights on disk: safetensors only, whole or not at all, with how they were trained."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor, nn

from palimpsest.core.errors import (
    CannotWrite,
    ModelMismatch,
    PalimpsestError,
    PickleRefused,
    UnreadableCheckpoint,
    shorten,
)
from palimpsest.core.writing import write_bytes
from palimpsest.parts.reinitialise import check_finite
from palimpsest.parts.training import RECIPE_ATTRIBUTE, TrainingRecipe, recipe_of

PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"}
FORMAT, ABOUT = 1, "palimpsest"
"""Version of what is noted beside the weights, and the key that it is noted under."""
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors refuses longer ones."""


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds.

    Attributes:
        weights: Tensors by name.
        recipe: How the model was trained, if the file says so.
        architecture: Class of the model that was saved, if the file says so.
        notes: Further text that was stored.
        sha256: Of the file's bytes.
    """

    weights: Mapping[str, Tensor]
    recipe: TrainingRecipe | None
    architecture: str = ""
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
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
        ModelMismatch: If the model's state holds something other than tensors.
        CannotWrite: For lack of permission or space; an older local file stays as it was. In other places
            the data go out in one request.
    """
    state = model.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ModelMismatch(
            f"Safetensors hold tensors only, but the model keeps other state: {shorten(odd)}."
        )
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    recipe = recipe_of(model)
    about = {
        "format": FORMAT,
        "architecture": type(model).__name__,
        "recipe": recipe.to_dict() if recipe else None,
        "notes": dict(notes or {}),
    }
    # Under one key: safetensors writes several in random order, and the same model must give the same bytes.
    data = encode(weights, {ABOUT: json.dumps(about, sort_keys=True)})
    _write(str(path), data)
    return hashlib.sha256(data).hexdigest()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a weights file.

    Raises:
        PickleRefused: For a pickle, by its suffix or its first bytes.
        UnreadableCheckpoint: If the file is absent, cut short or of another format.
    """
    data = _read(str(path))
    try:
        weights = decode(data)
        size = int.from_bytes(data[:8], "little")
        said = (json.loads(data[8 : 8 + size]).get("__metadata__") or {}).get(ABOUT, "{}")
        about: dict[str, Any] = json.loads(said)
        recipe = TrainingRecipe.from_dict(about["recipe"]) if about.get("recipe") else None
    except (SafetensorError, ValueError, KeyError, TypeError, PalimpsestError) as problem:
        if Path(str(path)).suffix.lower() in PICKLES or looks_like_pickle(data):
            raise PickleRefused(
                f"{path} is a pickle, and loading one can run any code. Convert it where you trust it: "
                "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
            ) from problem
        raise UnreadableCheckpoint(
            f"{path} is no safetensors file, or was cut short: {problem}."
        ) from problem
    sha256 = hashlib.sha256(data).hexdigest()
    return Checkpoint(weights, recipe, about.get("architecture", ""), about.get("notes", {}), sha256)


def load_model(path: str | Path, model: nn.Module, sha256: str | None = None) -> nn.Module:
    """A copy of a model with the weights (and the training recipe) of a file.

    Args:
        path: A safetensors file, local or an fsspec URL.
        model: Of the architecture that was saved; not changed.
        sha256: Of the file, if known; another file is refused.

    Raises:
        PickleRefused, UnreadableCheckpoint: If the file cannot be read safely, or is not the one expected.
        ModelMismatch: If names or shapes differ from the model's, naming them.
        NonFinite: If weights hold NaN or Inf.
    """
    stored = read_checkpoint(path)
    if sha256 is not None and stored.sha256 != sha256:
        raise UnreadableCheckpoint(f"{path} was changed: its SHA-256 is {stored.sha256}, not {sha256}.")
    loaded = copy.deepcopy(model)
    check_fits(stored, loaded, path)
    with torch.no_grad():
        loaded.load_state_dict(dict(stored.weights))
    check_finite(loaded, f"model in {path}")
    if stored.recipe is not None:
        setattr(loaded, RECIPE_ATTRIBUTE, stored.recipe)
    return loaded.eval()


def check_fits(stored: Checkpoint, model: nn.Module, path: str | Path) -> None:
    """Check that weights are those of a model.

    Raises:
        ModelMismatch: Listing what is missing, what is too much, and whose shape differs.
    """
    weights, state = stored.weights, model.state_dict()
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
        saved = f", saved from a {stored.architecture}," if stored.architecture else ""
        raise ModelMismatch(
            f"The weights in {path}{saved} do not fit the {type(model).__name__}; {'; '.join(said)}."
        )


def looks_like_pickle(data: bytes) -> bool:
    """Whether bytes that are no sound safetensors file are what `torch.save` (a zip) or `pickle` write.

    A safetensors file begins with the length of its header, and a length may begin with the same two
    bytes as a pickle; but no header is as long as a pickle's further bytes then say, unless the pickle is
    a tiny one, which ends with its stop sign.
    """
    if data[:4] == b"PK\x03\x04":
        return True
    if data[:1] != b"\x80" or data[1:2] not in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return False
    tiny = data[2:3] == b"\x95" and data[-1:] == b"."
    return tiny or int.from_bytes(data[:8], "little") > LONGEST_HEADER


def _write(path: str, data: bytes) -> None:
    try:
        system, place = _system(path)
        if isinstance(system, LocalFileSystem):
            write_bytes(place, data)
        else:
            system.makedirs(place.rpartition("/")[0], exist_ok=True)
            system.pipe_file(place, data)
    except (OSError, ImportError, ValueError) as problem:
        raise CannotWrite(f"Cannot write {path}: {problem}.") from problem


def _read(path: str) -> bytes:
    try:
        system, place = _system(path)
        return system.cat_file(place)
    except (OSError, ImportError, ValueError) as problem:
        raise UnreadableCheckpoint(f"Cannot read {path}: {problem}.") from problem


def _system(path: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it."""
    return url_to_fs(path)
