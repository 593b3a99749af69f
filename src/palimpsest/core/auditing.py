"""Audit: a question put to the evidence, and the registry of all audits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Outcome
from palimpsest.core.registry import Registry
from palimpsest.core.unlearner import build

Settings = Mapping[str, Any]


class Cost(StrEnum):
    """What an audit costs beside the shared forward passes."""

    SHARED = "shared passes only"
    ATTACK = "changes copies of the models"
    REPEAT = "repeats the method"
    SHADOW = "trains shadow models"


@dataclass(frozen=True)
class AuditCard:
    """What is known of an audit without running it.

    Attributes:
        name: By which it is called.
        code: Number in the audit checklist (card `sok`): "A1", "B4", ...
        summary: First line of its docstring.
        cost: Beside the shared passes.
        parts: Parts of the split that it needs.
        tasks: Domains that it works in.
        default: Whether it runs unless others are named.
        budgets: Settings by domain where its fields' defaults do not suit: a pass over texts is dearer than one
            over small images. What is set explicitly comes before them.
    """

    name: str
    code: str
    summary: str
    cost: Cost
    parts: tuple[str, ...]
    tasks: tuple[str, ...]
    default: bool
    budgets: Mapping[str, Settings] = field(default_factory=dict[str, Settings])


@runtime_checkable
class Audit(Protocol):
    """An audit, with its settings as fields of a frozen dataclass."""

    card: ClassVar[AuditCard]

    def run(self, evidence: Evidence) -> Outcome:
        """Measure original, unlearned and controls alike; never changes the models."""
        ...


@runtime_checkable
class Checked(Audit, Protocol):
    """An audit that can say before any work that it lacks something."""

    def check(self, evidence: Evidence) -> None:
        """Raise a `PalimpsestError` if it cannot be run."""
        ...


AUDITS: Registry[type[Audit]] = Registry(
    "audit", ("palimpsest.audit", "palimpsest.suites"), "palimpsest.audits"
)
"""All audits by name. Third parties register through the entry-point group `palimpsest.audits`."""

C = TypeVar("C")


def audit(
    name: str,
    *,
    code: str,
    cost: Cost = Cost.SHARED,
    parts: Iterable[str] = ("forget",),
    tasks: tuple[str, ...] = ("any",),
    default: bool = True,
    budgets: Mapping[str, Settings] | None = None,
) -> Callable[[type[C]], type[C]]:
    """Class decorator that makes a dataclass with `run` an audit called `name`."""

    def decorate(cls: type[C]) -> type[C]:
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        card = AuditCard(name, code, summary, cost, tuple(parts), tasks, default, budgets or {})
        cls.card = card  # pyright: ignore[reportAttributeAccessIssue]
        AUDITS.register(name)(cast(type[Audit], cls))
        return cls

    return decorate


def build_audit(name: str, task: str, settings: Settings | None = None) -> Audit:
    """An audit by name, with the budget of a domain and settings that come before it.

    Raises:
        UnknownName: For an unknown audit or setting; suggests the nearest.
        InvalidHyperparameter: For a value that the audit refuses.
    """
    cls = AUDITS.get(name)
    return build("audit", cls, name, {**cls.card.budgets.get(task, {}), **(settings or {})})
