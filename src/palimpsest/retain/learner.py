"""Learner: a method that learns a stream of experiences and keeps what it knows.

A learner is a dataclass of hyperparameters. `begin` gives it a student; then it observes one experience
after the other, in a training loop that stands in its own file, and predicts at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, cast, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from palimpsest.core.errors import ModelMismatch, NotTrained
from palimpsest.core.records import Batch
from palimpsest.core.registry import Registry
from palimpsest.core.search_space import Searchable
from palimpsest.core.unlearner import Paper, build, check_settings
from palimpsest.retain.streams import SCENARIOS, Experience, Scenario
from palimpsest.retain.student import Student


class Keeps(StrEnum):
    """What a learner keeps of the past, or must be given."""

    RECORDS = "records"
    LOGITS = "logits"
    FEATURES = "features"
    MODEL = "old model"
    IMPORTANCE = "importances"
    PROTOTYPES = "prototypes"
    ALL_DATA = "all data"
    BOUNDARIES = "boundaries"
    PRETRAINED = "pretrained"


@dataclass(frozen=True)
class LearnerCard:
    """What is known of a learner without running it.

    Attributes:
        name: By which it is called.
        summary: First line of its docstring.
        scenarios: Settings in which it works.
        keeps: What it keeps or needs.
        paper: Where it was published; None for folklore.
        search: Where good hyperparameters are looked for, by field.
    """

    name: str
    summary: str
    scenarios: tuple[Scenario, ...]
    keeps: frozenset[Keeps]
    paper: Paper | None
    search: Mapping[str, Searchable] = field(default_factory=dict[str, Searchable])


@runtime_checkable
class Learner(Protocol):
    """A continual learner."""

    card: ClassVar[LearnerCard]
    student: Student

    def begin(self, student: Student) -> None:
        """Take a fresh student and forget any earlier one."""
        ...

    def observe(self, experience: Experience) -> None:
        """Learn from one experience."""
        ...

    def predict(self, batch: Batch) -> Int[Tensor, " batch"]:
        """Labels of a batch. It has a field "task" only in a task-incremental stream, and never labels."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data from which `load_state_dict` goes on; the student's under "student"."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, after `begin`."""
        ...


LEARNERS: Registry[type[Learner]] = Registry("learner", "palimpsest.retain", "palimpsest.learners")
"""All learners by name. Third parties register through the entry-point group `palimpsest.learners`."""

C = TypeVar("C")


def learner(
    name: str,
    *,
    scenarios: Iterable[Scenario] = SCENARIOS,
    keeps: Iterable[Keeps] = (),
    paper: Paper | None = None,
    search: Mapping[str, Searchable] | None = None,
) -> Callable[[type[C]], type[C]]:
    """Class decorator that makes a dataclass a learner called `name`.

    Raises:
        UnknownName: If `search` names what is no field; suggests the nearest.
    """

    def decorate(cls: type[C]) -> type[C]:
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        if search:
            check_settings("learner", cls, name, search)
        found = cast(Any, cls)
        found.card = LearnerCard(name, summary, tuple(scenarios), frozenset(keeps), paper, search or {})
        found.student = _NotBegun()
        LEARNERS.register(name)(cast(type[Learner], cls))
        return cls

    return decorate


def build_learner(
    name: str, settings: Mapping[str, Any] | None = None, scenario: Scenario | None = None
) -> Learner:
    """A learner by name, with its hyperparameters.

    Raises:
        UnknownName: For a learner or a hyperparameter that does not exist; suggests the nearest.
        InvalidHyperparameter: For a value that it refuses.
        ModelMismatch: If it does not work in the scenario.
    """
    built = cast(Learner, build("learner", LEARNERS.get(name), name, settings or {}))
    if scenario is not None and scenario not in built.card.scenarios:
        raise ModelMismatch(
            f"Learner '{name}' works in {', '.join(built.card.scenarios)}-incremental streams, not in "
            f"{scenario}-incremental ones."
        )
    return built


class _NotBegun:
    """Stands for the student of a learner that has none yet."""

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise NotTrained(
            f"{owner.__name__} has no student yet: call begin(student), or palimpsest.retain.learn(...)."
        )
