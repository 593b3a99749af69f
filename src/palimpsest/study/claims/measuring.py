"""Measurements that claims need and no audit makes, by name; one file per published system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from palimpsest.core.registry import Registry
from palimpsest.core.runtime import Runtime
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task


@dataclass(frozen=True)
class Setting:
    """What a measurement is made on: one request and one seed of a study.

    Attributes:
        original: The trained model; must not be changed.
        split: The request.
        task: The domain.
        runtime: With the seed of unlearning.
    """

    original: nn.Module
    split: ForgetSplit
    task: Task
    runtime: Runtime


Measurement = Callable[[Setting], float]

MEASUREMENTS: Registry[Measurement] = Registry("measurement", "palimpsest.study.claims")
"""Functions from a `Setting` to a number, by "slug.name"."""

measurement: Callable[[str], Callable[[Measurement], Measurement]] = MEASUREMENTS.register
