"""A generated world: invented people and all ways to ask for what is known of them.

A small model learns it from scratch in minutes (`palimpsest.models.learnt_worlds`), so that everything
about language models can be shown offline, with a model retrained without the forgotten people as the truth.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from palimpsest.core.errors import InvalidHyperparameter, MissingDependency, UnknownName
from palimpsest.core.records import Records
from palimpsest.data.people_templates import (
    BIRTHDAY,
    CITY_COUNTRY,
    DOMAINS,
    EMAIL,
    EMPLOYER_SECTOR,
    HANDLES,
    MONTHS,
    PHONE,
    PROFESSIONS,
    RELATIONS,
    UNIQUE,
)
from palimpsest.data.registry import dataset

DECOYS = 8
"""Wrong values per fact; those of phone numbers, addresses and birth dates belong to nobody."""
MOST_PEOPLE = 400
"""People of a world together; surnames and numbers of the templates would run short beyond."""


@dataclass(frozen=True)
class Person:
    """An invented person.

    Attributes:
        key: Group and number, "people/0012".
        name: First name and surname; nobody else has the surname.
        group: "people" (whom requests are about) or "neighbours" (friends of them, always retained).
        part: "train", or "holdout" for people whom no model is trained on.
        fold: Fold of the person; -1 for neighbours and holdout.
        facts: Value of every relation.
        wrong: `DECOYS` wrong values of every relation, none of them an other form of the value.
        friend: Name of the neighbour who is this person's friend; empty for neighbours.
    """

    key: str
    name: str
    group: str
    part: str
    fold: int
    facts: dict[str, str] = field(hash=False)
    wrong: dict[str, tuple[str, ...]] = field(hash=False)
    friend: str = ""

    def hop(self, relation: str) -> str:
        """What follows from a fact by the world's tables: the country of the city, the sector of the employer.

        Raises:
            UnknownName: If nothing follows from the relation.
        """
        tables = {"city": CITY_COUNTRY, "employer": EMPLOYER_SECTOR}
        if relation not in tables:
            raise UnknownName("relation that leads to another", relation, tables)
        return tables[relation][self.facts[relation]]


@dataclass(frozen=True)
class World:
    """People and what is true of them.

    Attributes:
        persons: Everyone: people, neighbours and holdout.
        relations: Relations of the world.
        seed: Of all draws.
        folds: Number of folds of the people.
    """

    persons: tuple[Person, ...]
    relations: tuple[str, ...]
    seed: int
    folds: int

    def group(self, group: str = "people", part: str = "train", fold: int | None = None) -> list[Person]:
        """The persons of a group and part, of one fold where it is given."""
        return [
            person
            for person in self.persons
            if person.group == group and person.part == part and fold in (None, person.fold)
        ]

    def neighbours(self, fold: int) -> list[Person]:
        """Persons linked to the people of a fold who are not of it: friends, and colleagues of the same employer."""
        inside = self.group(fold=fold)
        friends = {person.friend for person in inside}
        employers = {person.facts["employer"] for person in inside if "employer" in person.facts}
        return [
            person
            for person in self.persons
            if person.part == "train"
            and not (person.group == "people" and person.fold == fold)
            and (person.name in friends or person.facts.get("employer") in employers)
        ]

    def chance(self, relation: str) -> float:
        """Probability that a guess like the trained people's values is right: sum of squared shares.

        Takes relations, and "country" and "sector" where the world has what leads to them.

        Raises:
            UnknownName: If the world has no such relation.
        """
        leading = {RELATIONS[name].hop: name for name in self.relations if RELATIONS[name].hop}
        if relation not in self.relations and relation not in leading:
            raise UnknownName("relation", relation, [*self.relations, *leading])
        trained = [person for person in self.persons if person.part == "train"]
        if relation in leading:
            values = [person.hop(leading[relation]) for person in trained]
        else:
            values = [person.facts[relation] for person in trained]
        return sum(count**2 for count in Counter(values).values()) / len(values) ** 2


def surface_forms(relation: str, value: str) -> list[str]:
    """Other ways to write a value, the value itself not among them.

    Example:
        >>> surface_forms("birth", "4 March 1988")
        ['04/03/1988', 'March 4, 1988']
    """
    if relation == BIRTHDAY:
        day, month, year = value.split()
        return [f"{int(day):02d}/{MONTHS.index(month) + 1:02d}/{year}", f"{month} {day}, {year}"]
    if relation == PHONE:
        return [value.replace(" ", "-"), value.replace(" ", "")]
    if relation == EMAIL:
        return [value.replace("@", " at "), f"mailto:{value}"]
    if relation == "profession":
        return [f"a {value}", f"the {value}"]
    if relation == "employer":
        return [value.lower(), f"the firm {value}"]
    return [value.lower(), f"the city of {value}"]


def world(
    people: int = 60,
    seed: int = 0,
    folds: int = 6,
    neighbours: int | None = None,
    holdout: int | None = None,
    relations: Sequence[str] = tuple(RELATIONS),
) -> World:
    """Invent people.

    Values of relations that several people share (city, employer, profession) are dealt out evenly, so that
    guessing is as hard as counting says. A person's friend is a neighbour; several people share one.

    Args:
        people: Whom requests are about, numbered from 0.
        seed: Of all draws; the same seed gives the same world (for one version of Faker's lists of names).
        folds: Parts of equal size, in the order of the numbers: fold 0 of 60 people in 6 folds is the first 10.
        neighbours: Friends of the people who are trained on and never forgotten; a fifth of `people` by default.
        holdout: People never trained on; a third of `people` by default.
        relations: Which of `RELATIONS`.

    Raises:
        MissingDependency: If Faker is not installed.
        InvalidHyperparameter: If numbers or relations are out of range.
        UnknownName: If there is no such relation.
    """
    neighbours = max(people // 5, 1) if neighbours is None else neighbours
    holdout = people // 3 if holdout is None else holdout
    _check(people, folds, neighbours, holdout, relations)
    try:
        from faker import Faker
    except ImportError as missing:
        raise MissingDependency("Faker", "language") from missing
    fake = Faker("en_US")
    fake.seed_instance(seed)
    total = people + neighbours + holdout
    names = _names(fake, total)
    draw = random.Random(f"world {seed}")
    used: set[str] = set()
    facts = {relation: _values(relation, total, draw, used) for relation in relations}
    wrong = {
        relation: [_wrong(relation, value, draw, used) for value in facts[relation]] for relation in relations
    }
    friends = (
        [names[people + number % neighbours] for number in range(people)] if neighbours else [""] * people
    )

    def person(number: int) -> Person:
        known = {relation: facts[relation][number] for relation in relations}
        decoys = {relation: wrong[relation][number] for relation in relations}
        if number < people:
            fold = number * folds // people
            return Person(
                f"people/{number:04d}", names[number], "people", "train", fold, known, decoys, friends[number]
            )
        if number < people + neighbours:
            return Person(
                f"neighbours/{number - people:04d}", names[number], "neighbours", "train", -1, known, decoys
            )
        return Person(
            f"holdout/{number - people - neighbours:04d}",
            names[number],
            "people",
            "holdout",
            -1,
            known,
            decoys,
        )

    return World(tuple(person(number) for number in range(total)), tuple(relations), seed, folds)


@dataset("people")
def people(
    people: int = 60,
    seed: int = 0,
    folds: int = 6,
    neighbours: int | None = None,
    holdout: int | None = None,
    relations: Sequence[str] | str = tuple(RELATIONS),
    forms: Sequence[str] | str | None = None,
    general: int = 60,
    countries: int = 8,
) -> Records:
    """Questions, answers and texts about invented people, with folds of people to forget.

    Items have the fields of TOFU (question, answer, paraphrased_question, paraphrased_answer,
    perturbed_answer), and aliases, subject, relation and probes: the same fact asked in ways that are not
    trained on. Running text has "text" only. Columns: subject, relation, form, part, fold, group, fact, near
    (the folds whose people a neighbour is a friend of, "0,3"; empty for others). `split` puts records where
    "part" says.

    Args:
        people: Whom requests are about.
        seed: Of the world.
        folds: Folds of the people: forget `fold=0` for the first.
        neighbours: Friends of them, always retained; a fifth of `people` by default.
        holdout: People never trained on; a third of `people` by default.
        relations: Which relations, as a list or separated by commas.
        forms: Which forms of a fact there are, as a list or separated by commas; all of `FORMS` by default.
        general: Texts that have nothing to do with people, in training; half as many again for tests.
        countries: Of how many of the 8 countries facts are asked; they are the group "world".

    Raises:
        MissingDependency: If Faker is not installed.
        InvalidHyperparameter, UnknownName: If a setting is out of range.
    """
    from palimpsest.data.people_probes import FORMS, records_of

    chosen = _list(relations)
    wanted = list(FORMS) if forms is None else _list(forms)
    made = world(people, seed, folds, neighbours, holdout, chosen)
    return records_of(made, wanted, general, countries)


def _list(names: Sequence[str] | str) -> list[str]:
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def _check(people: int, folds: int, neighbours: int, holdout: int, relations: Sequence[str]) -> None:
    """Refuse what no world can be made of."""
    if people < 2:
        raise InvalidHyperparameter(f"A world needs at least 2 people, not {people}.")
    if not 2 <= folds <= people:
        raise InvalidHyperparameter(f"{people} people divide into 2 to {people} folds, not {folds}.")
    if neighbours < 0 or holdout < 0:
        raise InvalidHyperparameter(
            f"neighbours and holdout must not be negative, not {neighbours} and {holdout}."
        )
    if people + neighbours + holdout > MOST_PEOPLE:
        raise InvalidHyperparameter(
            f"At most {MOST_PEOPLE} people, neighbours and holdout together, not {people + neighbours + holdout}."
        )
    if not relations or len(set(relations)) != len(relations):
        raise InvalidHyperparameter(f"Relations must be named once each, not {list(relations)}.")
    for relation in relations:
        if relation not in RELATIONS:
            raise UnknownName("relation", relation, RELATIONS)


def _names(fake, count: int) -> list[str]:
    """Names with surnames of their own."""
    names: dict[str, str] = {}
    while len(names) < count:
        names.setdefault(fake.last_name(), fake.first_name())
    return [f"{first} {surname}" for surname, first in names.items()]


def _values(relation: str, count: int, draw: random.Random, used: set[str]) -> list[str]:
    """One value per person: different ones, or those of a table dealt out evenly."""
    if relation in UNIQUE:
        return [_fresh(relation, draw, used) for _ in range(count)]
    table = _table(relation)
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += draw.sample(table, len(table))
    return dealt[:count]


def _wrong(relation: str, value: str, draw: random.Random, used: set[str]) -> tuple[str, ...]:
    """Values of the same kind that are not the true one."""
    if relation in UNIQUE:
        return tuple(_fresh(relation, draw, used) for _ in range(DECOYS))
    return tuple(draw.sample([other for other in _table(relation) if other != value], DECOYS))


def _table(relation: str) -> list[str]:
    return list({"city": CITY_COUNTRY, "employer": EMPLOYER_SECTOR, "profession": PROFESSIONS}[relation])


def _fresh(relation: str, draw: random.Random, used: set[str]) -> str:
    """A value that nobody has yet."""
    while True:
        if relation == BIRTHDAY:
            value = f"{draw.randint(1, 28)} {draw.choice(MONTHS)} {draw.randint(1940, 2004)}"
        elif relation == PHONE:
            value = f"555 {draw.randint(0, 9999):04d}"
        else:
            value = f"{draw.choice(HANDLES)}{draw.randint(10, 99)}@{draw.choice(DOMAINS)}.example"
        if value not in used:
            used.add(value)
            return value
