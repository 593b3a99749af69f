"""Data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from palimpsest.core.errors import InvalidHyperparameter
from palimpsest.core.records import Records
from palimpsest.core.registry import Registry

DATASETS: Registry[Callable[..., Records]] = Registry("data set", "palimpsest.data", "palimpsest.data")
"""Functions that return `Records`, by name."""

dataset = DATASETS.register


def load_data(name: str, **settings: Any) -> Records:
    """The records of a data set by name.

    Raises:
        UnknownName: If there is no such data set; suggests the nearest.
        InvalidHyperparameter: If it does not take the settings.
    """
    factory = DATASETS.get(name)
    try:
        return factory(**settings)
    except TypeError as problem:
        raise InvalidHyperparameter(f"Data set '{name}': {problem}") from problem


def parse_data(text: str, **settings: Any) -> Records:
    """The records that a short form names: "digits", "image-folder:photos", "arrays:table.npz".

    What follows the colon is the data set's first setting (its folder or file).

    Raises:
        UnknownName: If there is no such data set; suggests the nearest.
    """
    name, _, place = text.partition(":")
    if place:
        first = next(iter(inspect.signature(DATASETS.get(name)).parameters), None)
        if first is None:
            raise InvalidHyperparameter(f"Data set '{name}' takes no '{place}' after the colon.")
        settings = {first: place, **settings}
    return load_data(name, **settings)
