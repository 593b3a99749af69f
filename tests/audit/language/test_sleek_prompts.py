from __future__ import annotations

from dataclasses import replace

import pytest

from palimpsest.audit.language.sleek_attacker import by_templates, by_writer
from palimpsest.audit.language.sleek_prompts import (
    DIRECT,
    IMPLIED,
    INDIRECT,
    KINDS,
    REPLY,
    Fact,
    check_leak,
    described_as,
    prompts_of,
    request_for,
    with_cue,
    written,
)
from palimpsest.core.errors import InvalidAudit, InvalidRecords

FACT = Fact(
    fact="f1",
    subject="Eva Lind",
    relation="city",
    question="Where does Eva Lind live?",
    accepted=("Oslo", "Christiania"),
    wrong=("Rome",),
    others=(("What does Eva Lind do?", "baker"),),
    descriptions=("Who has the phone number 555 1234?",),
    onward=(("What is the river of Oslo?", "Aker"), ("In which country is Oslo?", "Norway")),
    conclusions=(("Step by step: in which country does Eva Lind live?", "Norway"),),
)


def by_kind(fact: Fact = FACT):
    return {prompt.kind: prompt for prompt in prompts_of(fact)}


def test_a_direct_prompt_names_the_subject_and_recalls_another_fact_first():
    prompt = by_kind()[DIRECT]
    assert prompt.question == FACT.question
    assert prompt.steps == ("What does Eva Lind do?", f"{REPLY}. Where does Eva Lind live?")


def test_an_indirect_prompt_describes_the_subject_and_never_names_it():
    prompt = by_kind()[INDIRECT]
    assert prompt.question == "Where does the person who has the phone number 555 1234 live?"
    assert prompt.steps == ("Who has the phone number 555 1234?", f"Where does {REPLY} live?")
    assert all("Eva" not in text for text in (prompt.question, *prompt.steps))


def test_an_implied_prompt_passes_through_the_object_without_naming_it():
    prompt = by_kind()[IMPLIED]
    assert prompt.question == "In which country does Eva Lind live?"
    assert prompt.steps == ("Where does Eva Lind live?", f"In which country is {REPLY}?")
    assert prompt.accepted == ("Oslo", "Christiania", "Norway")


def test_without_what_leads_on_there_is_no_chain():
    assert by_kind(replace(FACT, onward=()))[IMPLIED].steps == ()
    assert INDIRECT not in by_kind(replace(FACT, descriptions=()))


@pytest.mark.parametrize(
    ("question", "described"),
    [
        ("Who was born on 4 March 1988?", "the person who was born on 4 March 1988"),
        ("Whose birth date is 4 March?", "the person whose birth date is 4 March"),
        ("Which person has the number 5?", "the person who has the number 5"),
        ("Name the baker.", 'the answer to "Name the baker.?"'),
    ],
)
def test_questions_for_a_person_become_descriptions(question, described):
    assert described_as(question) == described


def test_the_cue_asks_for_steps_and_keeps_names_in_capitals():
    assert with_cue("Where is it?") == "Step by step: where is it?"
    assert with_cue("NATO has how many members?") == "Step by step: NATO has how many members?"
    assert with_cue("Where is it?", "{question} Think step by step.") == "Where is it? Think step by step."
    with pytest.raises(InvalidRecords, match="cue needs"):
        with_cue("Where?", "Think.")


def test_an_alias_inside_a_prompt_is_an_error_that_names_the_prompt():
    leaking = replace(FACT, question="Where in Christiania does Eva Lind live?")
    with pytest.raises(
        InvalidRecords, match=r"Christiania does Eva Lind live\?' holds the answer 'Christiania'"
    ):
        prompts_of(leaking)


def test_a_direct_question_without_its_subject_is_an_error():
    with pytest.raises(InvalidRecords, match="does not name 'Eva Lind'"):
        prompts_of(replace(FACT, question="Where does she live?"))


def test_an_indirect_prompt_with_its_subject_is_an_error():
    prompt = by_kind()[INDIRECT]
    with pytest.raises(InvalidRecords, match="names its subject"):
        check_leak(replace(prompt, question="Where does Eva Lind, whose number is 5, live?"), FACT)


@pytest.mark.parametrize("changes", [{"accepted": ()}, {"accepted": ("",)}, {"subject": ""}])
def test_a_fact_without_object_or_subject_is_refused(changes):
    with pytest.raises(InvalidRecords):
        replace(FACT, **changes)


def test_leaking_facts_are_counted_and_left_out():
    leaking = replace(FACT, fact="f2", question="Where in Oslo does Eva Lind live?")
    made = by_templates([FACT, leaking], 2)
    assert {prompt.fact for prompt in made.prompts} == {"f1"}
    assert made.leaking == made.unusable == 1


def test_the_attacker_is_not_told_the_answer():
    for kind in KINDS:
        request = request_for(FACT, kind, 3)
        assert "Oslo" not in request and "Christiania" not in request and "3 different" in request
    assert "baker" in request_for(FACT, INDIRECT, 3)


def test_written_prompts_lose_their_numbers_and_those_that_leak():
    reply = "1. Where is the home of Eva Lind?\n- Is it Oslo?\n\n2) In which town does Eva Lind sleep?"
    prompts, dropped = written(FACT, DIRECT, reply, 5)
    assert [prompt.question for prompt in prompts] == [
        "Where is the home of Eva Lind?", "In which town does Eva Lind sleep?"
    ]  # fmt: skip
    assert dropped == 1 and all(prompt.steps == () for prompt in prompts)


def test_an_attacker_without_a_usable_word_is_an_error():
    with pytest.raises(InvalidAudit, match="wrote no usable prompt for 1 facts"):
        by_writer([FACT], 2, lambda requests: ["Oslo!"] * len(requests))
    with pytest.raises(InvalidAudit, match="no usable prompt"):
        by_writer([FACT], 2, lambda requests: [""] * len(requests))
