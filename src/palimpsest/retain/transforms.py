"""The same records seen otherwise: relabelled, permuted, rotated, joined."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from palimpsest.core.errors import InvalidStream
from palimpsest.core.records import Records

Change = Callable[[Tensor], Tensor]


def changed(
    records: Records, field: str, change: Change, ids: Sequence[str] | None = None, **columns: Any
) -> Records:
    """Records whose `field` is `change`d: at once if they lie in memory, else when they are read.

    Args:
        records: Stay as they are.
        field: To change.
        change: From a batch of values [records, ...] to as many new ones.
        ids: New ids; the old ones by default.
        **columns: Metadata to add or replace.
    """
    metadata = {name: records.column(name) for name in records.columns} | columns
    names = records.ids if ids is None else list(ids)
    tensors = records.tensors
    if tensors is None:
        return Records(_Changed(records, field, change), ids=names, columns=metadata)
    tensors = {**tensors, field: change(tensors[field])}
    return Records(TensorDataset(*tensors.values()), ids=names, columns=metadata, fields=tuple(tensors))


def relabelled(records: Records, positions: Mapping[int, int], field: str = "label") -> Records:
    """Records with new labels; the old ones are kept in the column "original"."""
    old = records.column("label")
    new = np.asarray([positions[int(label)] for label in old], dtype=np.int64)
    keys = torch.tensor(sorted(positions))
    values = torch.tensor([positions[int(key)] for key in keys])
    return changed(
        records,
        field,
        lambda labels: values[torch.searchsorted(keys, labels.long())],
        label=new,
        original=old,
    )


def joined(parts: Sequence[Records], ids: Sequence[str] | None = None) -> Records:
    """All records of several sets in one, in memory if they all are; shared columns stay.

    Args:
        parts: At least one set.
        ids: New ids; the old ones by default.

    Raises:
        DuplicateIds: If a record is in two of them.
    """
    if len(parts) == 1 and ids is None:
        return parts[0]
    shared = [name for name in parts[0].columns if all(part.has_column(name) for part in parts)]
    columns = {name: np.concatenate([part.column(name) for part in parts]) for name in shared}
    ids = [name for part in parts for name in part.ids] if ids is None else ids
    tensors = [part.tensors for part in parts]
    known = [part for part in tensors if part is not None]
    if len(known) == len(parts):
        fields = [name for name in known[0] if all(name in part for part in known)]
        whole = [torch.cat([part[name] for part in known]) for name in fields]
        return Records(TensorDataset(*whole), ids=ids, columns=columns, fields=fields)
    return Records(ConcatDataset([_Changed(part, "", lambda value: value) for part in parts]), ids, columns)


def permutation(size: int, generator: torch.Generator) -> Int[Tensor, " values"]:
    """A random order of the values of one input."""
    return torch.randperm(size, generator=generator)


def permuted(inputs: Tensor, order: Int[Tensor, " values"], pad: int = 0) -> Tensor:
    """Inputs of any shape with their values in another order, the same for all.

    Args:
        inputs: [batch, ...].
        order: Of the values of one (padded) input, flattened.
        pad: Zeros put around the last two axes first, as 28 x 28 pixels become 32 x 32.
    """
    if pad:
        inputs = F.pad(inputs, (pad, pad, pad, pad))
    return inputs.flatten(1)[:, order].reshape(inputs.shape)


def rotated(
    images: Float[Tensor, "batch channels height width"], degrees: float
) -> Float[Tensor, "batch channels height width"]:
    """Images turned counter-clockwise about their centre, bilinear, zero outside; any height and width.

    Raises:
        InvalidStream: If they are no images [batch, channels, height, width].
    """
    if images.dim() != 4:
        raise InvalidStream(
            f"Only images [channels, height, width] can be rotated, not {tuple(images.shape[1:])}."
        )
    height, width = images.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # affine_grid works in units of half the height and half the width: the shear must be scaled by their ratio
    matrix = torch.tensor(
        [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]],
        dtype=images.dtype,
        device=images.device,
    )
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class _Changed(Dataset[dict[str, Any]]):
    """Records read one by one, with a field changed on the way and without id and index."""

    def __init__(self, records: Records, field: str, change: Change):
        self.records, self.field, self.change = records, field, change

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int) -> dict[str, Any]:
        fields = {name: value for name, value in self.records[item].items() if name not in ("id", "index")}
        if self.field in fields:
            fields[self.field] = self.change(torch.as_tensor(fields[self.field])[None])[0]
        return fields
