"""Names for things: methods, audits, data sets, models. One decorator registers, entry points extend."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from palimpsest.core.errors import PalimpsestError, UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from name to entry that fills itself on first use.

    Args:
        kind: What the entries are, for error messages ("method", "audit", ...).
        package: Dotted package whose modules register entries when imported, or several; imported on first
            look-up.
        group: Entry-point group through which other distributions register theirs: each entry point
            names a module (imported for its decorators) or an already decorated object.
    """

    def __init__(self, kind: str, package: str | tuple[str, ...], group: str | None = None):
        self.kind, self.group = kind, group
        self.packages = (package,) if isinstance(package, str) else package
        self._entries: dict[str, T] = {}
        self._loaded = False
        self._makers: list[Callable[[str], T | None]] = []

    def made_by(self, maker: Callable[[str], T | None]) -> Callable[[str], T | None]:
        """Decorator for what makes entries of names that are put together ("rule+method").

        A maker gets a name that is not registered, and gives the entry, or None if the name is not of its
        kind. Such entries are found by `get`, and not listed: there are too many.
        """
        self._makers.append(maker)
        return maker

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores the decorated object under `name`; a name is taken only once."""

        def store(entry: T) -> T:
            known = self._entries.get(name)
            same_place = (getattr(known, "__module__", 0), getattr(known, "__qualname__", 0)) == (
                getattr(entry, "__module__", 1),
                getattr(entry, "__qualname__", 1),
            )
            if known is not None and not same_place:
                raise PalimpsestError(f"The {self.kind} name '{name}' is taken by {known!r}.")
            self._entries[name] = entry
            return entry

        return store

    def get(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            UnknownName: If there is none; the message suggests the nearest name.
        """
        if name not in self._entries:
            self.load()
        if name in self._entries:
            return self._entries[name]
        for maker in self._makers:
            made = maker(name)
            if made is not None:
                return made
        raise UnknownName(self.kind, name, self._entries)

    def names(self) -> list[str]:
        """All names, sorted."""
        self.load()
        return sorted(self._entries)

    def items(self) -> Iterator[tuple[str, T]]:
        """All (name, entry) pairs, sorted by name."""
        for name in self.names():
            yield name, self._entries[name]

    def load(self) -> None:
        """Import every module of the packages and every entry point of the group, once."""
        if self._loaded:
            return
        self._loaded = True
        for name in self.packages:
            package = importlib.import_module(name)
            for module in pkgutil.walk_packages(package.__path__, f"{name}."):
                if not module.name.rpartition(".")[2].startswith("_"):
                    importlib.import_module(module.name)
        for entry in entry_points(group=self.group) if self.group else ():
            entry.load()
