"""A folder of images, one subfolder per class (torchvision's layout)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from palimpsest.core.errors import InvalidRecords, MissingDependency
from palimpsest.core.records import Records
from palimpsest.data.registry import dataset

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataset("image-folder")
def image_folder(
    root: str | Path, size: int = 224, normalise: bool = True, preload: bool | None = None
) -> Records:
    """Images of a folder, input [3, size, size], ids = paths relative to the root, column "class".

    Args:
        root: `root/class name/image.png`; classes are numbered by sorted name.
        size: Images are resized (shorter side) and centre-cropped to this.
        normalise: With ImageNet's mean and deviation, as pre-trained models expect; else [0, 1].
        preload: Decode all images once and keep them in memory; by default if they fit into 1 GiB.

    Raises:
        MissingDependency: Without torchvision.
        InvalidRecords: If the folder holds no images in subfolders, or one cannot be decoded.
    """
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except ImportError as missing:
        raise MissingDependency("torchvision", "vision") from missing
    steps: list[Any] = [
        v2.ToImage(),
        v2.Resize(size),
        v2.CenterCrop(size),
        v2.ToDtype(torch.float32, scale=True),
    ]
    if normalise:
        steps.append(v2.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION))
    try:
        images = ImageFolder(str(root), v2.Compose(steps))
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise InvalidRecords(f"{root} holds no images in subfolders, one per class: {problem}") from problem
    labels = torch.tensor(images.targets)
    columns = {"label": labels, "class": [images.classes[label] for label in images.targets]}
    ids = [str(Path(path).relative_to(root)) for path, _ in images.samples]
    small = len(images) * 3 * size * size * 4 < 2**30
    source: Any = (
        _Decoded(images) if not (small if preload is None else preload) else _preloaded(images, labels)
    )
    return Records(source, ids=ids, columns=columns)


class _Decoded(Dataset[tuple[Tensor, int]]):
    """Decodes at access, with the file named if it is damaged."""

    def __init__(self, images: Any):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        try:
            return self.images[item]
        except OSError as problem:
            raise InvalidRecords(
                f"The image {self.images.samples[item][0]} cannot be read: {problem}"
            ) from problem


def _preloaded(images: Any, labels: Tensor) -> torch.utils.data.TensorDataset:
    decoded = _Decoded(images)
    inputs = torch.stack([decoded[item][0] for item in range(len(decoded))])
    return torch.utils.data.TensorDataset(inputs, labels)
