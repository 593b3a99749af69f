"""Tokenizers: of a published model, by Hub name or folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palimpsest.core.errors import InvalidHyperparameter, MissingDependency, UnreadableCheckpoint
from palimpsest.parts.published import place_of


def load_tokenizer(place: str) -> Any:
    """The tokenizer of a model.

    Args:
        place: Name on the Hub, folder, GGUF file, or a short name (`palimpsest.parts.published`).

    Raises:
        MissingDependency: Without transformers.
        UnreadableCheckpoint: If there is none at that place.
    """
    folder, gguf = gguf_of(place_of(place))
    try:
        from transformers import AutoTokenizer
    except ImportError as missing:
        raise MissingDependency("transformers", "language") from missing
    try:
        return AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    except (OSError, ValueError, KeyError) as problem:
        raise UnreadableCheckpoint(f"Cannot load a tokenizer from '{place}': {problem}") from problem


def gguf_of(place: str) -> tuple[str, str | None]:
    """Folder (or Hub name) and GGUF file of a place; None where its weights are no GGUF.

    Raises:
        InvalidHyperparameter: If a folder holds several GGUF files.
    """
    path = Path(place)
    if path.suffix == ".gguf":
        return str(path.parent), path.name
    if path.is_dir() and not list(path.glob("*.safetensors")):
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise InvalidHyperparameter(f"{place} holds {len(files)} GGUF files: name one of them.")
        if files:
            return str(path), files[0].name
    return place, None
