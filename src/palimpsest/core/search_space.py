"""Where good hyperparameters are searched: ranges and choices, declared on every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from palimpsest.core.errors import InvalidHyperparameter


@dataclass(frozen=True)
class Span:
    """A range of numbers.

    Attributes:
        low: Smallest value.
        high: Largest value.
        log: Whether orders of magnitude are equally likely, instead of values.
        integer: Whether only whole numbers are meant.

    Raises:
        InvalidHyperparameter: If it is empty, or logarithmic and not above 0.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise InvalidHyperparameter(
                f"A range needs low < high, and low > 0 if it is logarithmic: {self}."
            )
        if self.integer and (self.low % 1 or self.high % 1):
            raise InvalidHyperparameter(f"A range of whole numbers has whole ends: {self}.")

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}{':int' if self.integer else ''}"


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Attributes:
        values: At least two: strings, numbers, truth values or None.

    Raises:
        InvalidHyperparameter: If there is nothing to choose.
    """

    values: tuple[str | float | bool | None, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) < 2:
            raise InvalidHyperparameter(f"A choice needs two values or more: {self.values}.")

    def __str__(self) -> str:
        return ",".join(str(value) for value in self.values)


Searchable = Span | Choice


def read_space(text: str) -> Searchable:
    """A range or choice from its short form.

    "1e-4..1e-2:log" is logarithmic, "1..10:int" of whole numbers, "0.1..0.9" plain; "adam,sgd" is a choice.

    Raises:
        InvalidHyperparameter: If it cannot be read.

    Example:
        >>> read_space("1e-4..1e-2:log")
        Span(low=0.0001, high=0.01, log=True, integer=False)
        >>> read_space("adam,sgd")
        Choice(values=('adam', 'sgd'))
    """
    span, *marks = text.split(":")
    low, dots, high = span.partition("..")
    if not dots:
        return Choice(tuple(_value(item.strip()) for item in text.split(",")))
    if set(marks) - {"log", "int"}:
        raise InvalidHyperparameter(f"A range may end in :log or :int, not '{text}'.")
    try:
        return Span(float(low), float(high), "log" in marks, "int" in marks)
    except ValueError as problem:
        raise InvalidHyperparameter(
            f"Cannot read the range '{text}': write 1e-4..1e-2:log or 1..10:int."
        ) from problem


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
