"""TOFU's files: published splits by name, the variant with tasks, and what malformed files are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.suites.published import published

import palimpsest as pal
from palimpsest.core.errors import InvalidRecords
from palimpsest.data import load_data
from palimpsest.data.tofu import tofu_refusals

AUTHORS = 100
"""With 2 questions each; the real ones have 20."""


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"question": f"Question {number}?", "answer": f"Answer {number}.", **more}


def perturbed(number: int, wrong: int = 5) -> dict[str, Any]:
    words = [f"Wrong {number} {at}." for at in range(wrong)]
    return row(
        number, paraphrased_question=f"Q {number}?", paraphrased_answer=f"A {number}.", perturbed_answer=words
    )


def write(folder: Path, name: str, rows: list[Any]) -> None:
    (folder / f"{name}.json").write_text("\n".join(json.dumps(item) for item in rows) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 questions: the last 20 are forget10, the last 10 forget05, the last 2 forget01."""
    write(tmp_path, "retain90", [row(at) for at in range(180)])
    write(tmp_path, "forget10", [row(at) for at in range(180, 200)])
    write(tmp_path, "forget05", [row(at) for at in range(190, 200)])
    write(tmp_path, "forget10_perturbed", [perturbed(at) for at in range(180, 200)])
    write(tmp_path, "retain_perturbed", [perturbed(at) for at in range(20)])
    write(tmp_path, "holdout10", [perturbed(at) for at in range(300, 320)])
    other = {"question": "Who wrote 1984?", "answer": "George Orwell", "perturbed_answer": ["A", "B", "C"]}
    write(tmp_path, "real_authors_perturbed", [other])
    write(tmp_path, "world_facts_perturbed", [{**other, "question": "Where is the Eiffel Tower?"}])
    return tmp_path


@pytest.mark.parametrize(("name", "forgotten"), [("forget10", 20), ("forget05", 10), ("forget01", 2)])
def test_a_published_split_is_named_by_its_column(folder, name, forgotten):
    parts = pal.split(load_data("tofu", source=folder), pal.by_column(name, 1))
    assert [item["question"] for item in parts.forget] == [
        f"Question {at}?" for at in range(200 - forgotten, 200)
    ]
    assert [item["question"] for item in parts.retain] == [f"Question {at}?" for at in range(200 - forgotten)]
    assert len(parts.test) == 2 and len(parts.holdout) == 20
    assert sorted(parts.test.column("group").tolist()) == ["neighbours", "world"]


def test_fold_0_is_forget10(folder):
    records = load_data("tofu", source=folder)
    assert (records.column("forget10") == (records.column("fold") == 0)).all()


def test_paraphrases_and_wrong_answers_come_from_the_perturbed_files(folder):
    records = {item["question"]: item for item in load_data("tofu", source=folder)}
    assert records["Question 199?"]["perturbed_answer"] == [f"Wrong 199 {at}." for at in range(5)]
    assert records["Question 3?"]["paraphrased_answer"] == "A 3."
    assert "perturbed_answer" not in records["Question 50?"]


def test_the_whole_set_in_one_file_gives_the_same(folder):
    pairs = [load_data("tofu", source=folder)]
    write(folder, "full", [row(at) for at in range(200)])
    pairs.append(load_data("tofu", source=folder))
    assert pairs[0].ids == pairs[1].ids and [dict(a) for a in pairs[0]] == [dict(b) for b in pairs[1]]


def test_files_with_tasks_give_the_published_split_and_the_number_of_each_request(folder):
    tasks = [row(at, task_id="1") for at in range(180, 200)] + [
        row(at, task_id="2") for at in range(160, 180)
    ]
    write(folder, "forget10", tasks)
    records = load_data("tofu", source=folder)
    first = pal.split(records, pal.by_column("forget10", 1)).forget
    second = pal.split(records, pal.by_column("forget10_task", 2)).forget
    assert [item["question"] for item in first] == [f"Question {at}?" for at in range(180, 200)]
    assert [item["question"] for item in second] == [f"Question {at}?" for at in range(160, 180)]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("forget10", [row(180), {"question": "Q?"}], r'forget10.json, row 2: no column "answer"'),
        ("forget10", [row(180, answer=" ")], r'forget10.json, row 1, column "answer": a text that is not empty'),
        ("forget10", ["Q?"], "forget10.json, row 1: a row is an object with fields, not str"),
        ("forget05", [row(190), row(5)], "forget05 holds questions that are not in forget10"),
        ("forget05", [row(999)], "forget05.json, row 1: the question is not in the training set: 'Question 999"),
        ("retain90", [row(at) for at in [*range(179), 178]], "retain90.json, row 180: .* twice"),
        ("retain_perturbed", [row(3, perturbed_answer="Wrong")], r'row 1, column "perturbed_answer": a list of'),
        ("retain_perturbed", [row(3, perturbed_answer=[])], r'column "perturbed_answer": at least one text'),
        ("forget10", [row(at, task_id="x") for at in range(180, 200)], r'column "task_id": a number from 1'),
        ("world_facts_perturbed", [], "world_facts_perturbed' hold no rows"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_named_with_row_and_column(folder, name, rows, message):
    write(folder, name, rows)
    with pytest.raises(InvalidRecords, match=message):
        load_data("tofu", source=folder)


def test_a_file_cut_short_is_named_with_its_row(folder):
    text = (folder / "forget10.json").read_text()
    (folder / "forget10.json").write_text(text[:-20])
    with pytest.raises(InvalidRecords, match=r"forget10.json, row 20: no valid JSON"):
        load_data("tofu", source=folder)


def test_a_folder_without_a_training_set_says_what_is_needed(folder):
    (folder / "retain90.json").unlink()
    with pytest.raises(InvalidRecords, match=r"full.json, or retain90.json with forget10.json"):
        load_data("tofu", source=folder)


def test_the_published_files_are_the_4000_questions_in_their_published_splits():
    records = load_data("tofu", source=published("tofu"))
    parts = pal.split(records, pal.by_column("forget10", 1))
    assert (len(parts.forget), len(parts.retain), len(parts.test)) == (400, 3600, 217)
    assert all(len(item["perturbed_answer"]) == 5 for item in parts.forget)
    assert sum("perturbed_answer" in item for item in parts.retain) >= 400
    smaller = pal.split(records, pal.by_column("forget05", 1)).forget
    assert len(smaller) == 200 and set(smaller.ids) < set(parts.forget.ids)
    assert len(set(parts.forget.column("subject").tolist())) == 20
    for task in range(1, 10):
        assert (records.column("forget10_task") == task).sum() == 400
    first = records.column("forget10_task") == 1
    assert (first == records.column("forget10").astype(bool)).all()
    assert len(tofu_refusals(published("tofu"))) == 100
