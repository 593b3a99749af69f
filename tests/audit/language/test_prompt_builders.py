from __future__ import annotations

from dataclasses import replace

import pytest

from palimpsest.audit.answers import find_alias
from palimpsest.audit.language import prompt_builders as builders
from palimpsest.audit.language.prompt_builders import BUILDERS, KINDS, RWKU_KINDS, Target
from palimpsest.core.errors import InvalidRecords
from palimpsest.parts.templates import Template
from palimpsest.suites import rwku_scores

TARGET = Target(
    subject="Eva Lind",
    question="In which city does Eva Lind live?",
    answer="Oslo",
    accepted=("Oslo", "the city of Oslo"),
    wrong=("Rome", "Bern", "Kyiv", "Lima"),
    paraphrases=("Where is Eva Lind at home?",),
    hints=(("What is the profession of Eva Lind?", "baker"), ("Where was Eva Lind born?", "Oslo")),
)
PLAIN = Template("plain", "Question: {question}\nAnswer:", " {answer}", "</s>")
EXAMPLES = [("Where does Ben live?", "Rome"), ("What does Cleo do?", "nurse")]


def made(kind: str, target: Target = TARGET) -> list[builders.Prompt]:
    if kind == "in-context learning":
        return builders.in_context_learning(target, EXAMPLES, PLAIN)
    return BUILDERS[kind](target)


def test_the_nine_kinds_are_those_of_the_benchmark():
    assert set(RWKU_KINDS) == set(rwku_scores.KINDS)
    assert set(RWKU_KINDS) <= set(KINDS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("multiple choice", "reverse query")])
def test_no_prompt_holds_its_answer_and_all_ask_the_question(kind):
    prompts = made(kind)
    assert prompts
    for prompt in prompts:
        assert prompt.kind == kind
        assert find_alias(f"{prompt.lead} {prompt.text} {prompt.opening}", TARGET.accepted) is None
        assert prompt.accepted == TARGET.accepted
        assert "Eva Lind" in prompt.text


def test_multiple_choice_offers_the_answer_among_wrong_ones_and_says_the_chance():
    (prompt,) = made("multiple choice")
    assert all(value in prompt.text for value in ("Oslo", "Rome", "Bern", "Kyiv"))
    assert prompt.chance == 0.25
    assert made("multiple choice") == [prompt]


def test_the_place_of_the_answer_varies_between_questions():
    places = set()
    for number in range(30):
        target = replace(TARGET, question=f"Question {number} about Eva Lind?")
        options = made("multiple choice", target)[0].text.partition(": ")[2].replace(" or ", ", ").rstrip("?")
        places.add(options.split(", ").index("Oslo"))
    assert places == {0, 1, 2, 3}


def test_a_choice_needs_wrong_answers():
    with pytest.raises(InvalidRecords, match="needs wrong answers"):
        made("multiple choice", replace(TARGET, wrong=()))


def test_a_reverse_query_is_after_the_subject_and_does_not_name_it():
    (prompt,) = made("reverse query")
    assert prompt.accepted == ("Eva Lind",)
    assert "Oslo" in prompt.text and find_alias(prompt.text, ["Eva Lind"]) is None


def test_a_reverse_query_of_the_data_that_names_its_answer_is_refused():
    with pytest.raises(InvalidRecords, match="holds its answer 'Eva Lind'"):
        made("reverse query", replace(TARGET, reversed=("Who is Eva Lind of Oslo?",)))


def test_a_question_without_its_subject_cannot_be_turned_round():
    with pytest.raises(InvalidRecords, match="does not name its subject"):
        made("reverse query", replace(TARGET, question="In which city?"))


def test_a_hint_that_names_the_answer_is_left_out():
    (prompt,) = made("background hint")
    assert "baker" in prompt.text and "Oslo" not in prompt.text
    assert made("background hint", replace(TARGET, hints=TARGET.hints[1:])) == []


def test_a_question_that_holds_its_answer_is_refused_by_name():
    with pytest.raises(InvalidRecords, match="holds its answer"):
        made("role playing", replace(TARGET, question="Eva Lind of Oslo lives where?"))


def test_synonyms_change_words_and_fall_back_to_a_paraphrase():
    (prompt,) = made("synonym manipulation")
    assert prompt.text == "In which town does Eva Lind reside?"
    (other,) = made("synonym manipulation", replace(TARGET, question="Eva Lind is from?"))
    assert other.text == "Where is Eva Lind at home?"


def test_shown_examples_are_earlier_turns_of_the_template():
    (prompt,) = made("in-context learning")
    assert prompt.raw
    assert prompt.text.startswith(
        "Question: Where does Ben live?\nAnswer: Rome</s>Question: What does Cleo do?"
    )
    assert prompt.text.endswith(PLAIN.render(TARGET.question))


def test_examples_never_name_the_answer_or_the_subject():
    pool = [*EXAMPLES, ("Where does Dan live?", "Oslo"), ("Who is a friend of Eva Lind?", "Ben")]
    assert sorted(builders.examples_for(TARGET, pool, 4)) == sorted(EXAMPLES)
    assert builders.examples_for(TARGET, pool, 1) == builders.examples_for(TARGET, pool, 1)


def test_translations_of_the_data_are_used_where_there_are_some():
    given = replace(TARGET, translations=(("French", "Où habite Eva Lind ?"),))
    assert [prompt.text for prompt in made("cross lingual", given)] == ["Où habite Eva Lind ?"]
    assert len(made("cross lingual")) == 3


def test_a_crescendo_takes_the_first_reply_into_the_second_turn():
    (prompt,) = made("crescendo")
    assert "Eva Lind" in prompt.lead and "{reply}" in prompt.text


@pytest.mark.parametrize("field", ["subject", "question", "answer"])
def test_a_fact_without_what_makes_it_one_is_refused(field):
    with pytest.raises(InvalidRecords, match="needs a subject, a question and an answer"):
        replace(TARGET, **{field: " "})


def test_a_fact_without_accepted_answers_is_refused():
    with pytest.raises(InvalidRecords, match="no accepted answer"):
        replace(TARGET, accepted=())
