"""Importances kept in a safetensors file, with how they were measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from palimpsest.core.errors import PickleRefused, UnreadableCheckpoint
from palimpsest.core.writing import write_bytes
from palimpsest.parts.importance import Importance, Measure

PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of what `torch.save` (a zip) and `pickle` write."""


def save_importance(path: str | Path, importance: Importance, measure: Measure) -> Path:
    """Keep importances, and how they were measured, in a safetensors file.

    Raises:
        CannotWrite: For lack of permission or space; an older file stays as it was.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in importance.items()}
    return write_bytes(path, save(tensors, {"palimpsest_measure": json.dumps(asdict(measure))}))


def load_importance(path: str | Path) -> tuple[Importance, Measure]:
    """Read what `save_importance` wrote.

    Raises:
        UnreadableCheckpoint: If the file is absent, cut short or holds no importances.
        PickleRefused: If it is a pickle.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            described = (tensors.metadata() or {}).get("palimpsest_measure")
            if described is None:
                raise UnreadableCheckpoint(f"{path} holds tensors, but does not say how they were measured.")
            values = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        return values, Measure(**json.loads(described))
    except (OSError, SafetensorError, TypeError, ValueError) as problem:
        if _is_pickle(path):
            raise PickleRefused(
                f"{path} is a pickle, which can run any code: Palimpsest never loads one. Write importances "
                "with save_importance."
            ) from None
        raise UnreadableCheckpoint(f"Cannot read importances from {path}: {problem}") from problem


def _is_pickle(path: str | Path) -> bool:
    """Asked only of files that safetensors refused: its headers may begin with the same bytes."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(2) in PICKLE_STARTS
