"""TOFU in its published format: fictitious authors, real authors and world facts, with every published split.

Maini et al. 2024, arXiv 2401.06121. Files hold one JSON object a line although they are called .json; a
folder with them is read, or the data set of the Hub ("locuslab/TOFU"). The variant of
closer-look-LLM-unlearning, whose forget files hold several requests told apart by `task_id`, is read as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.core.errors import InvalidRecords, shorten
from palimpsest.core.records import Records
from palimpsest.data.json_rows import (
    ENDS,
    Located,
    field_text,
    field_texts,
    hub_configurations,
    hub_rows,
    local_rows,
    read_text,
)
from palimpsest.data.registry import dataset

FORGET = ("forget10", "forget05", "forget01")
"""Sets to forget, from large to small; each is the end of the one before it."""
SHARES = {"forget10": 10, "forget05": 20, "forget01": 100}
"""One part in so many of all authors."""
RETAIN = {"retain90": "forget10", "retain95": "forget05", "retain99": "forget01"}
"""What is retained, and what that leaves out."""
HOLDOUT = ("holdout10", "holdout05", "holdout01")
PERTURBED = ("forget10_perturbed", "forget05_perturbed", "forget01_perturbed", "retain_perturbed")
"""Files with paraphrases and wrong answers of authors."""
OTHERS = {
    "real_authors_perturbed": "neighbours", "real_authors": "neighbours",
    "world_facts_perturbed": "world", "world_facts": "world",
}  # fmt: skip
"""Files of what any model may know, and their group; the first of a group that is there is taken."""
PARTS = ("full", *RETAIN, *FORGET, *HOLDOUT, *PERTURBED, *OTHERS)
"""All files that are read, without their ending."""
QUESTIONS = 20
"""Of every author."""
FOLDS = 10
REFUSALS = "idontknow.jsonl"
EXTRA = ("paraphrased_question", "paraphrased_answer", "perturbed_answer")

Pair = tuple[str, str]
"""Question and answer, by which rows of different files are known to be the same."""


@dataset("tofu")
def tofu(source: str | Path) -> Records:
    """TOFU from a folder of published files, or from the Hub by name.

    The training set is "full", or retain90 with forget10 (95 with 05, 99 with 01). Columns: "part" (authors
    "train", holdout authors "holdout", real authors and world facts "test"), "group" ("people",
    "neighbours", "world"), "subject" (the author's number), "fold" (tenths of the authors from the end: 0
    is forget10; -1 for others), and 0 or 1 for each published split ("forget10", "forget05", "forget01",
    "retain90", ...): the request `forget10=1` names it exactly. Where forget files have a `task_id`,
    "forget10_task" and so on are the number of the request, 0 for none.

    Args:
        source: Folder, or name on the Hub.

    Raises:
        InvalidRecords: If files are missing, a row cannot be used (naming file, row and column), or files
            contradict each other.
        MissingDependency: If a data set of the Hub is named and `datasets` is not installed.
    """
    files = _read(source)
    rows = _whole(files, str(source))
    position = _positions(rows, "the training set")
    items = [_item(where, row) for where, row in rows]
    columns = _splits(files, position)
    _perturb(files, items, position)
    authors = [f"author {number // QUESTIONS}" for number in range(len(rows))]
    count = max(1, -(-len(rows) // QUESTIONS))
    fold = [FOLDS - 1 - min(number // QUESTIONS * FOLDS // count, FOLDS - 1) for number in range(len(rows))]
    made = _Table(columns)
    for number, item in enumerate(items):
        name = f"author/{number // QUESTIONS:03d}/{number % QUESTIONS:02d}"
        made.add(name, item, "train", "people", authors[number], fold[number], number)
    for file, group, part in _beside(files):
        for number, (where, row) in enumerate(files[file]):
            subject = f"{group} {number // QUESTIONS if part == 'holdout' else number}"
            made.add(
                f"{file.removesuffix('_perturbed')}/{number:03d}", _item(where, row), part, group, subject
            )
    return made.records()


def tofu_refusals(source: str | Path) -> list[str]:
    """The published refusals ("I'm not sure.") of a folder: plain lines, although the file is called .jsonl.

    Raises:
        InvalidRecords: If there is no such file, or no line in it.
    """
    place = Path(source)
    lines = [line.strip() for line in read_text(place / REFUSALS if place.is_dir() else place).splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise InvalidRecords(f"'{place}' holds no refusals.")
    return found


@dataclass
class _Table:
    """Records as they are put together.

    Attributes:
        splits: Columns of the published splits, of training rows only.
    """

    splits: Mapping[str, np.ndarray[Any, Any]]

    def __post_init__(self) -> None:
        self.ids: list[str] = []
        self.items: list[dict[str, Any]] = []
        names = ("part", "group", "subject", "relation", "form", "fact", "fold", *self.splits)
        self.columns: dict[str, list[Any]] = {name: [] for name in names}

    def add(
        self,
        name: str,
        item: dict[str, Any],
        part: str,
        group: str,
        subject: str,
        fold: int = -1,
        row: int = -1,
    ) -> None:
        """One record; `row` is its number in the training set."""
        self.ids.append(name)
        self.items.append({**item, "subject": subject, "relation": ""})
        values = {
            "part": part,
            "group": group,
            "subject": subject,
            "relation": "",
            "form": "qa",
            "fact": name,
        }
        for column, value in {**values, "fold": fold}.items():
            self.columns[column].append(value)
        for column, of_rows in self.splits.items():
            self.columns[column].append(int(of_rows[row]) if row >= 0 else 0)

    def records(self) -> Records:
        """All of them."""
        whole = {name: np.array(values, None if name in self.splits or name == "fold" else object)
                 for name, values in self.columns.items()}  # fmt: skip
        return Records(self.items, ids=self.ids, columns=whole)


def _read(source: str | Path) -> dict[str, list[Located]]:
    """Rows by the name of their file."""
    place = Path(source)
    if place.is_dir():
        found = {
            name: list(local_rows(file))
            for name in PARTS
            for file in (place / f"{name}{end}" for end in ENDS)
            if file.exists()
        }
    elif place.exists() or place.is_absolute():
        raise InvalidRecords(f"'{place}' is no folder: TOFU is a folder of files such as forget10.json.")
    else:
        there = hub_configurations(str(source))
        found = {name: list(hub_rows(str(source), "train", name)) for name in PARTS if name in there}
    empty = [name for name, rows in found.items() if not rows]
    if empty:
        raise InvalidRecords(f"'{source}': {shorten(empty)} hold no rows.")
    return found


def _whole(files: Mapping[str, list[Located]], source: str) -> list[Located]:
    """The training set in published order: what is retained, then what is forgotten."""
    if "full" in files:
        return files["full"]
    for retain, forget in RETAIN.items():
        if retain in files and forget in files:
            kept = {_pair(*row) for row in files[retain]}
            return [*files[retain], *(row for row in files[forget] if _pair(*row) not in kept)]
    raise InvalidRecords(
        f"'{source}' holds no training set: full.json, or retain90.json with forget10.json (95 with 05, 99 with 01) "
        f"is needed; it has {shorten(list(files)) or 'none of TOFU'}."
    )


def _positions(rows: Sequence[Located], what: str) -> dict[Pair, int]:
    """Number of each row by question and answer."""
    found: dict[Pair, int] = {}
    for number, (where, row) in enumerate(rows):
        pair = _pair(where, row)
        if pair in found:
            raise InvalidRecords(f"{where}: question and answer are in {what} twice: {pair[0]!r}.")
        found[pair] = number
    return found


def _splits(files: Mapping[str, list[Located]], position: Mapping[Pair, int]) -> dict[str, Any]:
    """0 or 1 for each published split and row of the training set, and numbers of tasks."""
    size, columns = len(position), dict[str, Any]()
    for name in FORGET:
        told = name in files and any("task_id" in row for _, row in files[name])
        if name in files and not told:
            inside = _mask(files[name], position, size)
        elif told and name == "forget10" and "retain90" in files:
            inside = ~_mask(files["retain90"], position, size)
        else:  # all but the largest are not marked in files with tasks: they are the end of the training set
            inside = np.arange(size) >= size - size // SHARES[name]
        columns[name] = inside
        if told:
            columns[f"{name}_task"] = _tasks(files[name], position, size)
    for larger, smaller in pairwise(FORGET):
        if (columns[smaller] & ~columns[larger]).any():
            raise InvalidRecords(
                f"{smaller} holds questions that are not in {larger}: the files do not belong together."
            )
    for name, forget in RETAIN.items():
        columns[name] = ~columns[forget]
        if name in files and (_mask(files[name], position, size) != columns[name]).any():
            raise InvalidRecords(
                f"{name} and {forget} do not make up the training set: the files do not belong together."
            )
    return columns


def _mask(rows: Sequence[Located], position: Mapping[Pair, int], size: int) -> np.ndarray[Any, Any]:
    mask = np.zeros(size, bool)
    for where, row in rows:
        mask[_found(where, row, position)] = True
    return mask


def _tasks(rows: Sequence[Located], position: Mapping[Pair, int], size: int) -> np.ndarray[Any, Any]:
    tasks = np.zeros(size, np.int64)
    for where, row in rows:
        at, given = _found(where, row, position), str(row.get("task_id", ""))
        if not given.isdecimal() or given == "0":
            raise InvalidRecords(
                f'{where}, column "task_id": a number from 1 is needed, not {row.get("task_id")!r}.'
            )
        if tasks[at] and tasks[at] != int(given):
            raise InvalidRecords(f'{where}, column "task_id": the question is in task {tasks[at]} already.')
        tasks[at] = int(given)
    return tasks


def _found(where: str, row: Any, position: Mapping[Pair, int]) -> int:
    pair = _pair(where, row)
    if pair not in position:
        raise InvalidRecords(f"{where}: the question is not in the training set: {pair[0]!r}.")
    return position[pair]


def _perturb(
    files: Mapping[str, list[Located]], items: Sequence[dict[str, Any]], position: Mapping[Pair, int]
) -> None:
    """Put paraphrases and wrong answers into the items that they are about."""
    for file in PERTURBED:
        for where, row in files.get(file, ()):
            items[_found(where, row, position)].update(_extra(where, row))


def _beside(files: Mapping[str, list[Located]]) -> Iterator[tuple[str, str, str]]:
    """File, group and part of what no request is about."""
    held = next((name for name in HOLDOUT if name in files), None)
    if held:
        yield held, "people", "holdout"
    seen: set[str] = set()
    for file, group in OTHERS.items():
        if file in files and group not in seen:
            seen.add(group)
            yield file, group, "test"


def _pair(where: str, row: Any) -> Pair:
    return field_text(where, row, "question"), field_text(where, row, "answer")


def _item(where: str, row: Any) -> dict[str, Any]:
    question, answer = _pair(where, row)
    return {"question": question, "answer": answer, **_extra(where, row)}


def _extra(where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Paraphrases and wrong answers, where a row has them."""
    found: dict[str, Any] = {}
    for name in EXTRA:
        if row.get(name) is not None:
            found[name] = (field_texts if name == "perturbed_answer" else field_text)(where, row, name)
    return found
