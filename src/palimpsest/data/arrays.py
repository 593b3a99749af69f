"""Numpy arrays, in memory or in an .npz file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.records import Records
from palimpsest.data.registry import dataset


@dataset("arrays")
def arrays(
    path: str | Path | None = None,
    x: Any = None,
    y: Any = None,
    ids: Sequence[Any] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> Records:
    """Records from arrays: inputs x [records, ...] as float32, labels y [records].

    Args:
        path: An .npz file with arrays "x" and "y", optionally "ids"; further arrays of the same length
            become columns. No pickled objects are read.
        x: Inputs, instead of a file.
        y: Labels.
        ids: One unique id per record.
        columns: Named metadata.

    Raises:
        InvalidRecords: If the file is damaged, holds pickled objects or lacks x or y, or lengths differ.
    """
    extra: dict[str, Any] = dict(columns or {})
    if path is not None:
        stored = _read(Path(path))
        if "x" not in stored or "y" not in stored:
            raise InvalidRecords(f"{path} must hold arrays 'x' and 'y', it holds {sorted(stored)}.")
        x, y = stored.pop("x"), stored.pop("y")
        ids = stored.pop("ids").tolist() if "ids" in stored and ids is None else ids
        extra = {
            **{name: values for name, values in stored.items() if values.shape[:1] == (len(x),)},
            **extra,
        }
    if x is None or y is None:
        raise InvalidRecords("arrays needs a path, or x and y.")
    inputs, labels = np.asarray(x), np.asarray(y)
    if len(inputs) != len(labels):
        raise InvalidRecords(f"{len(inputs)} inputs and {len(labels)} labels: lengths must agree.")
    inputs = inputs.astype(np.float32) if inputs.dtype.kind in "fub" else inputs
    return Records(
        TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels.copy())), ids=ids, columns=extra
    )


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as problem:
        raise InvalidRecords(f"{path} cannot be read as an .npz file of plain arrays: {problem}") from problem
