"""ForgetSplit: which records to forget, retain, test on, and hold out as a control group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from palimpsest.core.errors import EmptyForgetSet, ForgetCoversEverything, InvalidSplit, shorten
from palimpsest.core.records import Records
from palimpsest.core.selection import Mask, Selection

PARTS = ("forget", "retain", "test", "holdout")


@dataclass(frozen=True)
class ForgetSplit:
    """The four parts of an erasure request.

    Attributes:
        forget: Training records whose trace must go.
        retain: The rest of the training records; None if they are no longer at hand.
        test: Records never trained on, to measure utility.
        holdout: Records never trained on, drawn like the training records: the control group of every
            membership attack. Not used for anything else.
        description: The request in words.

    Raises:
        EmptyForgetSet, ForgetCoversEverything: If forget or a given retain part is empty.
        InvalidSplit: If two parts share a record.
    """

    forget: Records
    retain: Records | None = None
    test: Records | None = None
    holdout: Records | None = None
    description: str = "the given records"

    def __post_init__(self) -> None:
        if len(self.forget) == 0:
            raise EmptyForgetSet(f"The request ({self.description}) matches no training record.")
        if self.retain is not None and len(self.retain) == 0:
            raise ForgetCoversEverything(
                f"The request ({self.description}) covers all {len(self.forget)} training records: "
                "nothing is left to retain. Train a new model instead."
            )
        seen: dict[str, str] = {}
        for name, part in self.parts.items():
            for identifier in part.ids:
                if identifier in seen:
                    raise InvalidSplit(
                        f"Record {identifier!r} is in both {seen[identifier]} and {name}: parts must not overlap."
                    )
                seen[identifier] = name

    @property
    def parts(self) -> dict[str, Records]:
        """The parts that are at hand, by name."""
        named = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in named.items() if part is not None}

    @cached_property
    def train(self) -> Records:
        """Everything that the original model was trained on: forget and retain, in original order."""
        if self.retain is None:
            raise InvalidSplit("The retained records are not at hand, so neither is the training set.")
        return self.forget.union(self.retain)

    @cached_property
    def forgotten_labels(self) -> list[Any]:
        """Labels that occur in forget and nowhere in retain: classes forgotten as a whole.

        Real numbers are targets of a regression, not classes: none of them is forgotten as a whole.
        """
        if self.retain is None or not self.forget.has_column("label"):
            return []
        if self.forget.column("label").dtype.kind == "f":
            return []
        return sorted(set(self.forget.column("label").tolist()) - set(self.retain.column("label").tolist()))

    def like_forgotten(self, records: Records) -> Mask:
        """Mask of records that belong to a class forgotten as a whole, [records]."""
        if not self.forgotten_labels or not records.has_column("label"):
            return np.zeros(len(records), bool)
        return np.isin(records.column("label"), self.forgotten_labels)

    def summary(self) -> str:
        """Sizes of the parts in one line."""
        sizes = ", ".join(f"{name} {len(part)}" for name, part in self.parts.items())
        return f"{self.description}: {sizes}"


def split(
    records: Records,
    forget: Selection,
    test: float | Selection | Records = 0.2,
    holdout: float | Selection | Records = 0.2,
    seed: int = 0,
) -> ForgetSplit:
    """Divide records into forget, retain, test and holdout.

    Test and holdout are drawn first, in proportion within every label where there is a `"label"` column
    (along the sorted values where it holds real numbers);
    the forget rule is then applied to what remains, the training data. Records that the rule names one
    by one (`by_ids`) always remain in the training data. The same seed gives the same test and holdout
    for every rule without named ids, so that several requests can share one trained model.

    Args:
        records: All data.
        forget: What to forget.
        test: Share of all records to test on, or a rule, or records of your own.
        holdout: Share of all records to hold out as control group, or a rule, or records of your own.
        seed: Of the draws.

    Raises:
        UnknownIds, AbsentClass: If the rule names ids or values that do not exist.
        EmptyForgetSet, ForgetCoversEverything: If nothing or everything would be forgotten.
        InvalidSplit: If shares are out of range.

    Example:
        >>> import torch; from torch.utils.data import TensorDataset
        >>> from palimpsest.core.selection import by_column
        >>> data = Records(TensorDataset(torch.zeros(20, 1), torch.arange(20) % 2))
        >>> split(data, by_column("label", 1), test=0.2, holdout=0.2).summary()
        'label = 1: forget 6, retain 6, test 4, holdout 4'
    """
    forget.check(records)
    taken = np.isin(np.asarray(records.ids, dtype=object), list(forget.pinned))
    if isinstance(test, float | int) and isinstance(holdout, float | int) and not 0 <= test + holdout < 1:
        raise InvalidSplit(f"test + holdout must be below 1 to leave training data, not {test + holdout:g}.")
    random = np.random.default_rng(seed)
    chosen: dict[str, Records | None] = {}
    for name, wanted in (("test", test), ("holdout", holdout)):
        chosen[name], taken = _draw(records, name, wanted, taken, random)
    pinned = np.isin(np.asarray(records.ids, dtype=object), list(forget.pinned))
    train = records.select(~taken | pinned)
    mask = forget.mask(train)
    return ForgetSplit(
        train.select(mask), train.select(~mask), chosen["test"], chosen["holdout"], forget.description
    )


def _draw(
    records: Records,
    name: str,
    wanted: float | Selection | Records,
    taken: Mask,
    random: np.random.Generator,
) -> tuple[Records | None, Mask]:
    """One part and the mask of records now taken."""
    if isinstance(wanted, Records):
        own = np.isin(np.asarray(records.ids, dtype=object), wanted.ids)
        return wanted, taken | own
    if isinstance(wanted, Selection):
        wanted.check(records)
        mask = wanted.mask(records) & ~taken
    else:
        if not 0 <= wanted < 1:
            raise InvalidSplit(f"{name} must be a share between 0 and 1, not {wanted}.")
        mask = _proportional(records, round(wanted * len(records)), ~taken, random)
    if not mask.any():
        return None, taken
    return records.select(mask), taken | mask


def _proportional(records: Records, count: int, free: Mask, random: np.random.Generator) -> Mask:
    """`count` free records, spread over the labels in proportion (systematic sampling after sorting)."""
    candidates = random.permutation(np.flatnonzero(free))
    if count > len(candidates):
        ids = shorten(records.select(free).ids)
        raise InvalidSplit(f"{count} records were to be drawn, only {len(candidates)} are free ({ids}).")
    if records.has_column("label"):
        labels = records.column("label")[candidates]
        labels = labels.reshape(len(labels), -1)[:, 0] if labels.dtype.kind == "f" else labels.astype(str)
        ranks = np.unique(labels, return_inverse=True)[1]
        candidates = candidates[np.argsort(ranks, kind="stable")]
    steps = np.floor((np.arange(len(candidates)) + 1) * count / max(len(candidates), 1))
    mask = np.zeros(len(records), bool)
    mask[candidates[np.diff(steps, prepend=0.0) > 0]] = True
    return mask
