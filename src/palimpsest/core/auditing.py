"""Audit: a question put to the evidence, and the registry of all audits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol, TypeVar, cast, runtime_checkable

from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Outcome
from palimpsest.core.registry import Registry


class Cost(StrEnum):
    """What an audit costs beside the shared forward passes."""

    SHARED = "shared passes only"
    ATTACK = "changes copies of the models"
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
    """

    name: str
    code: str
    summary: str
    cost: Cost
    parts: tuple[str, ...]
    tasks: tuple[str, ...]
    default: bool


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
) -> Callable[[type[C]], type[C]]:
    """Class decorator that makes a dataclass with `run` an audit called `name`."""

    def decorate(cls: type[C]) -> type[C]:
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        card = AuditCard(name, code, summary, cost, tuple(parts), tasks, default)
        cls.card = card  # pyright: ignore[reportAttributeAccessIssue]
        AUDITS.register(name)(cast(type[Audit], cls))
        return cls

    return decorate
