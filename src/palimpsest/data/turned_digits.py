"""Digits of which every second one lies on its side: twenty classes, enough to pretrain on some and learn others."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from palimpsest.core.records import Records
from palimpsest.data.digits import digits
from palimpsest.data.registry import dataset


@dataset("turned-digits")
def turned_digits() -> Records:
    """The records of `digits`, each once: of every class the first, third, ... upright, the others turned left.

    A turned digit is a class of its own, label 10 + digit; ids are those of `digits`. No image is there twice,
    so that classes that are kept apart share none.
    """
    records = digits()
    assert records.tensors is not None
    images, labels = records.tensors["input"].clone(), records.tensors["label"].clone()
    for digit in range(10):
        turned = (labels == digit).nonzero().flatten()[1::2]
        images[turned] = torch.rot90(images[turned], 1, (-2, -1))
        labels[turned] += 10
    return Records(TensorDataset(images, labels), ids=list(records.ids))
