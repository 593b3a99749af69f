"""Records: a map-style dataset whose every item has a stable id and named columns of metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from palimpsest.core.errors import DuplicateIds, InvalidRecords, UnknownName, shorten

Batch = dict[str, Any]
Collate = Callable[[Sequence[dict[str, Any]]], Batch]
Array = np.ndarray[Any, Any]


class Records(Dataset[dict[str, Any]]):
    """A dataset with ids and columns; `records[i]` is a dict of tensors and values.

    Every item has the fields of the wrapped dataset plus `"id"` (its string id) and `"index"` (its
    position in the complete data, stable under selection). Selecting copies nothing.

    Args:
        dataset: Any map-style dataset. Items may be tuples (named by `fields`), dicts, or single values.
        ids: One unique id per item; "0", "1", ... by default.
        columns: Named metadata, one value per item each. A `"label"` column is found by itself where the
            dataset offers `targets` (torchvision) or is a `TensorDataset`.
        fields: Names for the entries of tuple items.

    Raises:
        DuplicateIds: If ids are not unique.
        InvalidRecords: If ids or a column are not as long as the dataset.

    Example:
        >>> data = TensorDataset(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> records = Records(data, ids=["a", "b", "c"])
        >>> records.column("label").tolist(), records[1]["id"]
        ([0, 1, 1], 'b')
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        ids: Sequence[Any] | None = None,
        columns: Mapping[str, Any] | None = None,
        fields: Sequence[str] = ("input", "label"),
    ):
        size = len(dataset)  # pyright: ignore[reportArgumentType]
        names = [str(item) for item in (range(size) if ids is None else ids)]
        if len(names) != size:
            raise InvalidRecords(f"{len(names)} ids were given for {size} records.")
        if len(set(names)) != size:
            seen: set[str] = set()
            twice = [name for name in names if name in seen or seen.add(name)]
            raise DuplicateIds(f"Record ids must be unique; repeated: {shorten(twice)}.")
        self._dataset: Any = dataset
        self._fields = tuple(fields)
        self._ids = np.asarray(names, dtype=object)
        self._columns = {name: _column(name, values, size) for name, values in (columns or {}).items()}
        self._tensors = _stacked(dataset, self._fields)
        if "label" not in self._columns:
            found = _labels(dataset, self._tensors)
            if found is not None:
                self._columns["label"] = found
        self._positions = np.arange(size)
        self._left_out: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, item: int) -> dict[str, Any]:
        if not -len(self) <= item < len(self):
            raise IndexError(item)
        position = int(self._positions[item])
        return self._named(self._dataset[position], position)

    def __getitems__(self, items: list[int]) -> list[dict[str, Any]]:
        """Several items at once (the fetch that `torch.utils.data.DataLoader` prefers)."""
        return [self[item] for item in items]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[item] for item in range(len(self)))

    def __repr__(self) -> str:
        return f"Records({len(self)} of {len(self._ids)}, columns={sorted(self._columns)})"

    @property
    def ids(self) -> list[str]:
        """The string ids, in order."""
        return self._ids[self._positions].tolist()

    @property
    def positions(self) -> Array:
        """Position of each record in the complete data, [records]."""
        return self._positions

    @property
    def columns(self) -> list[str]:
        """Names of the metadata columns."""
        return sorted(self._columns)

    def column(self, name: str) -> Array:
        """The values of a column, [records].

        Raises:
            UnknownName: If there is no such column.
        """
        if name not in self._columns:
            raise UnknownName("column", name, self._columns)
        return self._columns[name][self._positions]

    def has_column(self, name: str) -> bool:
        """Whether there is a column called `name`."""
        return name in self._columns

    def has_field(self, name: str) -> bool:
        """Whether items have a field called `name`; the first item is fetched, its fields are not read."""
        item = self._dataset[int(self._positions[0])]
        if isinstance(item, Mapping):
            return name in item and name not in self._left_out
        fields = self._fields[: len(item)] if isinstance(item, tuple | list) else self._fields[:1]
        return name in fields and name not in self._left_out

    def with_column(self, name: str, values: Any) -> Records:
        """The same records with one more (or a replaced) column of one value per record."""
        column = _column(name, values, len(self))
        whole = np.empty(len(self._ids), dtype=column.dtype)
        whole[self._positions] = column
        copy = self._view(self._positions)
        copy._columns = {**self._columns, name: whole}
        return copy

    def select(self, which: Any) -> Records:
        """The records at positions `which` (integers, or a boolean mask), as a view."""
        chosen = np.asarray(which)
        if chosen.dtype != bool:
            chosen = chosen.astype(np.int64)
        return self._view(self._positions[chosen])

    def without(self, *names: str) -> Records:
        """The same records, as a view whose items and columns have no field of these names.

        What is left out is never touched: a method that must not read labels cannot, and items whose
        labels cannot be stacked can still be put into batches.
        """
        view = self._view(self._positions)
        view._left_out = self._left_out.union(names)
        view._columns = {name: values for name, values in self._columns.items() if name not in names}
        if self._tensors is not None:
            view._tensors = {name: tensor for name, tensor in self._tensors.items() if name not in names}
        return view

    def shares_data_with(self, other: Records) -> bool:
        """Whether both are views of the same complete data."""
        return self._dataset is other._dataset and self._ids is other._ids

    def union(self, other: Records) -> Records:
        """Records of either, in the order of the complete data if both are views of the same."""
        if self.shares_data_with(other):
            return self._view(np.union1d(self._positions, other._positions))
        shared = [name for name in self._columns if other.has_column(name)]
        return Records(
            torch.utils.data.ConcatDataset([_Plain(self), _Plain(other)]),
            ids=self.ids + other.ids,
            columns={name: np.concatenate([self.column(name), other.column(name)]) for name in shared},
        )

    @property
    def in_memory(self) -> bool:
        """Whether batches are cut from tensors in memory."""
        return self._tensors is not None

    @property
    def listed(self) -> bool:
        """Whether the items lie in memory as a list (texts), so that reading all of them costs little."""
        return isinstance(self._dataset, list | tuple)

    @property
    def tensors(self) -> dict[str, Tensor] | None:
        """All fields stacked, each [records, ...], if the data lie in memory as tensors; else None."""
        if self._tensors is None:
            return None
        where = torch.from_numpy(self._positions)
        return {name: tensor[where] for name, tensor in self._tensors.items()}

    def batch(self, items: Any, collate: Collate) -> Batch:
        """The records at `items` as one batch: indexed at once if in memory, else collated."""
        positions = self._positions[np.asarray(items, dtype=np.int64)]
        if self._tensors is None:
            return collate(self.__getitems__([int(item) for item in items]))
        where = torch.from_numpy(positions)
        batch: Batch = {name: tensor[where] for name, tensor in self._tensors.items()}
        batch["id"] = self._ids[positions].tolist()
        batch["index"] = where
        return batch

    def _named(self, item: Any, position: int) -> dict[str, Any]:
        if isinstance(item, Mapping):
            named: dict[str, Any] = {key: item[key] for key in item if key not in self._left_out}
        elif isinstance(item, tuple | list):
            pairs = zip(self._fields, item, strict=False)
            named = {key: value for key, value in pairs if key not in self._left_out}
        else:
            named = {self._fields[0]: item} if self._fields[0] not in self._left_out else {}
        named["id"] = self._ids[position]
        named["index"] = position
        return named

    def _view(self, positions: Array) -> Records:
        view = object.__new__(Records)
        view.__dict__.update(self.__dict__)
        view._positions = positions
        return view


class _Plain(Dataset[dict[str, Any]]):
    """Records without id and index, to be wrapped again."""

    def __init__(self, records: Records):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return {key: value for key, value in self.records[item].items() if key not in ("id", "index")}


def _column(name: str, values: Any, size: int) -> Array:
    column = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if column.shape[:1] != (size,):
        raise InvalidRecords(f"Column '{name}' has {len(column)} values for {size} records.")
    return column.astype(object) if column.dtype.kind in "US" else column


def _stacked(dataset: Any, fields: tuple[str, ...]) -> dict[str, Tensor] | None:
    tensors = dataset.tensors if isinstance(dataset, TensorDataset) else None
    return dict(zip(fields, tensors, strict=False)) if tensors is not None else None


def _labels(dataset: Any, tensors: dict[str, Tensor] | None) -> Array | None:
    if tensors is not None and "label" in tensors:
        return tensors["label"].cpu().numpy()
    targets = getattr(dataset, "targets", None)
    return None if targets is None else np.asarray(targets)
