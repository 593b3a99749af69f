"""What carries weights in a search: records, or classes of records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from palimpsest.core.errors import InvalidHyperparameter, InvalidLabels, InvalidRecords
from palimpsest.core.records import Records
from palimpsest.study.worst_case.selection import class_losses

By = Literal["record", "class"]
SHARE_OF_CLASSES = 0.1
"""Share of the classes that is searched for unless a number is said, as published."""


@dataclass(frozen=True)
class Items:
    """What carries weights: records, or classes of records.

    Attributes:
        names: Ids of the records, or the classes, [items].
        of_record: Number of each record's item, [records].
        by: "record" or "class".
    """

    names: np.ndarray
    of_record: Int[np.ndarray, " records"]
    by: By

    @classmethod
    def of(cls, records: Records, by: By) -> Items:
        """The items of a training set.

        Raises:
            InvalidRecords: If there are fewer than two.
            InvalidLabels: If classes are asked for and there is no label column.
        """
        if by == "class":
            if not records.has_column("label"):
                raise InvalidLabels("A search by class needs a 'label' column in the records.")
            names, of_record = np.unique(records.column("label"), return_inverse=True)
        else:
            names, of_record = np.asarray(records.ids, dtype=object), np.arange(len(records))
        if len(names) < 2:
            raise InvalidRecords(f"A search needs at least 2 {by}s to choose from; there are {len(names)}.")
        return cls(names, of_record, by)

    @property
    def count(self) -> int:
        """Number of items."""
        return len(self.names)

    def records_of(self, items: Int[np.ndarray, " m"]) -> np.ndarray:
        """Mask of the records that belong to the items, [records]."""
        return np.isin(self.of_record, items)

    def losses(
        self, losses: Float[np.ndarray, " records"], class_loss: str, batch_size: int
    ) -> Float[np.ndarray, " items"]:
        """Losses per item from losses per record."""
        if self.by == "record":
            return losses
        size = batch_size if class_loss == "released" else None
        return class_losses(losses, self.of_record, self.count, size)


def set_size(size: int | float | None, items: Items) -> int:
    """The number m of items to choose.

    Raises:
        InvalidHyperparameter: If it is no integer (nor a share below 1), below 1, or leaves nothing over.
    """
    unit = "records" if items.by == "record" else "classes"
    if size is None:
        if items.by == "record":
            raise InvalidHyperparameter("Say how many records to search for (size), or which share of them.")
        size = max(1, round(SHARE_OF_CLASSES * items.count))
    if isinstance(size, float | np.floating) and 0 < size < 1:
        size = round(float(size) * items.count)
    if not is_integer(size):
        raise InvalidHyperparameter(
            f"size must be an integer number of {unit}, or a share strictly between 0 and 1, not {size!r}."
        )
    if not 0 < size < items.count:
        raise InvalidHyperparameter(
            f"size must be at least 1 and below the {items.count} {unit} that there are, not {size}."
        )
    return int(size)


def is_integer(value: object) -> bool:
    """Whether a value is an integer, and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
