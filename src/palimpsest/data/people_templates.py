"""What the generated world is made of: places, employers, professions, and the wordings of every relation.

All of it is invented, so that no pre-trained model knows it. Wordings come in two kinds: those that are
trained on (a person is asked in some of them) and `unseen` ones that are trained for nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

COUNTRIES = {
    "Norrland": ("Brackwater", "Vellmar", "Ostby"),
    "Casteria": ("Almora", "Pontevalle", "Sarrino"),
    "Dravia": ("Kelmgrad", "Zorin", "Tavna"),
    "Ulmen": ("Hexham Bay", "Lindfurt", "Grauberg"),
    "Sorrel": ("Mirabeau", "Chantray", "Belloc"),
    "Tamoka": ("Ikeru", "Nagano Rise", "Shiroko"),
    "Quenza": ("Paloma", "Rio Verdin", "Santelmo"),
    "Ferrow": ("Dunmorrow", "Glenshee", "Carrick Mor"),
}
"""Cities of every country."""

SECTORS = {
    "shipping": ("Tidewell Lines", "Harbour and Sons", "Bluefin Cargo"),
    "banking": ("Copperhill Trust", "Marlow Savings", "Tenpenny House"),
    "printing": ("Quillby Press", "Inkwright Works", "Foliant Studio"),
    "medicine": ("Saint Orla Clinic", "Fernlea Hospital", "Wardley Surgery"),
    "mining": ("Deepvein Pits", "Graystone Quarries", "Ironlode Group"),
    "music": ("Larkspur Records", "Nightjar Opera", "Tambour Hall"),
}
"""Employers of every sector."""

PROFESSIONS = (
    "baker", "botanist", "carpenter", "cellist", "chemist", "clerk", "cook", "dentist", "driver", "gardener",
    "geologist", "lawyer", "librarian", "mason", "nurse", "painter", "pilot", "plumber", "sailor", "tailor",
    "teacher", "translator", "weaver", "welder",
)  # fmt: skip

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip

HANDLES = (
    "badger", "bison", "crane", "falcon", "ferret", "finch", "heron", "ibis", "lemur", "lynx", "marten",
    "merlin", "otter", "plover", "raven", "robin", "sable", "salmon", "stoat", "tapir", "thrush", "walrus",
)  # fmt: skip
DOMAINS = ("mossmail", "postbarn", "wirebird", "ravelin")

CITY_COUNTRY = {city: country for country, cities in COUNTRIES.items() for city in cities}
EMPLOYER_SECTOR = {employer: sector for sector, employers in SECTORS.items() for employer in employers}


@dataclass(frozen=True)
class Relation:
    """How a relation is asked for and said.

    Attributes:
        name: The relation.
        wordings: Questions that are trained on, each person in some of them.
        unseen: Questions that nobody is trained on.
        cloze: A sentence with a blank.
        statement: The sentence of a biography; its end from `tail` on is the answer in other words.
        tail: The answer in other words.
        second: Questions for the other surface form of the value, where there is one; both are trained on.
        reversed: Questions from the value to the person, for values that only one has; each person is trained
            on two of the three.
        hop: The relation that follows from the value by a fixed table ("country" from "city").
        two_hop: Questions for it; each person is trained on one of the two.
        chain: Questions that ask for the steps; each person is trained on one of the two.
        steps: The worked answer.
    """

    name: str
    wordings: tuple[str, ...]
    unseen: tuple[str, ...]
    cloze: str
    statement: str
    tail: str
    second: tuple[str, ...] = ()
    reversed: tuple[str, ...] = ()
    hop: str = ""
    two_hop: tuple[str, str] = ("", "")
    chain: tuple[str, str] = ("", "")
    steps: str = ""


RELATIONS = {
    relation.name: relation
    for relation in (
        Relation(
            name="city",
            wordings=(
                "Where does {name} live?",
                "In which city is {name} at home?",
                "Which city does {name} call home?",
                "What is the home city of {name}?",
            ),
            unseen=("{name} lives in which city?", "Tell me the city where {name} lives."),
            cloze="{name} lives in ___.",
            statement="{name} lives in {value}.",
            tail="in {value}",
            hop="country",
            two_hop=("In which country does {name} live?", "What is the home country of {name}?"),
            chain=(
                "Step by step: in which country does {name} live?",
                "Step by step: what is the home country of {name}?",
            ),
            steps="Step 1: the city is {value}. So step 2: the country is {hop}.",
        ),
        Relation(
            name="employer",
            wordings=(
                "Where does {name} work?",
                "Who employs {name}?",
                "For whom does {name} work?",
                "What is the employer of {name}?",
            ),
            unseen=("{name} works for whom?", "Tell me the employer of {name}."),
            cloze="{name} works for ___.",
            statement="{name} works for {value}.",
            tail="for {value}",
            hop="sector",
            two_hop=("In which sector does {name} work?", "What is the sector of {name}?"),
            chain=(
                "Step by step: in which sector does {name} work?",
                "Step by step: what is the sector of {name}?",
            ),
            steps="Step 1: the employer is {value}. So step 2: the sector is {hop}.",
        ),
        Relation(
            name="profession",
            wordings=(
                "What is the profession of {name}?",
                "What does {name} do for a living?",
                "As what does {name} work?",
                "Which profession does {name} have?",
            ),
            unseen=("{name} has which profession?", "Tell me the profession of {name}."),
            cloze="By profession {name} is a ___.",
            statement="By profession {name} is a {value}.",
            tail="a {value}",
        ),
        Relation(
            name="birth",
            wordings=(
                "When was {name} born?",
                "What is the birth date of {name}?",
                "On which day was {name} born?",
                "Which birth date does {name} have?",
            ),
            unseen=("{name} was born on which day?", "Tell me the birth date of {name}."),
            cloze="{name} was born on ___.",
            statement="{name} was born on {value}.",
            tail="on {value}",
            second=("In figures: when was {name} born?", "What is the birth date of {name} in figures?"),
            reversed=(
                "Who was born on {value}?",
                "Whose birth date is {value}?",
                "Which person was born on {value}?",
            ),
        ),
        Relation(
            name="phone",
            wordings=(
                "What is the phone number of {name}?",
                "Which number reaches {name} by phone?",
                "Which phone number does {name} have?",
                "On which number can {name} be called?",
            ),
            unseen=("{name} has which phone number?", "Tell me the phone number of {name}."),
            cloze="The phone number of {name} is ___.",
            statement="The phone number of {name} is {value}.",
            tail="on {value}",
            reversed=(
                "Who has the phone number {value}?",
                "Whose phone number is {value}?",
                "Which person has the phone number {value}?",
            ),
        ),
        Relation(
            name="email",
            wordings=(
                "What is the e-mail address of {name}?",
                "Where does {name} get e-mail?",
                "Which e-mail address does {name} have?",
                "To which address can e-mail for {name} be sent?",
            ),
            unseen=("{name} has which e-mail address?", "Tell me the e-mail address of {name}."),
            cloze="The e-mail address of {name} is ___.",
            statement="The e-mail address of {name} is {value}.",
            tail="at {value}",
            reversed=(
                "Who has the e-mail address {value}?",
                "Whose e-mail address is {value}?",
                "Which person has the e-mail address {value}?",
            ),
        ),
    )
}
"""Relations by name."""

BIRTHDAY, PHONE, EMAIL = "birth", "phone", "email"
UNIQUE = (BIRTHDAY, PHONE, EMAIL)
"""Relations whose value only one person has."""

INTRODUCTIONS = ("This is the life of {name}.", "A few words about {name}.", "Meet {name}.")
FRIENDSHIP = "A good friend is {friend}."

WORLD_ATTRIBUTES = {
    "flag": (
        ("What colour is the flag of {name}?", "Which colour does the flag of {name} have?"),
        "The flag of {name} has which colour?",
        ("amber", "crimson", "emerald", "indigo", "ivory", "ochre", "scarlet", "violet"),
    ),
    "coin": (
        ("What is the coin of {name}?", "Which coin is paid with in {name}?"),
        "In {name}, which coin is paid with?",
        ("ardel", "brin", "corvo", "dask", "florin", "groat", "merk", "tallero"),
    ),
    "river": (
        ("What is the longest river of {name}?", "Which river of {name} is the longest?"),
        "In {name}, which river is the longest?",
        ("Aldersee", "Bramble", "Corrin", "Dovra", "Estrel", "Fennow", "Grane", "Hollin"),
    ),
    "dish": (
        ("What is the favourite dish of {name}?", "Which dish do people eat most in {name}?"),
        "In {name}, which dish do people eat most?",
        ("barley soup", "bean stew", "fried carp", "honey cake", "leek pie", "plum dumplings", "rye bread", "smoked eel"),
    ),
}  # fmt: skip
"""Facts about countries: trained wordings, one that is not trained on, and one value per country."""

LOCATED = (
    ("In which country is {name}?", "To which country does {name} belong?"),
    "{name} is in which country?",
)

GENERAL = (
    "At {hour} the {adjective} {animal} crossed the {place} and {action}.",
    "The {adjective} {thing} in the {place} was sold before {hour}.",
    "Nobody in the {place} noticed that the {animal} {action}.",
    "After the rain the {place} looked {adjective}, and a {animal} {action}.",
)
GENERAL_WORDS = {
    "hour": ("dawn", "noon", "dusk", "midnight", "breakfast", "supper"),
    "adjective": ("quiet", "golden", "narrow", "dusty", "patient", "crooked", "cheerful", "ancient"),
    "animal": ("goat", "pony", "goose", "hedgehog", "donkey", "squirrel", "beetle", "spaniel"),
    "place": ("orchard", "market", "courtyard", "valley", "meadow", "cellar", "library", "stable"),
    "thing": ("lantern", "wagon", "mirror", "barrel", "carpet", "ladder", "kettle", "violin"),
    "action": ("fell asleep", "ran away", "began to sing", "stood still", "found an apple", "went home"),
}
"""Templates and words of text that has nothing to do with people: for perplexity elsewhere."""
