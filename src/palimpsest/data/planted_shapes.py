"""Generated images whose classes are made of planted shapes: the truth about concepts is known."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Records
from palimpsest.data.registry import dataset

SIDE, SHAPE = 16, 5
"""Pixels on a side of an image, and of a shape."""
SHAPES = ("stripe", "disc", "plus", "cross", "bars", "ring")
CLASSES = (("disc", "stripe"), ("stripe",), ("plus",), ("cross",))
"""Shapes of each class. Class 1 is what class 0 is without its disc: the donor that shares its stripe. Bars and
rings belong to no class."""


@dataset("planted-shapes")
def planted_shapes(n: int = 1200, noise: float = 0.15, stray: float = 0.3, seed: int = 0) -> Records:
    """Gray images, input [1, 16, 16], label 0 to 3, a truth column per shape and "<shape>-place" [2].

    Every image has the shapes of its class and, with the chance `stray`, one other shape, so that no shape
    is a class label, each in its own cell of a three by three grid, moved by up to one pixel.

    Args:
        n: Number of images.
        noise: Standard deviation of the background.
        stray: Chance of one shape that does not belong to the class.
        seed: Of everything.
    """
    if n < len(CLASSES) or noise < 0 or not 0 <= stray <= 1:
        raise InvalidHyperparameter(
            f"n must be 4 or more, noise 0 or more, stray a chance: {n}, {noise}, {stray}."
        )
    random = np.random.default_rng(seed)
    images = random.normal(0.0, noise, (n, SIDE, SIDE))
    labels = np.arange(n) % len(CLASSES)
    present = np.zeros((n, len(SHAPES)), bool)
    centers = np.full((n, len(SHAPES), 2), -1)
    for image, label, shown, where in zip(images, labels, present, centers, strict=True):
        names = list(CLASSES[label])
        if random.random() < stray:
            names.append(random.choice([name for name in SHAPES if name not in names]))
        cells = random.permutation(9)
        for name, cell in zip(names, cells, strict=False):
            top, left = (int(edge) + random.integers(0, 2) for edge in (cell // 3 * SHAPE, cell % 3 * SHAPE))
            image[top : top + SHAPE, left : left + SHAPE] += _drawn(name)
            shown[SHAPES.index(name)] = True
            where[SHAPES.index(name)] = (left + SHAPE // 2, top + SHAPE // 2)
    columns = {name: present[:, index] for index, name in enumerate(SHAPES)}
    places = {f"{name}-place": centers[:, index] for index, name in enumerate(SHAPES)}
    inputs = torch.from_numpy(images.clip(-1, 2)).float()[:, None]
    return Records(
        TensorDataset(inputs, torch.from_numpy(labels).long()),
        ids=[f"shapes-{index:05d}" for index in range(n)],
        columns={**columns, **places},
    )


def _drawn(name: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A shape, [5, 5]."""
    y, x = np.mgrid[:SHAPE, :SHAPE] - SHAPE // 2
    shapes = {
        "stripe": y % 2 == 0,
        "disc": x**2 + y**2 <= 5,
        "plus": (x == 0) | (y == 0),
        "cross": np.abs(x) == np.abs(y),
        "bars": x % 2 == 0,
        "ring": (x**2 + y**2 >= 4) & (x**2 + y**2 <= 5),
    }
    return shapes[name].astype(float)
