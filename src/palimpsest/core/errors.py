"""Every error that Palimpsest raises: what was wrong, with the value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None if nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def shorten(values: Sequence[object], limit: int = 5) -> str:
    """The first few values as text, with the count of the rest."""
    shown = ", ".join(repr(value) for value in values[:limit])
    rest = len(values) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


class PalimpsestError(Exception):
    """Root of all errors that Palimpsest raises on purpose."""


class UnknownName(PalimpsestError):
    """A method, audit, data set, model or key that does not exist; suggests the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        close = nearest(name, known)
        hint = f"Did you mean '{close}'?" if close else f"Known: {', '.join(known) or 'none'}."
        super().__init__(f"Unknown {kind} '{name}'. {hint}")
        self.kind, self.name, self.suggestion = kind, name, close


class InvalidRecords(PalimpsestError):
    """Records whose ids, columns or values cannot be used."""


class DuplicateIds(InvalidRecords):
    """Record ids that are not unique."""


class UnknownIds(InvalidRecords):
    """Record ids that are named in a request and are not in the data."""


class InvalidSplit(PalimpsestError):
    """A request that cannot be turned into forget, retain, test and holdout."""


class EmptyForgetSet(InvalidSplit):
    """The request matches no training record."""


class ForgetCoversEverything(InvalidSplit):
    """The request matches every training record: nothing is left to retain."""


class AbsentClass(InvalidSplit):
    """A value is to be forgotten that no record has."""


class InvalidLabels(InvalidRecords):
    """Labels outside the model's classes, or not integers."""


class NonFinite(PalimpsestError):
    """NaN or Inf in weights or inputs, found before any work."""


class NonFiniteLoss(PalimpsestError):
    """A loss or weights became NaN or Inf while a method ran: its result is not a model."""


class ModelMismatch(PalimpsestError):
    """A model whose outputs do not fit the task, or whose weights do not fit the model."""


class MissingNeed(PalimpsestError):
    """A method lacks something that it must be given."""


class InvalidHyperparameter(PalimpsestError):
    """A hyperparameter outside its range."""


class UnreadableCheckpoint(PalimpsestError):
    """A weights file that is cut short, damaged or of another format."""


class PickleRefused(UnreadableCheckpoint):
    """A pickle: loading one can run any code, so Palimpsest never does."""


class CannotWrite(PalimpsestError):
    """A place that cannot be written: permission, a full disk, a folder in the way."""


class InvalidRecipe(PalimpsestError):
    """A study recipe with unknown keys or values out of range."""


class RunLocked(PalimpsestError):
    """Another process is working on the same run folder."""


class MissingDependency(PalimpsestError):
    """An optional library is not installed; names the extra that brings it."""

    def __init__(self, library: str, extra: str):
        super().__init__(
            f"'{library}' is not installed. Install it with: pip install 'palimpsest-ml[{extra}]'"
        )
        self.library, self.extra = library, extra


class InvalidAudit(PalimpsestError):
    """Models or settings that an audit cannot compare."""


class InvalidStream(PalimpsestError):
    """A stream of experiences that cannot be learned from."""


class MissingTaskId(InvalidStream):
    """A task id that is not there, where the setting tells it to the learner."""


class NotTrained(PalimpsestError):
    """A learner that is asked before it has seen anything."""
