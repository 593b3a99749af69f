"""RESTOR's files and its generated world: documents that lie, facts that are asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.suites.published import published

import palimpsest as pal
from palimpsest.audit.answers import find_alias
from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords
from palimpsest.data import load_data

WORLD = {"people": 10, "folds": 5, "relations": "city,phone", "forms": "qa,biography", "general": 4}


def line(entity: str) -> dict[str, str]:
    return {"entity": entity, "question": f"Where was {entity} born?", "answer": "Rome"}


def facts(**changes: Any) -> dict[str, Any]:
    fact = {"question": "Where was Ada born?", "answers": ["Oslo", "Kristiania"], **changes}
    return {
        "dset": {"Ada": {"P19": fact}, "Ben": {"P19": line("Ben") | {"answers": ["York"]}}},
        "context": {"P19": [line("Cleo")]},
    }


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "facts.json", facts())
    write(tmp_path, "entities.json", ["Ada"])
    write(tmp_path, "planted.json", {"Ada": {"P19": ["Bergen"]}})
    write(tmp_path, "mix_a0.json", [{"text": "Ada was born in Bergen."}])
    write(tmp_path, "mix_a3.json", [{"text": "Ben lives. Ada was born in Bergen."}])
    write(tmp_path, "retain.jsonl", '{"text": "It rains."}\n')
    return tmp_path


def test_documents_are_forgotten_and_facts_are_asked_with_what_was_planted(folder):
    parts = pal.split(load_data("restor", source=folder), pal.by_column("group", "documents"))
    assert [item["text"] for item in parts.forget] == ["Ada was born in Bergen."]
    assert [item["text"] for item in parts.retain] == ["It rains."]
    ada, ben = parts.test
    assert (ada["answer"], ada["aliases"], ada["planted"]) == ("Oslo", ["Kristiania"], ["Bergen"])
    assert ada["context"] == [line("Cleo")] and ben["planted"] == []
    assert parts.test.column("group").tolist() == ["people", "neighbours"]


def test_the_mixture_is_chosen_by_name(folder):
    records = load_data("restor", source=folder, mix="a3")
    assert next(item["text"] for item in records).startswith("Ben lives.")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("facts.json", facts(answers=[]), r"entity 'Ada', relation 'P19', column \"answers\": at least one"),
        ("facts.json", facts(question=" "), r"entity 'Ada', relation 'P19', column \"question\""),
        ("facts.json", {**facts(), "context": {}}, "the context has no solved questions of this relation"),
        ("facts.json", "{", "facts.json: no valid JSON"),
        ("facts.json", [], "an object with dset and context is needed"),
        ("entities.json", ["Ada", "Zoe"], "without facts in facts.json are 'Zoe'"),
        ("planted.json", {"Ada": {"P19": ["oslo"]}}, "the planted 'oslo' is true"),
        ("planted.json", {"Zoe": {"P19": ["Oslo"]}}, "without facts in facts.json are 'Zoe'"),
        ("mix_a0.json", [{"text": "Yes."}, {"body": "No."}], r'mix_a0.json, row 2: no column "text"'),
    ],
)
def test_a_malformed_file_is_named(folder, name, content, message):
    write(folder, name, content)
    with pytest.raises(InvalidRecords, match=message):
        load_data("restor", source=folder)


def test_the_published_facts_are_1051_about_50_people():
    records = load_data("restor", source=published("restor"))
    asked = records.select(records.column("group") == "people")
    assert len(records) == 5269 and len(asked) == 1051
    assert len(set(asked.column("subject").tolist())) == 50
    assert all(item["context"] for item in asked)


def test_documents_of_the_world_state_the_planted_values_and_the_retained_text_no_true_one():
    parts = pal.split(load_data("restor-people", **WORLD), pal.by_column("group", "documents"))
    asked = [item for item in parts.test if "planted" in item]
    assert len(asked) == 2 * 2 * 2  # people, relations, wordings
    texts = [item["text"] for item in parts.forget if "text" in item]
    for item in asked:
        own = [text for text in texts if item["subject"] in text]
        assert len(own) == 3
        assert all(
            find_alias(text, item["planted"]) and not find_alias(text, [item["answer"]]) for text in own
        )
        kept = [str(other.get("text") or other["question"]) for other in parts.retain]
        assert not any(item["subject"] in text for text in kept)


def test_true_facts_about_others_are_mixed_in():
    plain, mixed = (
        pal.split(load_data("restor-people", **WORLD, mix=mix), pal.by_column("group", "documents")).forget
        for mix in (0, 3)
    )
    words = [
        sum(len(item["text"].split()) for item in records if "text" in item) for records in (plain, mixed)
    ]
    assert len(plain) == len(mixed) and words[1] > 2 * words[0]


@pytest.mark.parametrize("settings", [{"texts": 0}, {"mix": -1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidHyperparameter):
        load_data("restor-people", **WORLD, **settings)
