"""Data sets by name."""

from __future__ import annotations

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
