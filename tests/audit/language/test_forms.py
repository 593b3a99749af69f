"""Form change (A2) on models that forgot, hide, broke and did nothing."""

from __future__ import annotations

import numpy as np
import pytest

from palimpsest.audit.language.asked import Question, probes
from palimpsest.audit.language.forms import LIKELIEST, Forms, _right, chance
from palimpsest.core.finding import Judgement
from tests.audit.planted_replies import Naming


def test_the_original_keeps_k_of_one_in_every_valid_form(judge, evidence):
    found = judge(Forms(), evidence.original)
    valid = [finding for finding in found.values() if finding.valid]
    assert len(valid) >= 5
    assert all(finding.k == pytest.approx(1) for finding in valid)


def test_a_retrained_model_is_far_from_known_in_every_valid_form(judge, twin):
    found = judge(Forms(), twin)
    assert found["worst"].k is not None and found["worst"].k < 0.5
    assert found["worst"].bears == "inside"


def test_a_refusal_is_seen_through_by_what_the_model_finds_likely(judge, refusing):
    found = judge(Forms(), refusing)
    assert found["paraphrase"].k == 0
    assert found[LIKELIEST].k == pytest.approx(1)
    assert found["worst"].k == pytest.approx(1)


def test_where_no_form_is_answered_what_the_model_finds_likely_is_the_worst(judge, learnt):
    names = [str(name) for name in learnt.split.forget.column("subject")]
    found = judge(Forms(), Naming(learnt.original, learnt.task, names))
    assert found["reversed"].k == found["paraphrase"].k == 0
    assert "likeliest_of_choices" in found["worst"].note and found["worst"].k == pytest.approx(1)


def test_a_filter_of_answers_is_seen_through_as_well(judge, filtering):
    assert judge(Forms(), filtering)["worst"].k == pytest.approx(1)


def test_refusing_plain_questions_leaves_other_forms(judge, tuned):
    found = judge(Forms(), tuned)
    assert found["worst"].k is not None and found["worst"].k >= 0.5 and found["worst"].k_low > 0


def test_a_wrecked_model_says_nothing_in_any_form(judge, broken):
    found = judge(Forms(), broken)
    assert all(found[form].value == 0 for form in ("paraphrase", "cloze", "chain"))


def test_a_form_that_the_original_does_not_speak_is_invalid_and_never_the_headline(judge, evidence):
    found = judge(Forms(), evidence.original)
    assert found["multiple-choice"].judgement is Judgement.INVALID
    assert "chance 0.25" in found["multiple-choice"].note
    assert not found["worst"].note.startswith("multiple-choice")


def test_a_worked_answer_counts_for_the_fact_that_it_names_on_its_way():
    chain = Question(
        "f", "Eva", "city", "chain", "Step by step?", "Step 1: the city is Oslo. Step 2: Norway.",
        ("Step 1: the city is Oslo. Step 2: Norway.",), steps=("Oslo", "Norway"),
    )  # fmt: skip
    said = [["Step 1: the city is Oslo. Step 2: Sweden."], ["Step 1: the city is Rome. Step 2: Norway."]]
    np.testing.assert_array_equal(_right([chain, chain], said), [1, 0])


def test_the_worlds_chains_carry_their_steps(evidence):
    asked = probes(evidence, "forget", "chain")
    assert asked and all(len(item.steps) == 2 and item.steps[0] in item.answer for item in asked)


def test_the_chance_of_a_choice_stands_beside_it():
    options = Question("f", "Eva", "r", "multiple-choice", "?", "a", ("a",), choices=("a", "b", "c", "d"))
    assert chance([options], "multiple-choice") == 0.25
    assert chance(
        [Question("f", "Eva", "r", "qa", "?", "a", ("a",), wrong=("b", "c"))], LIKELIEST
    ) == pytest.approx(1 / 3)
