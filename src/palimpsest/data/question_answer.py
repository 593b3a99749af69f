"""Questions and answers, or running text, of the user's own: JSON lines, JSON, or a Hugging Face data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.core.errors import InvalidRecords
from palimpsest.core.records import Records
from palimpsest.data.json_rows import ENDS, hub_rows, local_rows
from palimpsest.data.registry import dataset

WORDS = ("question", "answer", "text", "paraphrased_question", "paraphrased_answer", "subject", "relation")
"""Fields that hold a text."""
LISTS = ("perturbed_answer", "aliases", "choices")
"""Fields that hold a list of texts."""


@dataset("question-answer")
def question_answer(source: str | Path, part: str = "train", configuration: str | None = None) -> Records:
    """Rows with "question" and "answer", or "text", from a file, a folder or the Hugging Face Hub.

    The other fields are TOFU's: paraphrased_question, paraphrased_answer, perturbed_answer (a list), and
    aliases, choices, subject, relation, probes. "id" gives the ids (the row numbers otherwise). Whatever
    else every row has as one text or number is a column: "part" (train, test, holdout: where `split` puts
    the row), "fact", "fold", ...

    Args:
        source: A .jsonl or .json file, a folder of such files (read in alphabetical order), a folder that
            `datasets` saved, or the name of a data set of the Hub.
        part: Split of a data set of the Hub or of a saved folder of several.
        configuration: Its configuration, "forget10" of "locuslab/TOFU".

    Raises:
        InvalidRecords: If a row cannot be used; names row and column.
        MissingDependency: If a data set of the Hub is named and `datasets` is not installed.
    """
    place = Path(source)
    if place.exists():
        rows = list(local_rows(place, part))
    elif place.suffix in ENDS or place.is_absolute():
        raise InvalidRecords(f"There is no file or folder '{place}'.")
    else:
        rows = list(hub_rows(str(source), part, configuration))
    rows = [(where, _given(row)) for where, row in rows]
    if not rows:
        raise InvalidRecords(f"'{source}' holds no rows.")
    for where, row in rows:
        _check(where, row)
    whole = [row for _, row in rows]
    known = {*WORDS, *LISTS, "probes", "id"} - {"subject", "relation"}
    shared = [name for name in whole[0] if name not in known and all(_single(row.get(name)) for row in whole)]
    ids = [str(row["id"]) for row in whole] if all("id" in row for row in whole) else None
    items = [{name: value for name, value in row.items() if name != "id"} for row in whole]
    return Records(items, ids=ids, columns={name: _column([row[name] for row in whole]) for name in shared})


def _given(row: Any) -> Any:
    """A row without what is null: tables write so where a row lacks a field."""
    return {name: value for name, value in row.items() if value is not None} if isinstance(row, dict) else row


def _check(where: str, row: Any) -> None:
    """Refuse a row that no task can use."""
    if not isinstance(row, dict):
        raise InvalidRecords(f"{where}: a row is an object with fields, not {type(row).__name__}.")
    if "text" not in row:
        for name in ("question", "answer"):
            if name not in row:
                raise InvalidRecords(f'{where}: no column "{name}"; a row has question and answer, or text.')
    for name in WORDS:
        if name in row and not (
            isinstance(row[name], str) and (row[name].strip() or name in ("subject", "relation"))
        ):
            raise InvalidRecords(
                f'{where}, column "{name}": a text that is not empty is needed, not {row[name]!r}.'
            )
    for name in LISTS:
        if name in row and not _texts(row[name]):
            raise InvalidRecords(f'{where}, column "{name}": a list of texts is needed, not {row[name]!r}.')
    _check_probes(where, row.get("probes", []))


def _check_probes(where: str, probes: Any) -> None:
    if not isinstance(probes, list):
        raise InvalidRecords(f'{where}, column "probes": a list is needed, not {probes!r}.')
    for probe in probes:
        if not isinstance(probe, dict) or not all(
            isinstance(probe.get(name), str) and probe[name].strip()
            for name in ("form", "question", "answer")
        ):
            raise InvalidRecords(
                f'{where}, column "probes": every probe has the texts form, question and answer, not {probe!r}.'
            )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def _single(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _column(values: list[Any]) -> np.ndarray[Any, Any]:
    alike = len({type(value) for value in values}) == 1
    return np.asarray(values) if alike else np.asarray([str(value) for value in values], object)
