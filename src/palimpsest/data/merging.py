"""Coarser labels: classes merged, so that a part of a class can be forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.core.errors import InvalidRecords


def merge_classes(
    labels: NDArray[np.int64], groups: Sequence[Sequence[Any]], names: Sequence[str] = ()
) -> NDArray[np.int64]:
    """Labels with each group of classes made one, numbered anew without gaps.

    A merged class stands where the smallest of its group stood.

    Args:
        labels: 0 to classes - 1.
        groups: Of at least two classes each, by number or by name; no class in two of them.
        names: Of the classes, by number.

    Raises:
        InvalidRecords: If a group is too small, a class unknown, or in two groups.

    Example:
        >>> merge_classes(np.array([0, 1, 2, 3]), [[1, 3]])
        array([0, 1, 2, 1])
    """
    classes = int(labels.max()) + 1
    target = np.arange(classes)
    seen: set[int] = set()
    for group in groups:
        members = [_number(item, classes, names) for item in group]
        if len(set(members)) < 2 or seen & set(members):
            raise InvalidRecords(
                f"A group merges two classes or more, each in one group only: {list(group)}."
            )
        seen |= set(members)
        target[members] = min(members)
    return np.unique(target, return_inverse=True)[1][labels]


def _number(item: Any, classes: int, names: Sequence[str]) -> int:
    if item in names:
        return list(names).index(item)
    if isinstance(item, int) and 0 <= item < classes:
        return item
    known = f" or {', '.join(names)}" if len(names) else ""
    raise InvalidRecords(f"There is no class {item!r} to merge; classes are 0 to {classes - 1}{known}.")
