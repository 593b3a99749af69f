"""WMDP's published format: questions, texts, and what malformed rows are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import palimpsest as pal
from palimpsest.core.errors import InvalidRecords
from palimpsest.data import load_data

QUESTION = {"question": "Which herb is burnt?", "choices": ["sage", "mint", "thyme", "dill"], "answer": 2}


def write(folder: Path, name: str, rows: list[Any], lines: bool = True) -> None:
    text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows)
    (folder / name).write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path, "bio_questions.json", [QUESTION, {**QUESTION, "question": "And which next?"}], lines=False
    )
    write(tmp_path, "wmdp-cyber.json", [QUESTION])
    write(tmp_path, "mmlu.jsonl", [{**QUESTION, "subject": "college_biology"}])
    write(tmp_path, "bio-forget-corpus.jsonl", [{"text": "On herbs."}])
    write(tmp_path, "bio-retain-corpus.jsonl", [{"text": "On bread."}])
    write(tmp_path, "wikitext.jsonl", [{"text": "On nothing."}])
    return tmp_path


def test_questions_are_asked_with_their_options_and_answered_by_a_letter(folder):
    item = next(item for item in load_data("wmdp", source=folder) if "choices" in item)
    assert item["question"] == "Which herb is burnt?\nA. sage\nB. mint\nC. thyme\nD. dill"
    assert (item["answer"], item["correct"], item["answer_text"]) == ("C", 2, "thyme")


def test_texts_of_a_topic_are_forgotten_and_its_questions_are_asked(folder):
    parts = pal.split(load_data("wmdp", source=folder), pal.by_column("domain", "bio", "cyber"))
    assert [item["text"] for item in parts.forget] == ["On herbs."]
    assert [item["text"] for item in parts.retain] == ["On bread.", "On nothing."]
    assert parts.test.column("domain").tolist() == ["bio", "bio", "cyber", "mmlu"]
    assert parts.test.column("subject").tolist()[-1] == "college_biology"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, r'row 2, column "answer": a number from 0 to 3 is needed, not 4'),
        ({"answer": True}, r'column "answer": a number from 0 to 3'),
        ({"answer": "C"}, r'column "answer": a number from 0 to 3'),
        ({"choices": ["a", "b", "c"]}, r'row 2, column "choices": 4 texts needed, not 3'),
        ({"choices": ["a", "b", "c", "a"]}, r'column "choices": two choices are the same'),
        ({"question": None}, r'row 2: no column "question"'),
    ],
)
def test_a_malformed_question_is_named_with_row_and_column(folder, change, message):
    write(folder, "wmdp-cyber.json", [QUESTION, {**QUESTION, **change}])
    with pytest.raises(InvalidRecords, match=message) as problem:
        load_data("wmdp", source=folder)
    assert "wmdp-cyber.json" in str(problem.value)


def test_an_empty_topic_and_a_folder_without_questions_are_refused(folder, tmp_path):
    (folder / "wmdp-cyber.json").write_text("")
    with pytest.raises(InvalidRecords, match="cyber have no rows"):
        load_data("wmdp", source=folder)
    for name in ("wmdp-cyber.json", "bio_questions.json", "mmlu.jsonl"):
        (folder / name).unlink()
    with pytest.raises(InvalidRecords, match="holds no questions"):
        load_data("wmdp", source=folder)


def test_a_text_that_is_blank_is_named(folder):
    write(folder, "bio-forget-corpus.jsonl", [{"text": "On herbs."}, {"text": " "}])
    with pytest.raises(InvalidRecords, match=r'bio-forget-corpus.jsonl, row 2, column "text"'):
        load_data("wmdp", source=folder)
