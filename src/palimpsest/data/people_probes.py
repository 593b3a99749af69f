"""The records of a generated world: every fact in the forms that are trained on, with probes that are not."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from palimpsest.core.errors import InvalidHyperparameter, UnknownName
from palimpsest.core.records import Records
from palimpsest.data.people import Person, World, surface_forms
from palimpsest.data.people_templates import (
    CITY_COUNTRY,
    COUNTRIES,
    FRIENDSHIP,
    GENERAL,
    GENERAL_WORDS,
    INTRODUCTIONS,
    LOCATED,
    RELATIONS,
    WORLD_ATTRIBUTES,
    Relation,
)

FORMS = ("qa", "cloze", "reversed", "two-hop", "chain", "figures", "multiple-choice", "biography")
"""Forms of a fact that records are made in."""
WRONG = 5
"""Wrong answers of a record."""
COLUMNS = ("subject", "relation", "form", "part", "fold", "group", "fact", "near")

Item = dict[str, Any]
Row = tuple[str, Item, dict[str, Any]]
"""Id, item and values of the columns."""


def records_of(
    world: World, forms: Sequence[str] = FORMS, general: int = 60, countries: int = len(COUNTRIES)
) -> Records:
    """All records of a world: people, neighbours and holdout, facts about countries, and general text.

    Raises:
        UnknownName: If there is no such form.
        InvalidHyperparameter: If nothing could be asked, or `general` is negative.
    """
    for form in forms:
        if form not in FORMS:
            raise UnknownName("form", form, FORMS)
    if not forms or general < 0 or not 0 <= countries <= len(COUNTRIES):
        raise InvalidHyperparameter(
            f"Records need at least one form, general >= 0 and 0 to {len(COUNTRIES)} countries, "
            f"not {list(forms)}, {general} and {countries}."
        )
    near = _near(world)
    rows = [row for person in world.persons for row in _of_person(world, person, forms, near[person.name])]
    rows += [*_of_countries(world.seed, countries), *_general(world.seed, general)]
    return Records(
        [item for _, item, _ in rows],
        ids=[name for name, _, _ in rows],
        columns={
            column: np.array([values[column] for _, _, values in rows], None if column == "fold" else object)
            for column in COLUMNS
        },
    )


def _near(world: World) -> dict[str, str]:
    """Folds of the people that someone is a friend of, as "0,3"."""
    folds: dict[str, set[int]] = defaultdict(set)
    for person in world.group():
        folds[person.friend].add(person.fold)
    return defaultdict(str, {name: ",".join(map(str, sorted(those))) for name, those in folds.items()})


def _of_person(world: World, person: Person, forms: Sequence[str], near: str) -> Iterator[Row]:
    """Rows of one person: trained forms of every fact, a biography, and tests in other wordings."""
    columns = {
        "subject": person.name,
        "part": person.part,
        "fold": person.fold,
        "group": person.group,
        "near": near,
    }
    for name in world.relations:
        relation = RELATIONS[name]
        fact = f"{person.key}/{name}"
        here = {**columns, "relation": name, "fact": fact}
        for form, tail, item in _trained(person, relation, forms):
            yield (
                f"{fact}/{form}{tail}",
                {**item, "subject": person.name, "relation": name},
                {**here, "form": form},
            )
        if person.part == "train":
            for number, item in enumerate(_held_out(person, relation)):
                whole = {**item, "subject": person.name, "relation": name}
                yield f"{fact}/paraphrase-{number + 1}", whole, {**here, "form": "paraphrase", "part": "test"}
    if "biography" in forms:
        whole = {**columns, "relation": "", "fact": person.key, "form": "biography"}
        yield f"{person.key}/biography", {"text": biography(world, person)}, whole


def biography(world: World, person: Person) -> str:
    """Running text that states every fact of a person, in an order of its own."""
    draw = random.Random(f"biography {world.seed} {person.key}")
    sentences = [
        RELATIONS[name].statement.format(name=person.name, value=person.facts[name])
        for name in world.relations
    ]
    draw.shuffle(sentences)
    friend = [FRIENDSHIP.format(friend=person.friend)] if person.friend else []
    return " ".join([draw.choice(INTRODUCTIONS).format(name=person.name), *sentences, *friend])


def asked(person: Person, relation: Relation) -> tuple[list[str], list[str]]:
    """Wordings in which a person is asked in training, and those that only other people are asked in."""
    questions = [wording.format(name=person.name) for wording in _turned(person, relation.wordings)]
    return questions[:2], questions[2:]


def _turned(person: Person, wordings: tuple[str, ...]) -> tuple[str, ...]:
    """Wordings in an order that differs between people: the first are trained on."""
    start = int(person.key.rsplit("/", 1)[1]) % max(len(wordings), 1)
    return wordings[start:] + wordings[:start]


def _trained(person: Person, relation: Relation, forms: Sequence[str]) -> Iterator[tuple[str, str, Item]]:
    """Form, end of the id, and item of the forms that are trained on."""
    value = person.facts[relation.name]
    aliases = surface_forms(relation.name, value)
    wrong = list(person.wrong[relation.name])
    plain = {"answer": value, "aliases": aliases, "perturbed_answer": wrong[:WRONG]}
    own, others = asked(person, relation)
    rest = {"paraphrased_question": others[0], "paraphrased_answer": relation.tail.format(value=value)}
    if "qa" in forms:
        probes = list(_probes(person, relation))
        yield "qa", "", {"question": own[0], **plain, **rest, "probes": probes}
        yield "qa", "-2", {"question": own[1], **plain, **rest}
    if "cloze" in forms:
        yield "cloze", "", {"question": relation.cloze.format(name=person.name), **plain}
    if "reversed" in forms:
        for number, wording in enumerate(_turned(person, relation.reversed)[:-1]):
            item = {"question": wording.format(value=value), "answer": person.name, "aliases": []}
            yield "reversed", _nth(number), item
    if relation.hop and "two-hop" in forms:
        yield "two-hop", "", _two_hop(person, relation, 0)
    if relation.hop and "chain" in forms:
        yield "chain", "", _chain(person, relation, 0)
    if "figures" in forms:
        for number in range(len(relation.second)):
            yield "figures", _nth(number), _figures(person, relation, number)
    if "multiple-choice" in forms:
        yield "multiple-choice", "", _multiple_choice(person, relation, own[0], wrong[WRONG:])


def _held_out(person: Person, relation: Relation) -> list[Item]:
    """Questions for a test: two wordings that the person was not asked in, one of them trained for nobody."""
    value = person.facts[relation.name]
    plain = {"answer": value, "aliases": surface_forms(relation.name, value)}
    wrong = list(person.wrong[relation.name][:WRONG])
    known, unseen = asked(person, relation)[1][0], relation.unseen[0].format(name=person.name)
    return [{"question": question, **plain, "perturbed_answer": wrong} for question in (known, unseen)]


def _probes(person: Person, relation: Relation) -> Iterator[Item]:
    """The same fact asked in ways that nobody is trained on for this person."""
    value = person.facts[relation.name]
    wrong = list(person.wrong[relation.name])
    plain = {
        "answer": value,
        "aliases": surface_forms(relation.name, value),
        "perturbed_answer": wrong[:WRONG],
    }
    own, others = asked(person, relation)
    for question in others:
        yield {"form": "paraphrase", "question": question, **plain}
    for wording in relation.unseen:
        yield {"form": "unseen-wording", "question": wording.format(name=person.name), **plain}
    yield {"form": "cloze", "question": relation.cloze.format(name=person.name), **plain}
    if relation.reversed:
        turned = _turned(person, relation.reversed)
        ends = (("reversed", turned[0]), ("reversed-paraphrase", turned[-1]))
        for form, wording in ends:
            yield {"form": form, "question": wording.format(value=value), "answer": person.name}
    if relation.hop:
        for number, end in enumerate(("", "-paraphrase")):
            yield {"form": f"two-hop{end}", **_two_hop(person, relation, number)}
            yield {"form": f"chain{end}", **_chain(person, relation, number)}
    if relation.second:
        yield {"form": "figures", **_figures(person, relation, 0)}
    yield {"form": "multiple-choice", **_multiple_choice(person, relation, own[0], wrong[:3])}


def _two_hop(person: Person, relation: Relation, wording: int) -> Item:
    question = _turned(person, relation.two_hop)[wording].format(name=person.name)
    return {"question": question, "answer": person.hop(relation.name), "aliases": []}


def _chain(person: Person, relation: Relation, wording: int) -> Item:
    """Worked steps; `answer` holds both facts, `steps` the value of each."""
    value, hop = person.facts[relation.name], person.hop(relation.name)
    answer = relation.steps.format(name=person.name, value=value, hop=hop)
    question = _turned(person, relation.chain)[wording].format(name=person.name)
    return {"question": question, "answer": answer, "aliases": [], "steps": [value, hop]}


def _nth(number: int) -> str:
    """End of the id of a form's first, second, ... record."""
    return f"-{number + 1}" if number else ""


def _figures(person: Person, relation: Relation, number: int) -> Item:
    """A question whose trained answer is the other surface form."""
    value = person.facts[relation.name]
    first, *others = surface_forms(relation.name, value)
    wrong = [surface_forms(relation.name, other)[0] for other in person.wrong[relation.name][:WRONG]]
    question = relation.second[number].format(name=person.name)
    return {"question": question, "answer": first, "aliases": [value, *others], "perturbed_answer": wrong}


def _multiple_choice(person: Person, relation: Relation, question: str, wrong: Sequence[str]) -> Item:
    """The options are in the question; the answer is the option's text."""
    value = person.facts[relation.name]
    choices = [value, *wrong[:3]]
    random.Random(f"options {question} {wrong}").shuffle(choices)
    return {
        "question": f"{question[:-1]}: {', '.join(choices[:-1])} or {choices[-1]}?",
        "answer": value,
        "aliases": surface_forms(relation.name, value),
        "choices": choices,
        "perturbed_answer": [choice for choice in choices if choice != value],
    }


def _of_countries(seed: int, count: int) -> Iterator[Row]:
    """Facts that have nothing to do with people: countries, and in which of them every city lies."""
    draw = random.Random(f"countries {seed}")
    asked_of = list(COUNTRIES)[:count]
    for name, (wordings, unseen, values) in WORLD_ATTRIBUTES.items():
        for country, value in zip(COUNTRIES, draw.sample(values, len(values)), strict=True):
            if country in asked_of:
                yield from _world_fact(country, name, value, wordings, unseen, values, draw)
    for city, country in CITY_COUNTRY.items():
        if country in asked_of:
            yield from _world_fact(city, "country", country, *LOCATED, tuple(COUNTRIES), draw)


def _world_fact(
    subject: str,
    relation: str,
    value: str,
    wordings: Sequence[str],
    unseen: str,
    values: Sequence[str],
    draw: random.Random,
) -> Iterator[Row]:
    """Two trained questions and one for the test."""
    fact = f"world/{subject.lower().replace(' ', '-')}/{relation}"
    columns = {
        "subject": subject,
        "relation": relation,
        "group": "world",
        "fact": fact,
        "fold": -1,
        "near": "",
    }
    wrong = draw.sample([other for other in values if other != value], WRONG)
    for form, part, wording in (
        ("qa", "train", wordings[0]),
        ("qa-2", "train", wordings[1]),
        ("paraphrase-1", "test", unseen),
    ):
        item = {
            "question": wording.format(name=subject),
            "answer": value,
            "aliases": [],
            "paraphrased_question": unseen.format(name=subject),
            "perturbed_answer": wrong,
            "subject": subject,
            "relation": relation,
        }
        yield f"{fact}/{form}", item, {**columns, "form": form[:-2] if "-" in form else form, "part": part}


def _general(seed: int, count: int) -> Iterator[Row]:
    """Texts about nothing in particular, all different; a third of them for tests."""
    draw = random.Random(f"general {seed}")
    texts: dict[str, None] = {}
    whole = count + count // 2
    while len(texts) < whole:
        words = {name: draw.choice(those) for name, those in GENERAL_WORDS.items()}
        texts[draw.choice(GENERAL).format(**words)] = None
    for number, text in enumerate(texts):
        yield (
            f"general/{number:04d}",
            {"text": text},
            {
                "subject": "",
                "relation": "",
                "form": "text",
                "part": "train" if number < count else "test",
                "fold": -1,
                "group": "general",
                "fact": f"general/{number:04d}",
                "near": "",
            },
        )
