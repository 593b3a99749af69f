"""Rows of JSON lines, JSON, saved folders and the Hugging Face Hub, each with the words that say where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from palimpsest.core.errors import InvalidRecords, MissingDependency, shorten

ENDS = (".jsonl", ".json")
"""Of files that hold rows."""

Located = tuple[str, Any]
"""Where a row stands ("forget10.json, row 3"), and the row."""


def local_rows(place: Path, part: str = "train") -> Iterator[Located]:
    """Rows of a file, of all files of a folder, or of a folder that `datasets` saved.

    A file that begins with "[" is one list; any other holds one object a line, whatever it is called
    (TOFU's files are called .json and hold lines).

    Args:
        place: File or folder.
        part: Of a saved folder of several.

    Raises:
        InvalidRecords: If something cannot be read; names file and row.
        MissingDependency: If `datasets` saved the folder and is not installed.
    """
    if place.is_dir():
        if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
            yield from _saved(place, part)
            return
        files = sorted(file for file in place.iterdir() if file.suffix in ENDS)
        if not files:
            raise InvalidRecords(f"The folder '{place}' holds no file that ends in {' or '.join(ENDS)}.")
        for file in files:
            yield from local_rows(file, part)
        return
    if place.suffix not in ENDS:
        raise InvalidRecords(f"'{place}' must end in {' or '.join(ENDS)}.")
    text = read_text(place)
    if place.suffix == ".json" and text.lstrip().startswith("["):
        for number, row in enumerate(parsed(text, str(place)), 1):
            yield f"{place}, row {number}", row
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{place}, row {number}", parsed(line, f"{place}, row {number}")


def hub_rows(name: str, part: str = "train", configuration: str | None = None) -> Iterator[Located]:
    """Rows of a data set of the Hub by name.

    Raises:
        InvalidRecords: If it cannot be loaded.
        MissingDependency: If `datasets` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as missing:
        raise MissingDependency("datasets", "language") from missing
    shown = f"{name} {configuration}" if configuration else name
    try:
        found = load_dataset(name, configuration, split=part)
    except Exception as problem:  # the library raises a dozen kinds, of the network, of files, of names
        raise InvalidRecords(
            f"'{shown}' is no file or folder here, and `datasets` could not load it: {problem}"
        ) from problem
    yield from _numbered(shown, found)


def hub_configurations(name: str) -> list[str]:
    """Names of the configurations of a data set of the Hub.

    Raises:
        InvalidRecords: If there is no such data set, or it cannot be reached.
        MissingDependency: If `datasets` is not installed.
    """
    try:
        from datasets import get_dataset_config_names
    except ImportError as missing:
        raise MissingDependency("datasets", "language") from missing
    try:
        return list(get_dataset_config_names(name))
    except Exception as problem:  # as above
        raise InvalidRecords(
            f"'{name}' is no file or folder here, and `datasets` does not find it: {problem}"
        ) from problem


def read_text(place: Path) -> str:
    """The text of a file.

    Raises:
        InvalidRecords: If it cannot be read as UTF-8.
    """
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InvalidRecords(f"'{place}' cannot be read as UTF-8 text: {problem}.") from problem


def parsed(text: str, where: str) -> Any:
    """JSON of a text.

    Raises:
        InvalidRecords: If it is none; names the place.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise InvalidRecords(f"{where}: no valid JSON ({problem.msg}, column {problem.colno}).") from problem


def field_text(where: str, row: Any, column: str) -> str:
    """A column of a row that must be a text that is not blank.

    Raises:
        InvalidRecords: If it is not; names row and column.
    """
    value = _field(where, row, column)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRecords(
            f'{where}, column "{column}": a text that is not empty is needed, not {value!r}.'
        )
    return value


def field_texts(where: str, row: Any, column: str, count: int | None = None) -> list[str]:
    """A column of a row that must be a list of texts that are not blank, at least one, or exactly `count`.

    Raises:
        InvalidRecords: If it is not; names row and column.
    """
    value = _field(where, row, column)
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise InvalidRecords(f'{where}, column "{column}": a list of texts is needed, not {value!r}.')
    if not value or (count is not None and len(value) != count):
        wanted = "at least one text" if count is None else f"{count} texts"
        raise InvalidRecords(f'{where}, column "{column}": {wanted} needed, not {len(value)}: {value!r}.')
    return value


def _field(where: str, row: Any, column: str) -> Any:
    if not isinstance(row, Mapping):
        raise InvalidRecords(f"{where}: a row is an object with fields, not {type(row).__name__}.")
    if row.get(column) is None:
        raise InvalidRecords(f'{where}: no column "{column}" (it has {shorten(sorted(row), 8)}).')
    return row[column]


def _saved(place: Path, part: str) -> Iterator[Located]:
    """Rows of a folder that `datasets` saved."""
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as missing:
        raise MissingDependency("datasets", "language") from missing
    found = load_from_disk(str(place))
    if isinstance(found, DatasetDict):
        if part not in found:
            raise InvalidRecords(f"'{place}' has no part '{part}', only {shorten(list(found))}.")
        found = found[part]
    yield from _numbered(str(place), found)


def _numbered(name: str, rows: Any) -> Iterator[Located]:
    yield from ((f"{name}, row {number}", dict(row)) for number, row in enumerate(rows, 1))
