"""Fashion-MNIST: 70,000 gray images of clothes, from Debian's package or any torchvision root."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.records import Records
from palimpsest.data.merging import merge_classes
from palimpsest.data.registry import dataset

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataset("fashion-mnist")
def fashion_mnist(
    root: str | Path | None = None,
    part: str = "train",
    limit: int | None = None,
    merge: Sequence[Sequence[int | str]] = (),
) -> Records:
    """Gray images, input [1, 28, 28] in [0, 1], label 0 to 9, column "class" with the name.

    Args:
        root: Folder with the idx files (plain or .gz), searched below too, so that a torchvision root
            does; by default the folder of Debian's package `dataset-fashion-mnist`.
        part: "train" (60,000), "test" (10,000) or "all".
        limit: Only the first so many records of each part.
        merge: Groups of classes, by number or name, that become one class each; the column "class" keeps the
            names, so that a part of such a class can be forgotten ("class=sneaker").

    Raises:
        InvalidRecords: If the files are not there or damaged, saying how to get them; if classes to merge
            are unknown.
    """
    if part not in ("train", "test", "all"):
        raise InvalidRecords(f"part must be 'train', 'test' or 'all', not {part!r}.")
    folder = Path(root) if root is not None else DEBIAN
    prefixes = {"train": ["train"], "test": ["t10k"], "all": ["train", "t10k"]}[part]
    images, labels, ids = [], [], []
    for prefix in prefixes:
        images.append(read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"))[:limit])
        labels.append(read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte"))[:limit])
        ids += [f"{prefix}-{index:05d}" for index in range(len(labels[-1]))]
    target = np.concatenate(labels).astype(np.int64)
    inputs = torch.from_numpy(np.concatenate(images)).float().div_(255.0).unsqueeze(1)
    names = np.asarray(CLASSES, dtype=object)[target]
    target = merge_classes(target, merge, CLASSES) if merge else target
    return Records(TensorDataset(inputs, torch.from_numpy(target)), ids=ids, columns={"class": names})


def read_idx(path: Path) -> NDArray[Any]:
    """An array of bytes in the idx format (the format of MNIST), plain or gzipped.

    Raises:
        InvalidRecords: If the file is cut short or no idx file of bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as problem:
        raise InvalidRecords(f"{path} cannot be read: {problem}.") from problem
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise InvalidRecords(f"{path} is no idx file of unsigned bytes.")
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, 4)
    start = 4 + 4 * dimensions
    if len(raw) - start != int(np.prod(shape, dtype=np.int64)):
        raise InvalidRecords(f"{path} holds {len(raw) - start} values, its header promises {tuple(shape)}.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, stem: str) -> Path:
    for path in [folder / stem, folder / f"{stem}.gz", *sorted(folder.glob(f"**/{stem}*"))]:
        if path.is_file():
            return path
    raise InvalidRecords(
        f"No '{stem}' in {folder}. Install Debian's dataset-fashion-mnist, or pass root= with the folder of the "
        "idx files (a torchvision root works)."
    )
