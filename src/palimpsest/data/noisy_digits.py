"""Digits of which some have a random label: records that a network can only memorise, and so can only leak."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import TensorDataset

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Records
from palimpsest.data.digits import digits
from palimpsest.data.registry import dataset


@dataset("noisy-digits")
def noisy_digits(share: float = 0.15, seed: int = 0) -> Records:
    """The digits with a share of labels drawn at random; column "mislabelled" says which are wrong now.

    For membership attacks: on the clean digits a small network behaves alike on records that it saw and
    records that it did not, so that there is nothing to find.

    Args:
        share: Of records whose label is drawn anew (a tenth of these keep theirs by chance).
        seed: Of the draw.

    Raises:
        InvalidHyperparameter: If the share is not in [0, 1].
    """
    try:
        part = float(share)
    except ValueError:
        part = -1.0
    if not 0 <= part <= 1:
        raise InvalidHyperparameter(f"noisy-digits needs a share in [0, 1], not {share!r}.")
    plain, random = digits(), np.random.default_rng(seed)
    tensors = plain.tensors
    assert tensors is not None
    labels = tensors["label"].numpy().copy()
    drawn = random.random(len(labels)) < part
    labels[drawn] = random.integers(0, 10, drawn.sum())
    wrong = labels != tensors["label"].numpy()
    records = Records(TensorDataset(tensors["input"], torch.from_numpy(labels)), ids=plain.ids)
    return records.with_column("mislabelled", wrong)
