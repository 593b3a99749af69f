"""Tasks by name, for recipes and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from palimpsest.core.records import Records
from palimpsest.core.registry import Registry
from palimpsest.core.task import Task
from palimpsest.core.unlearner import build

TASKS: Registry[type[Any]] = Registry("task", "palimpsest.tasks", "palimpsest.tasks")
"""Dataclasses that are a `Task`, by name."""

task = TASKS.register


def build_task(name: str, settings: Mapping[str, Any], train: Records) -> Task:
    """A task by name, fitted to the training records where it has something to fit (a scale of targets).

    Raises:
        UnknownName: For a task or a setting that does not exist; suggests the nearest.
        InvalidHyperparameter: For a value that the task refuses.
        InvalidRecords: If the training records do not let it be fitted.
    """
    built = build("task", TASKS.get(name), name, settings)
    return cast(Task, built.fitted(train) if hasattr(built, "fitted") else built)
