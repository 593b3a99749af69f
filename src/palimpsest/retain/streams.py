"""Streams: the experiences that a learner meets one after the other.

Three settings, told apart by what changes and by what is known at test time: *class-incremental* (new
classes, no task id), *task-incremental* (new classes, the task id is told), *domain-incremental* (the same
classes, other inputs, no task id).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.core.errors import InvalidStream, MissingTaskId, shorten
from palimpsest.core.records import Records
from palimpsest.retain.transforms import changed, permutation, permuted, relabelled, rotated

Scenario = Literal["class", "task", "domain"]
SCENARIOS: tuple[Scenario, ...] = ("class", "task", "domain")


@dataclass(frozen=True)
class Experience:
    """One step of a stream.

    Attributes:
        records: To learn from.
        test: Of the same task, never trained on.
        index: Position in the stream, from 0.
        classes: Labels that occur in `records`, in order.
        task: Task id; None where the setting does not tell it.
        past: Training records of all earlier experiences. Only for learners that declare that they keep
            all data (the upper bound, rehearsal from everything); empty for all others.
    """

    records: Records
    test: Records
    index: int
    classes: tuple[int, ...]
    task: int | None = None
    past: tuple[Records, ...] = ()


@dataclass(frozen=True)
class Stream:
    """Experiences in their order.

    Attributes:
        experiences: At least one.
        scenario: "class", "task" or "domain".
        classes: Number of classes of the whole stream; labels run from 0 in the order of their coming.
        name: In words.
        online: Whether every record is seen once, whatever the number of epochs.
        returning: Whether classes may come back in a class-incremental stream (blurry boundaries, recurrence).
        order: Original label of each class.

    Raises:
        InvalidStream: For an experience without records or tests, a class that returns where none may,
            inputs of different shapes, labels outside the classes.
        MissingTaskId: If a task-incremental experience has no task id.
    """

    experiences: tuple[Experience, ...]
    scenario: Scenario
    classes: int
    name: str = "stream"
    online: bool = False
    returning: bool = False
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_stream(self)

    def __len__(self) -> int:
        return len(self.experiences)

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    def __getitem__(self, index: int) -> Experience:
        return self.experiences[index]

    def with_past(self, index: int) -> Experience:
        """An experience with the records of all earlier ones, for learners that keep all data."""
        return replace(self[index], past=tuple(before.records for before in self.experiences[:index]))


def check_stream(stream: Stream) -> None:
    """The checks of `Stream`."""
    if not stream.experiences:
        raise InvalidStream("A stream needs at least one experience.")
    if stream.scenario not in SCENARIOS:
        raise InvalidStream(f"The scenario must be one of {', '.join(SCENARIOS)}, not {stream.scenario!r}.")
    shape: tuple[int, ...] | None = None
    met: dict[int, int] = {}
    for number, experience in enumerate(stream):
        if len(experience.records) == 0 or len(experience.test) == 0:
            part = "records to learn from" if len(experience.records) == 0 else "test records"
            raise InvalidStream(f"Experience {number} of '{stream.name}' has no {part}.")
        if experience.index != number:
            raise InvalidStream(f"Experience {number} says that it is number {experience.index}.")
        if stream.scenario == "task" and experience.task is None:
            raise MissingTaskId(f"Experience {number} of a task-incremental stream has no task id.")
        if stream.scenario != "task" and experience.task is not None:
            raise InvalidStream(
                f"Experience {number} carries the task id {experience.task}, which a {stream.scenario}-incremental "
                "stream does not tell."
            )
        if (
            not experience.classes
            or not 0 <= min(experience.classes) <= max(experience.classes) < stream.classes
        ):
            raise InvalidStream(
                f"Experience {number} has classes {experience.classes}; the stream has {stream.classes}, from 0."
            )
        for part in (experience.records, experience.test):
            found = _shape(part)
            shape = shape or found
            if found != shape:
                raise InvalidStream(
                    f"Inputs of experience {number} have shape {found}, those before {shape}: bring all to one size."
                )
        if stream.scenario != "domain" and not stream.returning:
            back = [label for label in experience.classes if label in met]
            if back:
                raise InvalidStream(
                    f"Class {back[0]} comes in experience {met[back[0]]} and again in {number}. Classes of a "
                    f"{stream.scenario}-incremental stream come once; say returning=True if that is meant."
                )
        met |= dict.fromkeys(experience.classes, number)


def class_incremental(
    records: Records,
    sizes: Sequence[int],
    *,
    seed: int | None = None,
    order: Sequence[int] | None = None,
    test: float | Records = 0.2,
    test_seed: int = 0,
    scenario: Scenario = "class",
    blurry: float = 0.0,
    online: bool = False,
    name: str = "",
) -> Stream:
    """New classes in every experience.

    Labels become positions in the order in which classes come: the first class is 0.

    Args:
        records: With an integer column "label".
        sizes: Number of classes per experience; together all classes, or some of them.
        seed: Draws the order of the classes; None takes them in ascending order.
        order: The order itself.
        test: Share of each class, or records, to test on. A column "part" that says "test" decides before.
        test_seed: Of the draw of the share.
        scenario: "class", or "task" to tell the task id.
        blurry: Share of every class's records that are met in other experiences than its own, spread
            evenly over them.
        online: Whether every record is seen once.
        name: Of the stream.

    Raises:
        InvalidStream: If there are not enough classes, or a class has nothing to train or test on.
    """
    labels = _labels(records)
    known: list[int] = np.unique(labels).tolist()
    if order is None:
        order = (
            known if seed is None else [known[i] for i in np.random.default_rng(seed).permutation(len(known))]
        )
    if len(set(order)) != len(order) or not set(order) <= set(known):
        raise InvalidStream(
            f"The order must name classes of the data once each, {shorten(known)}; not {list(order)}."
        )
    if min(sizes, default=0) < 1 or sum(sizes) > len(order):
        raise InvalidStream(
            f"{list(sizes)} classes were asked for, the data have {len(order)}: give other sizes."
        )
    if not 0 <= blurry < 1:
        raise InvalidStream(
            f"The share of records that blur the boundaries must lie in [0, 1), not {blurry}."
        )
    if blurry and (scenario != "class" or len(sizes) < 2):
        raise InvalidStream(
            "Only the boundaries of a class-incremental stream of several experiences can be blurry."
        )
    chosen = [int(label) for label in order[: sum(sizes)]]
    train, held = divided(records.select(np.isin(labels, chosen)), test, test_seed)
    positions = {label: position for position, label in enumerate(chosen)}
    train, held = (
        relabelled(train, positions),
        relabelled(held.select(np.isin(held.column("label"), chosen)), positions),
    )
    home = np.repeat(np.arange(len(sizes)), sizes)
    places = home[train.column("label")]
    if blurry:
        places = _blurred(places, blurry, len(sizes), np.random.default_rng(0 if seed is None else seed))
    experiences = tuple(
        _experience(
            train.select(places == step), held.select(home[held.column("label")] == step), step,
            task=step if scenario == "task" else None,
        )
        for step in range(len(sizes))
    )  # fmt: skip
    return Stream(
        experiences,
        scenario,
        len(chosen),
        name or f"{scenario}-incremental",
        online,
        blurry > 0,
        tuple(chosen),
    )


def domain_incremental(
    records: Records,
    kind: Literal["permuted", "rotated"],
    tasks: int | Sequence[float],
    *,
    seed: int = 0,
    test: float | Records = 0.2,
    test_seed: int = 0,
    pad: int = 0,
    online: bool = False,
    name: str = "",
) -> Stream:
    """The same classes in every experience, with other inputs.

    Args:
        records: With an integer column "label" from 0.
        kind: "permuted" gives each experience a fixed random order of the input's values (pixels, columns,
            token positions), "rotated" a fixed angle in [0, 180).
        tasks: Number of experiences; for "rotated" also the angles themselves, in degrees.
        seed: Draws permutations or angles.
        test: Share of each class, or records, to test on.
        test_seed: Of the draw of the share.
        pad: Zeros around images before the permutation.
        online: Whether every record is seen once.
        name: Of the stream.

    Raises:
        InvalidStream: If the kind is unknown, or the inputs cannot be changed so.
    """
    labels = _labels(records)
    if labels.min() < 0:
        raise InvalidStream(f"Labels of a domain-incremental stream start at 0, not at {labels.min()}.")
    count = tasks if isinstance(tasks, int) else len(tasks)
    if count < 1:
        raise InvalidStream("A stream needs at least one experience.")
    train, held = divided(records, test, test_seed)
    generator = torch.Generator().manual_seed(seed)
    experiences: list[Experience] = []
    for step in range(count):
        if kind == "rotated":
            angle = (
                180.0 * float(torch.rand((), generator=generator)) if isinstance(tasks, int) else tasks[step]
            )
            change = partial(rotated, degrees=float(angle))
        elif kind == "permuted":
            change = partial(permuted, order=permutation(_values(train, pad), generator), pad=pad)
        else:
            raise InvalidStream(f"A domain-incremental stream is 'permuted' or 'rotated', not {kind!r}.")
        experiences.append(_experience(_in_domain(train, change, step), _in_domain(held, change, step), step))
    return Stream(
        tuple(experiences), "domain", int(labels.max()) + 1, name or f"domain-incremental ({kind})", online
    )


def from_parts(
    parts: Sequence[tuple[Records, Records]],
    scenario: Scenario,
    *,
    classes: int | None = None,
    online: bool = False,
    returning: bool = False,
    name: str = "stream",
) -> Stream:
    """A stream from the user's own pairs of training and test records, labels from 0.

    Raises:
        InvalidStream: If they make no stream.
    """
    for step, (train, test) in enumerate(parts):
        if len(train) == 0 or len(test) == 0:
            raise InvalidStream(f"Experience {step} of '{name}' has no records to learn from or to test on.")
    made = tuple(
        _experience(train, test, step, task=step if scenario == "task" else None)
        for step, (train, test) in enumerate(parts)
    )
    most = max((max(experience.classes) for experience in made), default=0) + 1
    return Stream(made, scenario, classes or most, name, online, returning)


def divided(records: Records, test: float | Records, seed: int = 0) -> tuple[Records, Records]:
    """Training and test records: as the column "part" says, as given, or a share of each class.

    Raises:
        InvalidStream: If the share is not in (0, 1).
    """
    if isinstance(test, Records):
        return records, test
    if records.has_column("part") and (records.column("part") == "test").any():
        held = records.column("part") == "test"
        return records.select(records.column("part") == "train"), records.select(held)
    if not 0 < test < 1:
        raise InvalidStream(f"The share of test records must lie in (0, 1), not {test}.")
    labels, random = _labels(records), np.random.default_rng(seed)
    held = np.zeros(len(records), bool)
    for label in np.unique(labels):
        of_class = random.permutation(np.flatnonzero(labels == label))
        held[of_class[: max(1, round(test * len(of_class)))]] = True
    return records.select(~held), records.select(held)


def _experience(records: Records, test: Records, index: int, task: int | None = None) -> Experience:
    classes = tuple(int(label) for label in np.unique(_labels(records))) if len(records) else ()
    return Experience(records, test, index, classes, task)


def _in_domain(records: Records, change: partial[Tensor], step: int) -> Records:
    return changed(records, "input", change, ids=[f"{name}@{step}" for name in records.ids])


def _blurred(places: np.ndarray, share: float, steps: int, random: np.random.Generator) -> np.ndarray:
    """Where each record is met: `share` of those of every home are spread over the other experiences."""
    blurred = places.copy()
    for home in range(steps):
        own = random.permutation(np.flatnonzero(places == home))
        away = own[: round(share * len(own))]
        others = [step for step in range(steps) if step != home]
        blurred[away] = np.resize(others, len(away))
    return blurred


def _labels(records: Records) -> np.ndarray:
    if not records.has_column("label") or records.column("label").dtype.kind not in "iu":
        raise InvalidStream("A stream needs records with an integer column 'label'.")
    return records.column("label")


def _shape(records: Records) -> tuple[int, ...]:
    value = records[0].get("input")
    if value is None:
        raise InvalidStream("A stream needs records with a field 'input'.")
    return tuple(value.shape)


def _values(records: Records, pad: int) -> int:
    shape = list(_shape(records))
    if pad:
        if len(shape) < 2:
            raise InvalidStream(f"Only images can be padded, not inputs of shape {tuple(shape)}.")
        shape[-2:] = [side + 2 * pad for side in shape[-2:]]
    return int(np.prod(shape))
