"""scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the library."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from palimpsest.core.records import Records
from palimpsest.data.registry import dataset


@dataset("digits")
def digits() -> Records:
    """1,797 gray images, input [1, 8, 8] in [0, 1], label 0 to 9, ids "digit-0000" and so on.

    Source: UCI Optical Recognition of Handwritten Digits (CC BY 4.0), through scikit-learn.
    """
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels)).float().reshape(-1, 1, 8, 8) / 16.0
    labels = torch.from_numpy(np.asarray(targets)).long()
    return Records(TensorDataset(images, labels), ids=[f"digit-{index:04d}" for index in range(len(labels))])
