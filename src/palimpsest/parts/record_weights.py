"""One number per record: checked, and looked up for the records of a batch wherever they stand in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.core.errors import DuplicateIds, InvalidHyperparameter, InvalidRecords, shorten
from palimpsest.core.records import Batch, Records

Rows = Callable[[Batch], Int[Tensor, " batch"]]
"""From a batch to the rows of its records in the whole set, on the batch's device."""


def row_finder(records: Records) -> Rows:
    """A function that gives the rows of a batch's records among `records`, whatever order they are read in.

    Raises:
        DuplicateIds: If a record occurs twice: it would have two weights.
        InvalidRecords: By the function that is returned, if a batch does not say which records it holds
            (a `collate` that drops "index"), or holds others.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> records = Records(TensorDataset(torch.zeros(9, 1))).select([7, 2, 5])
        >>> row_finder(records)(records.batch([2, 0], list)).tolist()
        [2, 0]
    """
    positions = records.positions
    if len(np.unique(positions)) != len(positions):
        ids = np.asarray(records.ids, dtype=object)
        values, counts = np.unique(ids, return_counts=True)
        raise DuplicateIds(f"Records must be distinct; repeated: {shorten(values[counts > 1].tolist())}.")
    table = torch.full((int(positions.max()) + 1,), -1, dtype=torch.long)
    table[torch.from_numpy(positions)] = torch.arange(len(positions))

    def rows(batch: Batch) -> Int[Tensor, " batch"]:
        where = batch.get("index")
        if where is None:
            raise InvalidRecords(
                'The batches do not say which records they hold: the task\'s collate must keep the field "index".'
            )
        where = torch.as_tensor(where)
        inside = (where >= 0) & (where < len(table))
        found = table.to(where.device)[where.clamp(0, len(table) - 1)]
        if not bool((inside & (found >= 0)).all()):
            raise InvalidRecords("A batch holds records that are not among those that have weights.")
        return found

    return rows


def check_weights(weights: Sequence[float] | Float[np.ndarray, " records"], count: int) -> np.ndarray:
    """Weights as an array of float64.

    Raises:
        InvalidHyperparameter: If they are not `count` numbers in [0, 1].
    """
    checked = np.asarray(weights, dtype=np.float64)
    if checked.shape != (count,):
        raise InvalidHyperparameter(
            f"{count} weights are needed, one per record; these are of shape {checked.shape}."
        )
    odd = np.flatnonzero(~((checked >= 0) & (checked <= 1)))
    if len(odd):
        raise InvalidHyperparameter(
            f"Weights must lie in [0, 1]; weight {odd[0]} is {checked[odd[0]]} ({len(odd)} in all)."
        )
    return checked
