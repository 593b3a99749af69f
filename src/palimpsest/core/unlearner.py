"""Unlearner: a method that makes a trained model forget after the fact, and its registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, runtime_checkable

from torch import nn

from palimpsest.core.errors import InvalidHyperparameter, UnknownName
from palimpsest.core.needs import Need
from palimpsest.core.registry import Registry
from palimpsest.core.runtime import Runtime
from palimpsest.core.search_space import Searchable
from palimpsest.core.split import ForgetSplit
from palimpsest.core.task import Task

Intention = Literal["removal", "suppression"]


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    venue: str
    arxiv: str | None = None

    @property
    def link(self) -> str | None:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


@dataclass(frozen=True)
class Card:
    """What is known of a method without running it.

    Attributes:
        name: By which it is called.
        summary: First line of its docstring.
        needs: What it must be given.
        tasks: Domains that it works in; "any" for methods that use only the calls of `Task`.
        paper: Where it was published; None for folklore.
        search: Where `palimpsest tune` looks for hyperparameters, by field.
        intention: What it means to do: "removal" of the knowledge, or "suppression" of its expression.
    """

    name: str
    summary: str
    needs: frozenset[Need]
    tasks: tuple[str, ...]
    paper: Paper | None
    search: Mapping[str, Searchable] = field(default_factory=dict[str, Searchable])
    intention: Intention = "removal"


@runtime_checkable
class Unlearner(Protocol):
    """A method, with its hyperparameters as fields of a frozen dataclass."""

    card: ClassVar[Card]

    def unlearn(self, model: nn.Module, split: ForgetSplit, task: Task, runtime: Runtime) -> nn.Module:
        """A new model without the trace of `split.forget`. Never changes the model it is given."""
        ...


UNLEARNERS: Registry[type[Unlearner]] = Registry(
    "method", ("palimpsest.forget", "palimpsest.suites"), "palimpsest.methods"
)
"""All methods by name. Third parties register through the entry-point group `palimpsest.methods`."""

C = TypeVar("C")


def unlearner(
    name: str,
    *,
    needs: Iterable[Need],
    tasks: tuple[str, ...] = ("any",),
    paper: Paper | None = None,
    search: Mapping[str, Searchable] | None = None,
    intention: Intention = "removal",
) -> Callable[[type[C]], type[C]]:
    """Class decorator that makes a dataclass with `unlearn` a method called `name`.

    Raises:
        UnknownName: If `search` names what is no field; suggests the nearest.

    Example:
        >>> from dataclasses import dataclass
        >>> @unlearner("noop-example", needs={Need.MODEL})
        ... @dataclass(frozen=True)
        ... class Noop:
        ...     '''Return a copy.'''
        ...     def unlearn(self, model, split, task, runtime):
        ...         import copy
        ...         return copy.deepcopy(model)
        >>> Noop.card.summary
        'Return a copy.'
    """

    def decorate(cls: type[C]) -> type[C]:
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        if search:
            check_settings("method", cls, name, search)
        cls.card = Card(name, summary, frozenset(needs), tasks, paper, search or {}, intention)  # pyright: ignore[reportAttributeAccessIssue]
        UNLEARNERS.register(name)(cast(type[Unlearner], cls))
        return cls

    return decorate


def build(kind: str, cls: type[C], name: str, settings: Mapping[str, Any]) -> C:
    """An instance of a registered dataclass from named settings.

    Raises:
        UnknownName: For a setting that the class has not; suggests the nearest.
        InvalidHyperparameter: For a value that the class refuses.
    """
    check_settings(kind, cls, name, settings)
    try:
        return cls(**settings)
    except (TypeError, ValueError) as problem:
        raise InvalidHyperparameter(f"{kind} '{name}': {problem}") from problem


def named(kind: str, registry: Registry[type[Any]], given: Any) -> Any:
    """What a registered name stands for: built from the name, from a mapping of "name" and settings, or as it is.

    Raises:
        UnknownName: For a name or a setting that does not exist; suggests the nearest.
        InvalidHyperparameter: For a mapping without a name, or a value that is refused.
    """
    if isinstance(given, str):
        return registry.get(given)()
    if not isinstance(given, Mapping):
        return given
    settings = dict(cast(Mapping[str, Any], given))
    if "name" not in settings:
        raise InvalidHyperparameter(f"A {kind} is named: {{'name': ..., settings}}, not {given!r}.")
    name = str(settings.pop("name"))
    return build(kind, registry.get(name), name, settings)


def check_settings(kind: str, cls: type, name: str, settings: Iterable[str]) -> None:
    """Check that settings are fields of a registered dataclass.

    Raises:
        UnknownName: For one that is not; suggests the nearest.
    """
    known = [item.name for item in fields(cast(Any, cls)) if item.init]
    for key in settings:
        if key not in known:
            raise UnknownName(f"hyperparameter of {kind} '{name}'", key, known)


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Check that a hyperparameter lies in [low, high] (or (low, high]).

    Raises:
        InvalidHyperparameter: If it does not, or is no number.
    """
    if not isinstance(value, Real):
        raise InvalidHyperparameter(f"{name} must be a number, not {value!r}.")
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside:
        bracket = "(" if open_low else "["
        raise InvalidHyperparameter(f"{name} must lie in {bracket}{low:g}, {high:g}], not {value!r}.")
