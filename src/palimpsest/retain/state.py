"""States of learners as one safetensors file: nested tensors and plain data, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from palimpsest.core.errors import PalimpsestError, UnreadableCheckpoint
from palimpsest.core.writing import write_bytes

State = Mapping[str, Any]


def save_state(state: State, path: str | Path) -> None:
    """Write a state, whole or not at all.

    Raises:
        PalimpsestError: If it holds anything but tensors, numbers, strings, None, lists and mappings.
        CannotWrite: If the place cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    plain = _plain(state, tensors)
    write_bytes(path, save(tensors, metadata={"state": json.dumps(plain)}))


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a state that `save_state` wrote.

    Raises:
        UnreadableCheckpoint: If the file is absent, cut short, or of another kind.
    """
    try:
        data = Path(path).read_bytes()
        size = int.from_bytes(data[:8], "little")
        plain = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["state"])
        return _nested(plain, load(data))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as problem:
        raise UnreadableCheckpoint(
            f"{path} holds no state of a learner, or was cut short: {problem}."
        ) from problem


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain data with numbers in the place of tensors; mappings become lists of pairs, to keep the kind of keys."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _plain(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PalimpsestError(
        f"The state of a learner holds tensors and plain data, not a {type(value).__name__}."
    )


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_nested(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _nested(item, tensors) for key, item in value["pairs"]}
    return value
