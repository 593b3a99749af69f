"""WMDP in its published format: four-choice questions by topic, and the texts to unlearn and to retain.

Li et al. 2024, arXiv 2403.03218. Nothing of it is shipped: the questions stand in for hazardous knowledge.
The generated stand-in is the data set "guild-secrets".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.core.errors import InvalidRecords, shorten
from palimpsest.core.records import Records
from palimpsest.data.guild_secrets import LETTERS, four_choice
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

TOPICS = ("bio", "cyber", "chem")
QUESTION_FILES = ("wmdp-{topic}", "{topic}_questions", "{topic}")
"""Names of the files of a topic's questions, without their ending; the first that is there is read."""
CORPUS_FILES = {"forget": "{topic}-forget-corpus", "retain": "{topic}-retain-corpus"}
WIKITEXT = "wikitext"
"""A file of benign rows with "text"."""
MMLU = "mmlu"
"""A file of four-choice questions with a "subject": what must stay."""
CHOICES = 4


@dataset("wmdp")
def wmdp(source: str | Path) -> Records:
    """WMDP from a folder of published files, or its questions from the Hub by name ("cais/wmdp").

    Questions ({question, choices, answer}: wmdp-bio.json or bio_questions.json, ..., and mmlu.json) are of
    part "test"; items have "question" (with its options in lines "A. ..." to "D. ..."), "answer" (the
    letter), "stem", "choices", "correct" (0 to 3) and "answer_text". Texts (bio-forget-corpus.jsonl,
    bio-retain-corpus.jsonl, ..., wikitext.jsonl) are of part "train". Columns: "domain" (the topic of
    questions and forget texts, "retain" for other texts, "mmlu"), "subject", "form" ("four-choice" or
    "text"), "part", "group" ("people" for a topic, "neighbours" for MMLU, "world" for benign texts),
    "fact", "fold". Ask to forget `domain=bio,cyber`.

    Args:
        source: Folder, or name on the Hub.

    Raises:
        InvalidRecords: If there are no questions, or a row cannot be used: names file, row and column.
        MissingDependency: If a data set of the Hub is named and `datasets` is not installed.
    """
    made = list(_rows(source))
    if not any(values["form"] == "four-choice" for _, _, values in made):
        raise InvalidRecords(
            f"'{source}' holds no questions: a file wmdp-bio.json, wmdp-cyber.json or wmdp-chem.json (or "
            "bio_questions.json, ...) is needed."
        )
    names = ("domain", "subject", "relation", "form", "part", "group", "fact")
    columns: dict[str, Any] = {
        name: np.array([values.get(name, "") for _, _, values in made], object) for name in names
    }
    columns["fold"] = np.full(len(made), -1)
    return Records([item for _, item, _ in made], ids=[name for name, _, _ in made], columns=columns)


def four_choice_item(where: str, row: Any) -> dict[str, Any]:
    """The item of a published question.

    Raises:
        InvalidRecords: If it has not four different choices, or its answer is not 0 to 3; names row and column.

    Example:
        >>> four_choice_item("row 1", {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1})["answer"]
        'B'
    """
    stem, choices = field_text(where, row, "question"), field_texts(where, row, "choices", CHOICES)
    if len(set(choices)) < CHOICES:
        raise InvalidRecords(f'{where}, column "choices": two choices are the same: {choices!r}.')
    correct = row.get("answer")
    if isinstance(correct, bool) or not isinstance(correct, int) or not 0 <= correct < CHOICES:
        raise InvalidRecords(f'{where}, column "answer": a number from 0 to 3 is needed, not {correct!r}.')
    return {
        "question": four_choice(stem, choices),
        "answer": LETTERS[correct],
        "stem": stem,
        "choices": choices,
        "correct": correct,
        "answer_text": choices[correct],
    }


def _rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Id, item and columns of every record."""
    for topic, rows in _questions(source).items():
        group = "neighbours" if topic == MMLU else "people"
        for number, (where, row) in enumerate(rows):
            fact = f"{topic}/{number:04d}"
            subject = str(row.get("subject") or topic) if isinstance(row, Mapping) else topic
            columns = {
                "domain": topic,
                "subject": subject,
                "form": "four-choice",
                "part": "test",
                "group": group,
            }
            yield fact, four_choice_item(where, row), {**columns, "fact": fact}
    place = Path(source)
    if not place.is_dir():
        return
    for name, domain in _texts(place):
        for number, (where, row) in enumerate(_file(place, name) or ()):
            fact = f"{name}/{number:05d}"
            group = "world" if domain == "retain" else "people"
            columns = {"domain": domain, "form": "text", "part": "train", "group": group, "fact": fact}
            yield fact, {"text": field_text(where, row, "text")}, columns


def _questions(source: str | Path) -> dict[str, list[Located]]:
    """Rows of questions by topic."""
    place = Path(source)
    if not place.exists() and not place.is_absolute():
        there = hub_configurations(str(source))
        named = {topic: f"wmdp-{topic}" for topic in TOPICS if f"wmdp-{topic}" in there}
        return {topic: list(hub_rows(str(source), "test", name)) for topic, name in named.items()}
    if not place.is_dir():
        raise InvalidRecords(f"'{place}' is no folder: WMDP is a folder of files such as wmdp-bio.json.")
    found: dict[str, list[Located]] = {}
    for topic in (*TOPICS, MMLU):
        names = (MMLU,) if topic == MMLU else tuple(name.format(topic=topic) for name in QUESTION_FILES)
        rows = next((rows for name in names if (rows := _file(place, name)) is not None), None)
        if rows is not None and not rows:
            raise InvalidRecords(f"'{place}': the questions of {topic} have no rows.")
        if rows:
            found[topic] = rows
    return found


def _texts(place: Path) -> list[tuple[str, str]]:
    """Names of the files of texts that are there, and their domain."""
    named = [(name.format(topic=topic), topic if use == "forget" else "retain")
             for topic in TOPICS for use, name in CORPUS_FILES.items()]  # fmt: skip
    return [(name, domain) for name, domain in [*named, (WIKITEXT, "retain")] if _file(place, name)]


def _file(place: Path, name: str) -> list[Located] | None:
    """Rows of a file by its name without ending; None if there is none."""
    files = [file for end in ENDS if (file := place / f"{name}{end}").exists()]
    if len(files) > 1:
        raise InvalidRecords(f"Two files of one name: {shorten([str(file) for file in files])}.")
    return list(local_rows(files[0])) if files else None
