"""What tables of numbers need before a network reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


def standardised(table: NDArray[Any]) -> Float[Tensor, "records features"]:
    """Every feature with mean 0 and deviation 1; a constant one becomes 0."""
    deviation = table.std(0)
    scaled = (table - table.mean(0)) / np.where(deviation > 0, deviation, 1.0)
    return torch.from_numpy(scaled).float()


def quarters(target: NDArray[Any]) -> NDArray[np.int64]:
    """Which quarter of the targets each belongs to, 1 (the lowest) to 4; equal targets stay together.

    Example:
        >>> quarters(np.array([5.0, 1.0, 2.0, 9.0])).tolist()
        [3, 1, 2, 4]
    """
    edges = np.quantile(target, [0.25, 0.5, 0.75])
    return 1 + np.searchsorted(edges, target, side="left")
