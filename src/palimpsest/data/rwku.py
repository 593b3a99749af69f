"""RWKU in its published format: targets by name, probes of three levels, neighbours, members, utility sets.

Jin et al. 2024, arXiv 2406.10890. A folder with its files (forget_level1.json, ...) is read, or the data set of
the Hub ("jinzhuoran/RWKU").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
)
from palimpsest.data.registry import dataset

PROBES = {
    "forget_level1": "level 1", "forget_level2": "level 2", "forget_level3": "level 3",
    "neighbor_level1": "neighbour 1", "neighbor_level2": "neighbour 2",
}  # fmt: skip
"""Files of probes, and the form of their records."""
OTHER_NAMES = {
    "neighbor_level1": "neighbour_level1", "neighbor_level2": "neighbour_level2",
    "mia_forget": "forget_mia", "mia_retain": "retain_mia",
}  # fmt: skip
"""How some copies call a file."""
MEMBERS = {"mia_forget": "forget member", "mia_retain": "retain member"}
UTILITY = {
    "utility_general": "utility general", "utility_truthfulness": "utility truthfulness",
    "utility_factuality": "utility factuality", "utility_fluency": "utility fluency",
}  # fmt: skip
INTRODUCTIONS = "train_positive_llama3"
"""File whose column "intro" says in one line who each target is."""
NEEDED = ("forget_level1", "forget_level2", "forget_level3")


@dataset("rwku")
def rwku(source: str | Path) -> Records:
    """RWKU (NeurIPS 2024) from a folder with its published files, or from the Hub.

    In RWKU's setting a method is given the name of its target with one line about it, and nothing else: so
    every target is one record of part "train", whose text is that line (the name, where the files have none).
    Everything else is of part "test". Columns: target ("first" for the first target of the files, else "other"), subject (its name), form ("target", "level 1" to "level 3",
    "neighbour 1" and "neighbour 2", "forget member", "retain member", "utility ..."), kind (of adversarial
    probes), part. Forget `subject=Stephen King`.

    Of utility files, "utility_general" and "utility_truthfulness" have question, choices and the number of the
    right one as answer; "utility_factuality" question and a list of answers; "utility_fluency" an instruction.

    Args:
        source: Folder, or name on the Hub.

    Raises:
        InvalidRecords: If there are no probes of a level, or a row cannot be used: names row and column.
        MissingDependency: If a data set of the Hub is named and `datasets` is not installed.
    """
    files = _read(source)
    absent = [name for name in NEEDED if not files.get(name)]
    if absent:
        raise InvalidRecords(
            f"'{source}' holds no rows of {shorten(absent)}: every level of probes is needed."
        )
    made = [*_probes(files), *_members(files), *_utility(files)]
    targets = dict.fromkeys(str(item["subject"]) for _, item, _ in made if item["subject"])
    lines = {
        field_text(where, row, "subject"): field_text(where, row, "intro")
        for where, row in files.get(INTRODUCTIONS, ())
    }
    known = [
        (
            f"target/{name}",
            {"text": lines.get(name, name), "subject": name},
            {"form": "target", "part": "train"},
        )
        for name in targets
    ]
    rows = [*known, *made]
    columns = {
        "target": ["first" if item["subject"] == next(iter(targets)) else "other" for _, item, _ in rows],
        "subject": [item["subject"] for _, item, _ in rows],
        "form": [values["form"] for *_, values in rows],
        "kind": [values.get("kind", "") for *_, values in rows],
        "part": [values.get("part", "test") for *_, values in rows],
        "fact": [name for name, *_ in rows],
    }
    return Records(
        [item for _, item, _ in rows],
        ids=[name for name, *_ in rows],
        columns={name: np.array(values, object) for name, values in columns.items()},
    )


Row = tuple[str, dict[str, Any], dict[str, str]]
"""Id, item and columns."""


def _probes(files: Mapping[str, list[Located]]) -> Iterator[Row]:
    for file, form in PROBES.items():
        for number, (where, row) in enumerate(files.get(file, ())):
            level = str(row.get("level", form[-1])) if isinstance(row, Mapping) else form[-1]
            if level != form[-1]:
                raise InvalidRecords(f'{where}, column "level": {form[-1]} is needed here, not {level!r}.')
            item = {
                "question": field_text(where, row, "query"),
                "answer": field_text(where, row, "answer"),
                "subject": field_text(where, row, "subject"),
            }
            if form.startswith("neighbour"):
                _check_neighbour(where, item)
            kind = field_text(where, row, "type") if form == "level 3" else ""
            yield f"{file}/{number:05d}", item, {"form": form, "kind": kind}


def _check_neighbour(where: str, item: Mapping[str, str]) -> None:
    """Refuse a neighbour probe that asks for the target: forgetting would lower its score."""
    if item["answer"].strip().lower() == item["subject"].strip().lower():
        raise InvalidRecords(f'{where}, column "answer": the target {item["subject"]!r} itself is asked for.')


def _members(files: Mapping[str, list[Located]]) -> Iterator[Row]:
    for file, form in MEMBERS.items():
        for number, (where, row) in enumerate(files.get(file, ())):
            item = {"text": field_text(where, row, "text"), "subject": field_text(where, row, "subject")}
            yield f"{file}/{number:05d}", item, {"form": form}


def _utility(files: Mapping[str, list[Located]]) -> Iterator[Row]:
    for file, form in UTILITY.items():
        read = _READERS[file]
        for number, (where, row) in enumerate(files.get(file, ())):
            yield f"{file}/{number:05d}", {**read(where, row), "subject": ""}, {"form": form}


def _choice(where: str, row: Any) -> dict[str, Any]:
    choices = field_texts(where, row, "choices")
    answer = row.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InvalidRecords(
            f'{where}, column "answer": the number of a choice from 0 is needed, not {answer!r}.'
        )
    rest = [choice for number, choice in enumerate(choices) if number != answer]
    return {
        "question": field_text(where, row, "question"),
        "answer": choices[answer],
        "perturbed_answer": rest,
    }


def _answered(where: str, row: Any) -> dict[str, Any]:
    given = row.get("answer") if isinstance(row, Mapping) else None
    answers = [given] if isinstance(given, str) and given.strip() else field_texts(where, row, "answer")
    return {"question": field_text(where, row, "question"), "answer": answers[0], "aliases": answers[1:]}


def _instruction(where: str, row: Any) -> dict[str, Any]:
    return {"text": field_text(where, row, "instruction")}


_READERS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "utility_general": _choice,
    "utility_truthfulness": _choice,
    "utility_factuality": _answered,
    "utility_fluency": _instruction,
}


def _read(source: str | Path) -> dict[str, list[Located]]:
    """Rows by the name of their file."""
    place = Path(source)
    names = (*PROBES, *MEMBERS, *UTILITY, INTRODUCTIONS)
    if place.is_dir():
        return {name: list(local_rows(file)) for name in names if (file := _file(place, name)) is not None}
    if place.exists() or place.is_absolute():
        raise InvalidRecords(f"'{place}' is no folder: RWKU is a folder of files such as forget_level1.json.")
    there = hub_configurations(str(source))
    return {
        name: list(hub_rows(str(source), "train" if name == INTRODUCTIONS else "test", name))
        for name in names
        if name in there
    }


def _file(place: Path, name: str) -> Path | None:
    for called in (name, OTHER_NAMES.get(name, name)):
        for end in ENDS:
            if (place / f"{called}{end}").exists():
                return place / f"{called}{end}"
    return None
