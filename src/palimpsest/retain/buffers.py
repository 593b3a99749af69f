"""Buffers: the few records that a learner keeps of what it has met.

Every buffer holds rows of named fields (inputs, labels, and whatever a method adds: logits, features, task
ids), draws from a generator of its own, has an exact size, and can be saved and resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.core.errors import InvalidHyperparameter

Fields = dict[str, Tensor]


class Rows:
    """Storage: a growing table of named fields, one row per record.

    A field whose last axis grows (the logits of a growing head) is filled up with NaN on the right in the
    rows that are there: what was not known when a record was stored.
    """

    def __init__(self) -> None:
        self.fields: Fields = {}

    def __len__(self) -> int:
        return len(next(iter(self.fields.values()))) if self.fields else 0

    def put(self, slots: Int[Tensor, " records"], values: Mapping[str, Tensor]) -> None:
        """Write records into slots; slots at the end may be new."""
        if len(slots) == 0:
            return
        if self.fields and set(values) != set(self.fields):
            raise InvalidHyperparameter(f"The buffer holds {sorted(self.fields)}, not {sorted(values)}.")
        size = max(len(self), int(slots.max()) + 1)
        for name, value in values.items():
            value = value.detach()
            held = self.fields.get(name, value.new_empty((0, *value.shape[1:])))
            held, value = _as_wide(held, value), _as_wide(value, held)
            if len(held) < size:
                held = torch.cat([held, held.new_empty((size - len(held), *held.shape[1:]))])
            held[slots.to(held.device)] = value.to(held.device)
            self.fields[name] = held

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Only these rows, in this order."""
        self.fields = {name: value[rows.to(value.device)] for name, value in self.fields.items()}

    def at(self, rows: Int[Tensor, " drawn"]) -> Fields:
        """The records of some rows."""
        return {name: value[rows.to(value.device)] for name, value in self.fields.items()}

    @property
    def bytes(self) -> int:
        """Memory of all fields."""
        return sum(value.numel() * value.element_size() for value in self.fields.values())


class Reservoir:
    """A uniform sample of all records ever offered (Vitter, 1985).

    Args:
        size: Records kept.
        generator: For what is kept and drawn.

    Raises:
        InvalidHyperparameter: If the size is below 1.
    """

    def __init__(self, size: int, generator: torch.Generator):
        self.size, self.generator, self.seen, self.rows = _checked(size), generator, 0, Rows()

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, **values: Tensor) -> None:
        """Offer records, fields [records, ...]."""
        count = len(next(iter(values.values())))
        numbers = self.seen + torch.arange(count)
        draws = (torch.rand(count, generator=self.generator, dtype=torch.float64) * (numbers + 1)).long()
        slots = reservoir_slots(numbers, draws, self.size)
        self.seen += count
        last = {int(slot): item for item, slot in enumerate(slots.tolist()) if slot >= 0}
        items = torch.tensor(list(last.values()), dtype=torch.long)
        self.rows.put(torch.tensor(list(last), dtype=torch.long), _items(values, items))

    def draw(self, count: int) -> Fields:
        """min(count, kept) different records, uniformly; fields are [drawn, ...], none if it is empty."""
        return _draw(self.rows, count, self.generator)

    def all(self) -> Fields:
        """All records kept."""
        return dict(self.rows.fields)

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return self.rows.bytes

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        return {"seen": self.seen, "rows": dict(self.rows.fields), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.seen, self.rows.fields = int(state["seen"]), dict(state["rows"])
        self.generator.set_state(state["generator"].cpu())


class Ring:
    """The last records of every group, each group with its own first-in, first-out share.

    With `size` over `groups` groups each holds size // groups records, the first ones one more where that
    leaves a rest. Groups are told by the field `by`: "label", or "task".

    Args:
        size: Records kept in all.
        groups: Number of groups that will come (classes, or tasks).
        generator: For drawing.
        by: Field with the number of the group, from 0.

    Raises:
        InvalidHyperparameter: If there is not one slot per group.
    """

    def __init__(self, size: int, groups: int, generator: torch.Generator, by: str = "label"):
        self.size, self.by, self.generator = _checked(size, groups), by, generator
        self.shares = shares(size, groups)
        self.next = [0] * groups
        self.rows = Rows()
        self._slots: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, **values: Tensor) -> None:
        """Offer records; the field `by` is among them."""
        written: dict[int, int] = {}
        for item, group in enumerate(values[self.by].tolist()):
            if not 0 <= group < len(self.shares):
                raise InvalidHyperparameter(
                    f"The ring buffer has groups 0 to {len(self.shares) - 1}, not {group} ({self.by})."
                )
            place = (group, self.next[group] % self.shares[group])
            written[self._slots.setdefault(place, len(self._slots))] = item
            self.next[group] += 1
        items = torch.tensor(list(written.values()), dtype=torch.long)
        self.rows.put(torch.tensor(list(written), dtype=torch.long), _items(values, items))

    def draw(self, count: int) -> Fields:
        """min(count, kept) different records, uniformly."""
        return _draw(self.rows, count, self.generator)

    def all(self) -> Fields:
        """All records kept."""
        return dict(self.rows.fields)

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return self.rows.bytes

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        return {
            "next": list(self.next),
            "slots": [list(place) for place in self._slots],
            "rows": dict(self.rows.fields),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.next, self.rows.fields = [int(n) for n in state["next"]], dict(state["rows"])
        self._slots = {(int(a), int(b)): slot for slot, (a, b) in enumerate(state["slots"])}
        self.generator.set_state(state["generator"].cpu())


class ClassBalanced:
    """A uniform sample of every class (or other group) met so far, of equal size.

    Every record gets a random weight when it is offered; each class keeps those of largest weight, size //
    classes of them, the first classes one more where that leaves a rest. A class that has shown fewer keeps
    what there is, and its free slots are not given to others.

    Args:
        size: Records kept in all.
        generator: For what is kept and drawn.
        by: Field with the number of the group: "label", or "task".

    Raises:
        InvalidHyperparameter: If more classes come than there are slots.
    """

    def __init__(self, size: int, generator: torch.Generator, by: str = "label"):
        self.size, self.generator, self.by, self.rows = _checked(size), generator, by, Rows()
        self.weights = torch.empty(0, dtype=torch.float64)
        self.classes: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, **values: Tensor) -> None:
        """Offer records; the field `by` is among them."""
        labels = values[self.by]
        self.classes += [label for label in dict.fromkeys(labels.tolist()) if label not in self.classes]
        _checked(self.size, len(self.classes))
        fresh = torch.rand(len(labels), generator=self.generator, dtype=torch.float64)
        self.rows.put(len(self) + torch.arange(len(labels)), values)
        self.weights = torch.cat([self.weights, fresh])
        kept: list[Tensor] = []
        held = self.rows.fields[self.by].cpu()
        for label, share in zip(self.classes, shares(self.size, len(self.classes)), strict=True):
            own = torch.nonzero(held == label).flatten()
            kept.append(own[self.weights[own].argsort(descending=True)[:share]])
        rows = torch.cat(kept).sort().values
        self.rows.keep(rows)
        self.weights = self.weights[rows]

    def draw(self, count: int) -> Fields:
        """min(count, kept) different records, uniformly."""
        return _draw(self.rows, count, self.generator)

    def draw_balanced(self, count: int) -> Fields:
        """As many of each class as can be, the rest to classes drawn at random; without replacement."""
        held = self.rows.fields[self.by].cpu() if len(self) else torch.empty(0, dtype=torch.long)
        return self.rows.at(balanced_rows(held, count, self.generator)) if len(self) else {}

    def all(self) -> Fields:
        """All records kept."""
        return dict(self.rows.fields)

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return self.rows.bytes

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        return {
            "rows": dict(self.rows.fields),
            "weights": self.weights,
            "classes": list(self.classes),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.rows.fields, self.weights = dict(state["rows"]), state["weights"]
        self.classes = [int(label) for label in state["classes"]]
        self.generator.set_state(state["generator"].cpu())


class Herding:
    """Of every class the records whose mean comes nearest to the class's mean feature (iCaRL).

    Classes come whole, once each, at the end of their experience. Each keeps size // classes records, the
    first ones one more where that leaves a rest; when new classes come the lists of the old ones are cut at
    the end, where the least important are.

    Args:
        size: Records kept in all.
        generator: For drawing.
        normalise: Whether features are brought to length 1 first.
    """

    def __init__(self, size: int, generator: torch.Generator, normalise: bool = True):
        self.size, self.generator, self.normalise = _checked(size), generator, normalise
        self.rows = Rows()
        self.classes: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, features: Float[Tensor, "records dim"], **values: Tensor) -> None:
        """All records of new classes with their features (which are not stored).

        Raises:
            InvalidHyperparameter: If a class comes again, or more classes come than there are slots.
        """
        labels = values["label"]
        new = list(dict.fromkeys(labels.tolist()))
        again = [label for label in new if label in self.classes]
        if again:
            raise InvalidHyperparameter(f"Class {again[0]} has its exemplars already.")
        total = [*self.classes, *new]
        _checked(self.size, len(total))
        share = dict(zip(total, shares(self.size, len(total)), strict=True))
        if len(self):
            held = self.rows.fields["label"].cpu()
            cut = [torch.nonzero(held == label).flatten()[: share[label]] for label in self.classes]
            self.rows.keep(torch.cat(cut))
        for label in new:
            own = torch.nonzero(labels == label).flatten()
            chosen = own[
                herding_order(features[own], min(share[label], len(own)), self.normalise).to(own.device)
            ]
            self.rows.put(len(self) + torch.arange(len(chosen)), _items(values, chosen))
        self.classes = total

    def draw(self, count: int) -> Fields:
        """min(count, kept) different records, uniformly."""
        return _draw(self.rows, count, self.generator)

    def all(self) -> Fields:
        """All records kept, class by class, the most important of each first."""
        return dict(self.rows.fields)

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return self.rows.bytes

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        return {
            "rows": dict(self.rows.fields),
            "classes": list(self.classes),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""
        self.rows.fields, self.classes = dict(state["rows"]), [int(label) for label in state["classes"]]
        self.generator.set_state(state["generator"].cpu())


def reservoir_slots(
    numbers: Int[Tensor, " records"], draws: Int[Tensor, " records"], size: int
) -> Int[Tensor, " records"]:
    """Slot of each record of a stream, -1 for those that are dropped.

    Args:
        numbers: Position of the record in the stream, from 0.
        draws: A uniform integer in [0, number] for each; not read while the reservoir fills.
        size: Of the reservoir.
    """
    return torch.where(numbers < size, numbers, torch.where(draws < size, draws, -1))


def shares(size: int, groups: int) -> list[int]:
    """`size` slots over groups: equal, one more for the first ones where that leaves a rest.

    Example:
        >>> shares(11, 4)
        [3, 3, 3, 2]
    """
    return [size // groups + (group < size % groups) for group in range(groups)]


def herding_order(
    features: Float[Tensor, "records dim"], count: int, normalise: bool = True
) -> Int[Tensor, " picked"]:
    """Records picked one by one so that the mean of the picked stays nearest to the mean of all (iCaRL, alg. 4).

    The (m+1)-th is argmin_i || mu - (f_i + sum of the m picked) / (m + 1) ||, each record at most once.
    """
    rows = features / features.norm(dim=1, keepdim=True).clamp_min(1e-12) if normalise else features
    mean, total = rows.mean(0), torch.zeros_like(rows[0])
    free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    picked: list[int] = []
    for number in range(1, count + 1):
        distance = (mean - (rows + total) / number).norm(dim=1)
        best = int(distance.masked_fill(~free, float("inf")).argmin())
        picked.append(best)
        free[best] = False
        total = total + rows[best]
    return torch.tensor(picked, dtype=torch.long)


def balanced_rows(
    labels: Int[Tensor, " records"], count: int, generator: torch.Generator
) -> Int[Tensor, " drawn"]:
    """min(count, records) different rows, classes as equal as their sizes allow, in random order."""
    order = torch.randperm(len(labels), generator=generator)
    turn = torch.zeros(len(labels), dtype=torch.long)
    for label in labels.unique():
        own = labels[order] == label
        turn[own] = torch.arange(int(own.sum()))
    tie = torch.rand(len(labels), generator=generator)
    chosen = order[(turn + tie).argsort()[:count]]
    return chosen[torch.randperm(len(chosen), generator=generator)]


def known(logits: Float[Tensor, "records classes"]) -> Bool[Tensor, "records classes"]:
    """Entries of stored logits that were there when the record was stored (see `Rows`)."""
    return ~logits.isnan()


def _draw(rows: Rows, count: int, generator: torch.Generator) -> Fields:
    return rows.at(torch.randperm(len(rows), generator=generator)[:count]) if len(rows) else {}


def _items(values: Mapping[str, Tensor], items: Tensor) -> Fields:
    return {name: value[items.to(value.device)] for name, value in values.items()}


def _as_wide(value: Tensor, other: Tensor) -> Tensor:
    """`value` filled up with NaN to the last axis of `other`, where that is all that differs."""
    gap = other.shape[-1] - value.shape[-1] if value.dim() > 1 and other.dim() == value.dim() else 0
    if gap <= 0:
        return value
    if not value.is_floating_point() or value.shape[1:-1] != other.shape[1:-1]:
        raise InvalidHyperparameter(
            f"The buffer holds records of shape {tuple(other.shape[1:])}, not {tuple(value.shape[1:])}."
        )
    return torch.cat([value, value.new_full((*value.shape[:-1], gap), float("nan"))], -1)


def _checked(size: int, groups: int = 1) -> int:
    if size < 1 or size < groups:
        what = f" for {groups} classes" if groups > 1 else ""
        raise InvalidHyperparameter(f"A buffer of {size} records is too small{what}.")
    return size
