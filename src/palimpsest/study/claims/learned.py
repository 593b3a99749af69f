"""Measurements of learners that claims need and no accuracy shows, by name; one file per published system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from palimpsest.core.registry import Registry
from palimpsest.retain.running import Run


@dataclass
class Learned:
    """What a measurement is made on: one method on one stream with one seed.

    Attributes:
        make: A run of it that has not begun.
    """

    make: Callable[[], Run]

    @property
    def fresh(self) -> Run:
        """A run that has not begun, another one each time."""
        return self.make()

    @cached_property
    def finished(self) -> Run:
        """The run at its end, learned again once for all measurements; must not be changed."""
        run = self.make()
        with run.runtime.limited():
            while not run.finished:
                run.advance()
        return run


Measurement = Callable[[Learned], float]

LEARNED: Registry[Measurement] = Registry("measurement of learners", "palimpsest.study.claims")
"""Functions from `Learned` to a number, by "slug.name"."""

learned_measurement: Callable[[str], Callable[[Measurement], Measurement]] = LEARNED.register
