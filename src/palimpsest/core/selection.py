"""Naming records to forget: by id, by column, by fraction, composed with `&`, `|` and `~`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.core.errors import AbsentClass, InvalidSplit, UnknownIds, shorten
from palimpsest.core.records import Records

Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Selection:
    """A rule that picks records.

    Attributes:
        mask: Maps records to a boolean mask of shape [records].
        description: The rule in words, for reports and error messages.
        pinned: Ids that the rule names one by one. `split` keeps them in the training data, because
            a request to erase a record is about a record that was trained on.
        check: Raises if the rule cannot be applied to the complete data (unknown ids, absent value).
    """

    mask: Callable[[Records], Mask]
    description: str
    pinned: frozenset[str] = frozenset()
    check: Callable[[Records], None] = lambda records: None

    def __and__(self, other: Selection) -> Selection:
        return self._join(other, np.logical_and, "and")

    def __or__(self, other: Selection) -> Selection:
        return self._join(other, np.logical_or, "or")

    def __invert__(self) -> Selection:
        return Selection(lambda records: ~self.mask(records), f"not ({self.description})", check=self.check)

    def _join(self, other: Selection, combine: Callable[..., Mask], word: str) -> Selection:
        def check(records: Records) -> None:
            self.check(records)
            other.check(records)

        return Selection(
            lambda records: combine(self.mask(records), other.mask(records)),
            f"({self.description}) {word} ({other.description})",
            self.pinned | other.pinned,
            check,
        )


def by_ids(ids: Iterable[str]) -> Selection:
    """Records with the given ids. Every id must exist (`UnknownIds` otherwise)."""
    wanted = frozenset(str(identifier) for identifier in ids)

    def check(records: Records) -> None:
        unknown = sorted(wanted - set(records.ids))
        if unknown:
            raise UnknownIds(f"{len(unknown)} of {len(wanted)} ids are not in the data: {shorten(unknown)}.")

    def mask(records: Records) -> Mask:
        return np.fromiter((identifier in wanted for identifier in records.ids), bool, len(records))

    shown = sorted(wanted)
    return Selection(mask, f"ids {shorten(shown, 3)}", wanted, check)


def by_column(column: str, *values: Any) -> Selection:
    """Records whose `column` holds one of `values`. Each value must occur (`AbsentClass` otherwise).

    Numbers given as text ("3") match numeric columns, as they arrive so from the command line.
    """
    if not values:
        raise InvalidSplit(f"by_column('{column}') needs at least one value to match.")

    def matches(records: Records, value: Any) -> Mask:
        present = records.column(column)
        if isinstance(value, str) and present.dtype.kind in "iuf":
            try:
                value = float(value)
            except ValueError:
                return np.zeros(len(records), bool)
        return np.asarray(present == value, bool)

    def check(records: Records) -> None:
        for value in values:
            if not matches(records, value).any():
                known = sorted({str(item) for item in records.column(column)})
                raise AbsentClass(
                    f"No record has {column} = {value!r}. Values present: {shorten(known, 12)}."
                )

    def mask(records: Records) -> Mask:
        return np.logical_or.reduce([matches(records, value) for value in values])

    return Selection(mask, f"{column} = {', '.join(str(value) for value in values)}", check=check)


def by_range(column: str, low: float = -np.inf, high: float = np.inf) -> Selection:
    """Records whose number in `column` lies in [low, high]. One must (`AbsentClass` otherwise).

    Raises:
        InvalidSplit: If the bounds are no range, or (when applied) the column holds no single numbers.
    """
    if not low <= high:
        raise InvalidSplit(f"A range runs from low to high, not from {low!r} to {high!r}.")

    def mask(records: Records) -> Mask:
        values = records.column(column)
        if values.dtype.kind not in "iuf" or values.ndim != 1:
            raise InvalidSplit(
                f"The column '{column}' holds no single numbers: a range cannot be taken of it."
            )
        return (values >= low) & (values <= high)

    def check(records: Records) -> None:
        if not mask(records).any():
            values = records.column(column)
            raise AbsentClass(
                f"No record has {column} in [{low:g}, {high:g}]; it runs from {values.min():g} to {values.max():g}."
            )

    if np.isfinite([low, high]).all():
        words = f"{low:g} <= {column} <= {high:g}"
    else:
        words = f"{column} <= {high:g}" if np.isfinite(high) else f"{column} >= {low:g}"
    return Selection(mask, words, check=check)


def by_fraction(fraction: float, seed: int = 0) -> Selection:
    """A random share of the records, `round(fraction * n)` of the n that the rule is applied to."""
    if not 0 < fraction < 1:
        raise InvalidSplit(f"A fraction to forget must lie strictly between 0 and 1, not {fraction}.")

    def mask(records: Records) -> Mask:
        n = len(records)
        chosen = np.zeros(n, bool)
        chosen[np.random.default_rng(seed).permutation(n)[: round(fraction * n)]] = True
        return chosen

    return Selection(mask, f"a random {fraction:.4g} of the records (seed {seed})")
