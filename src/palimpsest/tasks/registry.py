"""Tasks by name, for recipes and the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from palimpsest.core.records import Records
from palimpsest.core.registry import Registry
from palimpsest.core.task import Task
from palimpsest.core.unlearner import build

TASKS: Registry[type[Any]] = Registry("task", "palimpsest.tasks", "palimpsest.tasks")
"""Dataclasses that are a `Task`, by name."""

C = TypeVar("C", bound=type[Any])


def task(name: str) -> Callable[[C], C]:
    """Class decorator that makes a dataclass a task called `name`."""

    def decorate(cls: C) -> C:
        TASKS.register(name)(cls)
        return cls

    return decorate


def build_task(name: str, settings: Mapping[str, Any], train: Records, whole: Records | None = None) -> Task:
    """A task by name, fitted to the training records where it has something to fit (a scale of targets).

    Args:
        name: Of the task.
        settings: Its fields.
        train: Training records.
        whole: All records, for tasks that are fitted to them (`fits_whole`: a tokenizer made from training
            texts alone would cut names of others into more tokens, and so tell members from others).

    Raises:
        UnknownName: For a task or a setting that does not exist; suggests the nearest.
        InvalidHyperparameter: For a value that the task refuses.
        InvalidRecords: If the training records do not let it be fitted.
    """
    built = build("task", TASKS.get(name), name, settings)
    seen = whole if whole is not None and getattr(built, "fits_whole", False) else train
    return cast(Task, built.fitted(seen) if hasattr(built, "fitted") else built)
