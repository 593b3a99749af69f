"""Benchmarks by name: what `--bench NAME` fills into a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from palimpsest.core.registry import Registry

Tree = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A published or generated benchmark.

    Attributes:
        name: By which it is called.
        summary: First line of its description.
        recipe: From the user's model and data (a Hub name or folder each, or None) to the recipe without
            methods and seeds.
        settings: Hyperparameters of a method that suit its own small model, from the method's name.
    """

    name: str
    summary: str
    recipe: Callable[[str | None, str | None], Tree]
    settings: Callable[[str], Tree]

    def methods(self, listed: list[Any], model: str | None = None) -> list[Tree]:
        """The methods with the benchmark's settings; what a method is given by hand stays.

        With the user's own model methods have their published settings, which are for large ones.
        """
        filled: list[Tree] = []
        for item in listed:
            tree: Tree = {"name": item} if isinstance(item, str) else dict(item)
            own = self.settings(tree["name"]) if model is None else {}
            filled.append({**tree, "settings": {**own, **tree.get("settings", {})}})
        return filled


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "palimpsest.suites", "palimpsest.benchmarks")
"""All benchmarks by name. Third parties register through the entry-point group `palimpsest.benchmarks`."""


def benchmark(
    name: str, settings: Mapping[str, Tree] | Callable[[str], Tree] | None = None
) -> Callable[[Callable[[str | None, str | None], Tree]], Callable[[str | None, str | None], Tree]]:
    """Decorator that makes a function from model and data to a recipe a benchmark.

    Args:
        name: By which it is called.
        settings: Hyperparameters by method, those of "*" for all; or a function from the method's name.
    """

    def chosen(method: str) -> Tree:
        if callable(settings):
            return settings(method)
        given = settings or {}
        return {**given.get("*", {}), **given.get(method, {})}

    def decorate(
        function: Callable[[str | None, str | None], Tree],
    ) -> Callable[[str | None, str | None], Tree]:
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        BENCHMARKS.register(name)(Benchmark(name, summary, function, chosen))
        return function

    return decorate
