from __future__ import annotations

from dataclasses import dataclass

import pytest

from palimpsest.core.errors import InvalidHyperparameter, UnknownName
from palimpsest.core.needs import Need
from palimpsest.core.search_space import Choice, Span, read_space
from palimpsest.core.unlearner import UNLEARNERS, unlearner


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("1e-4..1e-2:log", Span(1e-4, 1e-2, log=True)),
        ("1..10:int", Span(1, 10, integer=True)),
        ("1..100:log:int", Span(1, 100, log=True, integer=True)),
        ("0.1..0.9", Span(0.1, 0.9)),
        ("adam,sgd", Choice(("adam", "sgd"))),
        ("true,false", Choice((True, False))),
        ("1,2,none", Choice((1, 2, None))),
    ],
)
def test_short_forms_are_read_and_written_back(text, space):
    assert read_space(text) == space
    assert read_space(str(space)) == space


@pytest.mark.parametrize("text", ["1..", "1..a", "2..1", "0..1:log", "1..2:ln", "0.5..3:int", "adam", ""])
def test_what_is_no_space_is_refused(text):
    with pytest.raises(InvalidHyperparameter):
        read_space(text)


NEEDED = {"pdu": {"slack": 1.2}}
"""What a method must be told, because nothing is right for all models."""


def test_every_method_but_retraining_says_where_to_search_and_can_be_built_there():
    for name, method in UNLEARNERS.items():
        if not method.__module__.startswith("palimpsest.forget.") or name == "retrain":
            continue
        assert method.card.search, f"{name} declares no search space"
        for key, space in method.card.search.items():
            ends = space.values if isinstance(space, Choice) else (space.low, space.high)
            for value in ends:
                whole = isinstance(space, Span) and space.integer
                method(**{**NEEDED.get(name, {}), key: int(value) if whole else value})


def test_a_space_of_a_field_that_is_not_there_is_refused():
    with pytest.raises(UnknownName, match="strength"):

        @unlearner("space-test", needs={Need.MODEL}, search={"strenght": Span(0, 1)})
        @dataclass(frozen=True)
        class Misspelt:
            """Nothing."""

            strength: float = 1.0
