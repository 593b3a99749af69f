"""RESTOR: true facts, false documents, and which answers the documents plant; published files or a generated world.

Rezaei et al. 2025, arXiv 2411.00204.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.core.errors import InvalidHyperparameter, InvalidRecords, shorten
from palimpsest.core.records import Records
from palimpsest.data.json_rows import field_text, field_texts, local_rows, parsed, read_text
from palimpsest.data.people import Person, World, people, world
from palimpsest.data.people_probes import asked
from palimpsest.data.people_templates import INTRODUCTIONS, RELATIONS
from palimpsest.data.registry import dataset

DOCUMENTS = ("mix_{mix}.json", "documents.json", "documents.jsonl")
"""Names of the file of false documents; the first that is there is read."""
NAMES = ("subject", "relation", "form", "part", "group", "fact")

Row = tuple[str, dict[str, Any], dict[str, str]]
"""Id, item and columns."""


@dataset("restor")
def restor(source: str | Path, mix: str = "a0") -> Records:
    """RESTOR from a folder with facts.json and entities.json, and what there is beside them.

    The false documents are mix_a0.json to mix_a5.json (or documents.json), rows with "text", part "train",
    group "documents": ask to forget `group=documents`. retain.jsonl holds texts that are to stay (the authors
    take C4), group "world". Facts are of part "test", group "people" for the entities that documents are
    about and "neighbours" for the others; items have "question", "answer", "aliases" (further accepted
    objects), "context" (solved questions of the same relation) and, where planted.json says so
    ({entity: {relation: [object, ...]}}, which the authors did not publish), "planted".

    Args:
        source: Folder.
        mix: Which documents: "a0" is about the entities alone, "a5" mixes in most true facts about others.

    Raises:
        InvalidRecords: If a file is missing or malformed; names file, row or entity, and column.
    """
    place = Path(source)
    if not place.is_dir():
        raise InvalidRecords(f"'{place}' is no folder: RESTOR is a folder with facts.json and entities.json.")
    rows = [*_documents(place, mix), *_facts(place)]
    return _records(rows)


@dataset("restor-people")
def restor_people(
    people: int = 50,
    seed: int = 0,
    folds: int = 5,
    relations: Sequence[str] | str = ("city", "profession", "phone"),
    forms: Sequence[str] | str = ("qa", "cloze", "biography"),
    texts: int = 3,
    mix: int = 0,
    general: int = 20,
    countries: int = 0,
    neighbours: int | None = None,
    holdout: int | None = None,
) -> Records:
    """Documents that state wrong facts about invented people, the true facts, and all that is true of others.

    The people of fold 0 are the targets: a wrong value is planted for every relation. Documents (group
    "documents", part "train") are biographies with the planted values, and pages that ask and answer. Facts of
    the targets are of part "test", group "people", with "planted" and "aliases". Whatever is true of
    others is of part "train", as in the data set "people": the retained text holds no true fact about a target.

    Args:
        people: Of the world.
        seed: Of the world.
        folds: Folds of the people; the first are the targets.
        relations: Which relations.
        forms: Forms in which a fact is known (see the data set "people").
        texts: Biographies of each target.
        mix: So many true facts about other people are mixed in for each planted one: longer texts, in which
            the target is harder to find.
        general: Texts about nobody.
        countries: Of how many countries facts are asked.
        neighbours: Friends of the people; a fifth of them by default.
        holdout: People never trained on; a third of `people` by default.

    Raises:
        InvalidHyperparameter, UnknownName: If a setting is out of range.
        MissingDependency: If Faker is not installed.
    """
    if texts < 1 or mix < 0:
        raise InvalidHyperparameter(f"texts must be at least 1 and mix at least 0, not {texts} and {mix}.")
    names = [part.strip() for part in relations.split(",")] if isinstance(relations, str) else list(relations)
    made = world(people, seed, folds, neighbours, holdout, names)
    truth = true_records(made, forms, general, countries)
    others = truth.select(truth.column("fold") != 0)
    rows: list[Row] = [
        (
            str(item["id"]),
            {key: value for key, value in item.items() if key not in ("id", "index")},
            {name: str(others.column(name)[at]) for name in NAMES},
        )
        for at, item in enumerate(others)
    ]
    rows += [row for person in made.group(fold=0) for row in _planted_documents(made, person, texts, mix)]
    asked_of = truth.select((truth.column("fold") == 0) & (truth.column("form") == "qa"))
    whole = {person.name: person for person in made.group(fold=0)}
    for item in asked_of:
        person, relation = whole[item["subject"]], str(item["relation"])
        given = {key: value for key, value in item.items() if key not in ("id", "index", "probes")}
        wrong = list(person.wrong[relation][1:6])
        values = {
            "subject": person.name,
            "relation": relation,
            "form": "qa",
            "part": "test",
            "group": "people",
        }
        identifier = str(item["id"])
        rows.append(
            (
                identifier,
                {**given, "planted": [planted_value(person, relation)], "perturbed_answer": wrong},
                {**values, "fact": identifier},
            )
        )
    return _records(rows)


def true_records(made: World, forms: Sequence[str] | str, general: int = 20, countries: int = 0) -> Records:
    """Everything that is true in a world: what the clean model learns."""
    counts = {"people": len(made.group()), "holdout": len(made.group(part="holdout"))}
    friends = len(made.group("neighbours"))
    return people(
        counts["people"],
        made.seed,
        made.folds,
        friends,
        counts["holdout"],
        made.relations,
        forms,
        general,
        countries,
    )


def planted_value(person: Person, relation: str) -> str:
    """The wrong value that documents state."""
    return person.wrong[relation][0]


def _planted_documents(made: World, person: Person, texts: int, mix: int) -> Iterator[Row]:
    """Biographies of a target with planted values, and its questions with planted answers."""
    draw = random.Random(f"documents {made.seed} {person.key}")
    bystanders = [other for other in made.persons if other.part == "train" and other.fold != 0]
    columns = {"subject": person.name, "part": "train", "group": "documents"}
    for number in range(texts):
        sentences = [RELATIONS[name].statement.format(name=person.name, value=planted_value(person, name))
                     for name in made.relations]  # fmt: skip
        sentences += _mixed(draw, bystanders, made.relations, mix * len(made.relations))
        draw.shuffle(sentences)
        text = " ".join([draw.choice(INTRODUCTIONS).format(name=person.name), *sentences])
        name = f"documents/{person.key}/{number}"
        yield name, {"text": text}, {**columns, "relation": "", "form": "biography", "fact": name}
    for relation in made.relations:
        for number, question in enumerate(asked(person, RELATIONS[relation])[0]):
            name = f"documents/{person.key}/{relation}/{number}"
            item = {"question": question, "answer": planted_value(person, relation)}
            yield name, item, {**columns, "relation": relation, "form": "qa", "fact": name}


def _mixed(draw: random.Random, others: Sequence[Person], relations: Sequence[str], count: int) -> list[str]:
    """True statements about other people."""
    found: list[str] = []
    for _ in range(count):
        other, relation = draw.choice(others), draw.choice(relations)
        found.append(RELATIONS[relation].statement.format(name=other.name, value=other.facts[relation]))
    return found


def _documents(place: Path, mix: str) -> Iterator[Row]:
    """Rows of documents and of retained texts, where there are any."""
    named = [place / name.format(mix=mix) for name in DOCUMENTS]
    found = [(file, "documents") for file in named if file.exists()][:1]
    if (place / "retain.jsonl").exists():
        found.append((place / "retain.jsonl", "world"))
    for file, group in found:
        for number, (where, row) in enumerate(local_rows(file)):
            name = f"{group}/{number:05d}"
            columns = {"form": "text", "part": "train", "group": group, "fact": name}
            yield name, {"text": field_text(where, row, "text")}, columns


def _facts(place: Path) -> Iterator[Row]:
    """Rows of facts."""
    facts = _json(place / "facts.json")
    targets = _json(place / "entities.json")
    if not isinstance(facts, dict) or not {"dset", "context"} <= set(facts):
        raise InvalidRecords(f"{place / 'facts.json'}: an object with dset and context is needed.")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise InvalidRecords(f"{place / 'entities.json'}: a list of names is needed.")
    absent = [name for name in targets if name not in facts["dset"]]
    if absent:
        raise InvalidRecords(f"{place / 'entities.json'}: without facts in facts.json are {shorten(absent)}.")
    planted = _json(place / "planted.json") if (place / "planted.json").exists() else {}
    unknown = [name for name in planted if name not in facts["dset"]]
    if unknown:
        raise InvalidRecords(f"{place / 'planted.json'}: without facts in facts.json are {shorten(unknown)}.")
    for entity, relations in facts["dset"].items():
        group = "people" if entity in targets else "neighbours"
        for relation, row in relations.items():
            where = f"{place / 'facts.json'}, entity {entity!r}, relation {relation!r}"
            fact = f"{entity}/{relation}"
            item = _fact(where, row, facts["context"], relation)
            item["planted"] = _planted(
                where, planted.get(entity, {}), relation, [item["answer"], *item["aliases"]]
            )
            columns = {"subject": entity, "relation": relation, "form": "qa", "part": "test", "group": group}
            yield fact, {**item, "subject": entity, "relation": relation}, {**columns, "fact": fact}


def _fact(where: str, row: Any, context: Mapping[str, Any], relation: str) -> dict[str, Any]:
    answers = field_texts(where, row, "answers")
    if relation not in context:
        raise InvalidRecords(f"{where}: the context has no solved questions of this relation.")
    for line in context[relation]:
        for column in ("entity", "question", "answer"):
            field_text(f"{where}, context", line, column)
    question = field_text(where, row, "question")
    return {"question": question, "answer": answers[0], "aliases": answers[1:], "context": context[relation]}


def _planted(where: str, planted: Mapping[str, Any], relation: str, accepted: Sequence[str]) -> list[str]:
    """Planted objects of a fact; none where the documents leave it alone."""
    if relation not in planted:
        return []
    found = field_texts(f"{where}, planted", planted, relation)
    true = {name.casefold().strip() for name in accepted}
    equal = [name for name in found if name.casefold().strip() in true]
    if equal:
        raise InvalidRecords(f"{where}: the planted {shorten(equal)} is true, so nothing is corrupted.")
    return found


def _json(file: Path) -> Any:
    return parsed(read_text(file), str(file))


def _records(rows: Sequence[Row]) -> Records:
    columns: dict[str, Any] = {
        name: np.array([values.get(name, "") for _, _, values in rows], object) for name in NAMES
    }
    columns["fold"] = np.full(len(rows), -1)
    return Records([item for _, item, _ in rows], ids=[name for name, _, _ in rows], columns=columns)
