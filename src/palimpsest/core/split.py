"""ForgetSplit: which records to forget, retain, test on, and hold out as a control group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from palimpsest.core.errors import EmptyForgetSet, ForgetCoversEverything, InvalidSplit, shorten
from palimpsest.core.records import Records
from palimpsest.core.selection import Mask, Selection

PARTS = ("forget", "retain", "test", "holdout")
RESERVED = "reserved"
"""Column that is 1 for retained records which models are trained on and methods may not look at."""


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

    @property
    def for_methods(self) -> ForgetSplit:
        """The split as a method may see it: without retained records whose column "reserved" is 1.

        Some benchmarks (MUSE) measure utility on retained data that methods must not train on.
        """
        if self.retain is None or not self.retain.has_column(RESERVED):
            return self
        open_ones = self.retain.column(RESERVED).astype(float) == 0
        if open_ones.all():
            return self
        return replace(self, retain=self.retain.select(open_ones) if open_ones.any() else None)

    def like_forgotten(self, records: Records) -> Mask:
        """Mask of records that belong to a class forgotten as a whole, [records]."""
        if not self.forgotten_labels or not records.has_column("label"):
            return np.zeros(len(records), bool)
        return np.isin(records.column("label"), self.forgotten_labels)

    def summary(self) -> str:
        """Sizes of the parts in one line."""
        sizes = ", ".join(f"{name} {len(part)}" for name, part in self.parts.items())
        return f"{self.description}: {sizes}"


def in_turn(requests: Sequence[ForgetSplit]) -> list[ForgetSplit]:
    """Requests on one training set that follow each other: each without the records that are gone by then.

    Test and holdout records of classes that earlier requests took wholly are left out as well.

    Raises:
        EmptyForgetSet, ForgetCoversEverything: If a request asks for nothing more, or for all that is left.
    """
    gone: set[str] = set()
    turns: list[ForgetSplit] = []
    for request in requests:
        turns.append(_without(gone, request, request.forget, request.retain, request.description))
        gone |= set(request.forget.ids)
    return turns


def at_the_end(turns: Sequence[ForgetSplit]) -> list[ForgetSplit]:
    """All but the last of the requests of `in_turn`, seen from the end: only the last one's records are retained."""
    last = turns[-1]
    return [
        _without(set(), turn, turn.forget, last.retain, f"{turn.description}, at the end")
        for turn in turns[:-1]
    ]


def _without(
    gone: set[str], request: ForgetSplit, forget: Records, retain: Records | None, description: str
) -> ForgetSplit:
    """A request about `forget` and `retain` without what is gone, tested on the classes that remain."""

    def left(records: Records | None) -> Records | None:
        if records is None or not gone:
            return records
        return records.select(np.array([identifier not in gone for identifier in records.ids], bool))

    kept = [part for part in (left(forget), left(retain)) if part is not None]

    def of_their_classes(records: Records | None) -> Records | None:
        if records is None or not all(part.has_column("label") for part in (records, *kept)):
            return records
        if records.column("label").dtype.kind == "f":  # targets of a regression
            return records
        present = np.concatenate([part.column("label") for part in kept])
        return records.select(np.isin(records.column("label"), present))

    if len(kept[0]) == 0:
        raise EmptyForgetSet(f"The request ({description}) matches no record that earlier ones left.")
    test, holdout = of_their_classes(request.test), of_their_classes(request.holdout)
    return ForgetSplit(kept[0], kept[1] if len(kept) > 1 else None, test, holdout, description)


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
    by one (`by_ids`) always remain in the training data: where the draw took one, another record (of its
    label, if there is one) goes in its place. So the same seed gives the same test and holdout for every
    rule whose named ids, if any, lie in the training data anyway, and several requests can share one
    trained model.

    Records with a `"part"` column ("train", "test", "holdout") are divided by it: shares and the seed are
    then not used (a rule or records of your own still are), and the forget rule is applied to the records
    of part "train". Where they have a `"fact"`
    column too, test records that ask for a forgotten fact in other words are left out: they are no measure
    of what must be retained.

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
    pinned = np.isin(np.asarray(records.ids, dtype=object), list(forget.pinned))
    if records.has_column("part"):
        return _by_part(records, forget, {"test": test, "holdout": holdout}, pinned)
    taken = np.zeros(len(records), bool)
    if isinstance(test, float | int) and isinstance(holdout, float | int) and not 0 <= test + holdout < 1:
        raise InvalidSplit(f"test + holdout must be below 1 to leave training data, not {test + holdout:g}.")
    random = np.random.default_rng(seed)
    chosen: dict[str, Records | None] = {}
    for name, wanted in (("test", test), ("holdout", holdout)):
        chosen[name], taken = _draw(records, name, wanted, taken, pinned, random)
    train = records.select(~taken | pinned)
    mask = forget.mask(train)
    return ForgetSplit(
        train.select(mask), train.select(~mask), chosen["test"], chosen["holdout"], forget.description
    )


def _by_part(
    records: Records, forget: Selection, rules: dict[str, float | Selection | Records], pinned: Mask
) -> ForgetSplit:
    """The parts that the column "part" names, but for those that have a rule or records of their own."""
    part = records.column("part")
    unknown = sorted({str(name) for name in part} - {"train", "test", "holdout"})
    if unknown:
        raise InvalidSplit(f"The column 'part' holds train, test and holdout, not {shorten(unknown)}.")
    taken = np.asarray(part != "train", bool)
    if (pinned & taken).any():
        astray = records.select(pinned & taken).ids
        raise InvalidSplit(
            f"{len(astray)} ids to forget are not of part 'train', so no model learnt them: {shorten(astray)}."
        )
    chosen: dict[str, Records | None] = {}
    for name, rule in rules.items():
        if isinstance(rule, Records | Selection):
            none, random = np.zeros(len(records), bool), np.random.default_rng(0)
            chosen[name], drawn = _draw(records, name, rule, none, pinned, random)
            taken = taken | drawn
        else:
            chosen[name] = records.select(part == name)
    train = records.select(~taken)
    forgotten = forget.mask(train)
    test, holdout = chosen["test"], chosen["holdout"]
    if test is not None and train.has_column("fact") and test.has_column("fact"):
        facts = set(train.column("fact")[forgotten].tolist())
        test = test.select(np.array([fact not in facts for fact in test.column("fact").tolist()], bool))
    return ForgetSplit(
        train.select(forgotten),
        train.select(~forgotten),
        test if test is not None and len(test) else None,
        holdout if holdout is not None and len(holdout) else None,
        forget.description,
    )


def _draw(
    records: Records,
    name: str,
    wanted: float | Selection | Records,
    taken: Mask,
    pinned: Mask,
    random: np.random.Generator,
) -> tuple[Records | None, Mask]:
    """One part and the mask of records now taken."""
    if isinstance(wanted, Records):
        own = np.isin(np.asarray(records.ids, dtype=object), wanted.ids)
        return wanted, taken | own
    if isinstance(wanted, Selection):
        wanted.check(records)
        mask = wanted.mask(records) & ~taken & ~pinned
    else:
        if not 0 <= wanted < 1:
            raise InvalidSplit(f"{name} must be a share between 0 and 1, not {wanted}.")
        mask = _proportional(records, round(wanted * len(records)), ~taken, pinned, random)
    if not mask.any():
        return None, taken
    return records.select(mask), taken | mask


def _proportional(
    records: Records, count: int, free: Mask, pinned: Mask, random: np.random.Generator
) -> Mask:
    """`count` free records, spread over the labels in proportion (systematic sampling after sorting).

    Drawn as if nothing were pinned; then others take the places of pinned ones.
    """
    candidates = random.permutation(np.flatnonzero(free))
    if count > int((free & ~pinned).sum()):
        ids = shorten(records.select(free & ~pinned).ids)
        raise InvalidSplit(
            f"{count} records were to be drawn, only {int((free & ~pinned).sum())} are free ({ids})."
        )
    if records.has_column("label"):
        labels = records.column("label")[candidates]
        labels = labels.reshape(len(labels), -1)[:, 0] if labels.dtype.kind == "f" else labels.astype(str)
        ranks = np.unique(labels, return_inverse=True)[1]
        candidates = candidates[np.argsort(ranks, kind="stable")]
    steps = np.floor((np.arange(len(candidates)) + 1) * count / max(len(candidates), 1))
    mask = np.zeros(len(records), bool)
    mask[candidates[np.diff(steps, prepend=0.0) > 0]] = True
    return _replaced(records, mask, free, pinned, random)


def _replaced(records: Records, drawn: Mask, free: Mask, pinned: Mask, random: np.random.Generator) -> Mask:
    """The draw with every pinned record exchanged for a free one, of its label as far as there are any."""
    clash = np.flatnonzero(drawn & pinned)
    if not len(clash):
        return drawn
    spare = random.permutation(np.flatnonzero(free & ~pinned & ~drawn))
    labels = records.column("label").astype(str) if records.has_column("label") else np.zeros(len(records))
    chosen: list[int] = []
    for label in np.unique(labels[clash]):
        alike = spare[labels[spare] == label]
        chosen += alike[: int((labels[clash] == label).sum())].tolist()
    rest = spare[~np.isin(spare, chosen)][: len(clash) - len(chosen)]
    mask = drawn & ~pinned
    mask[chosen], mask[rest] = True, True
    return mask
