"""Numbers to be read off real handwritten digits: the digit's value, its angle, the area of its ink."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Records
from palimpsest.data.digits import digits
from palimpsest.data.registry import dataset
from palimpsest.data.tables import quarters

SIDE = 16
"""Rotated digits are drawn on so many pixels a side: 8 are too few to turn a stroke."""
Target = Literal["value", "angle", "ink"]


@dataset("digits-regression")
def digits_regression(target: Target = "value", most: float = 45.0, seed: int = 0) -> Records:
    """1,797 gray images with a number as target: input [1, 8, 8] ([1, 16, 16] for angles) in [0, 1].

    Args:
        target: "value", the digit itself, 0 to 9; "ink", the area of its ink in pixels of the original, from
            the grey values; or "angle": every image is turned counter-clockwise by its own random angle in
            degrees.
        most: Largest angle to either side.
        seed: Of the angles.

    The ids are those of the data set "digits". Columns: "digit", and "quarter" of the target from 1 (the
    lowest) to 4.

    Raises:
        InvalidHyperparameter: For another target, or an angle that is not in (0, 180].
    """
    if target not in ("value", "angle", "ink"):
        raise InvalidHyperparameter(f"target must be 'value', 'angle' or 'ink', not {target!r}.")
    if not 0 < most <= 180:
        raise InvalidHyperparameter(f"most must lie in (0, 180] degrees, not {most!r}.")
    plain = digits()
    fields = plain.tensors or {}
    images, label = fields["input"].numpy(), fields["label"].numpy()
    if target == "angle":
        wanted = np.random.default_rng(seed).uniform(-most, most, len(images))
        images = np.stack([turned(image, angle) for image, angle in zip(images, wanted, strict=True)])
    else:
        wanted = label.astype(np.float64) if target == "value" else images.sum((1, 2, 3)).astype(np.float64)
    tensors = TensorDataset(torch.from_numpy(images).float(), torch.from_numpy(wanted).float())
    return Records(tensors, ids=plain.ids, columns={"digit": label, "quarter": quarters(wanted)})


def turned(image: NDArray[Any], angle: float) -> NDArray[np.float32]:
    """An image [1, 8, 8] on `SIDE` x `SIDE` pixels, turned counter-clockwise by `angle` degrees."""
    large = ndimage.zoom(image[0].astype(np.float64), SIDE / len(image[0]), order=1)
    rotated = ndimage.rotate(large, angle, reshape=False, order=1)
    return np.clip(rotated, 0.0, 1.0).astype(np.float32)[None]
