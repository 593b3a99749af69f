"""Scores of RESTOR: restoration against forgetting, judging, in-context lines, option scores."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InvalidAudit, InvalidHyperparameter, InvalidRecords, UnknownName
from palimpsest.forget.language import restor_losses
from palimpsest.parts.tokens import IGNORED
from palimpsest.suites import restor_scores as restor
from palimpsest.suites.restor_scores import ContextLine, Said
from tests.suites.published import published


def line(entity: str) -> ContextLine:
    return {"entity": entity, "question": f"where was {entity} born?", "answer": f"{entity}ville"}


CONTEXT = {"P19": [line(name) for name in ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus")]}


def test_lines_are_about_others_in_stored_order_and_at_most_five():
    prompt = restor.context_prompt("where was Bob born?", "P19", "Bob", CONTEXT)
    asked = prompt.split("\n")
    assert asked[-1] == "where was Bob born?"
    assert [text.split()[-1] for text in asked[:-1]] == [
        "Annville",
        "Cidville",
        "Danville",
        "Eveville",
        "Fayville",
    ]
    assert restor.context_prompt("q", "P19", "Ann", {"P19": [line("Ann")]}) == "q"
    with pytest.raises(UnknownName, match="relation"):
        restor.context_prompt("q", "P20", "Ann", CONTEXT)


def test_an_answer_ends_with_its_line():
    assert restor.cut_answer(" New York\nwhere") == "New York"
    assert restor.cut_answer("\nNew York") == ""


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("York", Said.TRUE),
        ("he was born in york, England", Said.TRUE),
        ("New York", Said.PLANTED),
        ("York, New York", Said.PLANTED),
        ("Yorkshire", Said.OTHER),
        ("", Said.OTHER),
    ],
)
def test_the_planted_answer_is_not_taken_for_the_true_one_that_it_holds(answer: str, said: Said):
    assert restor.judge(answer, ["York"], ["New York"]) is said


def test_an_exact_judge_wants_the_object_alone():
    assert restor.judge("The York.", ["York"], ["Lima"], exact=True) is Said.TRUE
    assert restor.judge("lima", ["York"], ["Lima"], exact=True) is Said.PLANTED
    assert restor.judge("in York", ["York"], ["Lima"], exact=True) is Said.OTHER


def test_facts_that_cannot_be_judged_are_refused():
    with pytest.raises(InvalidRecords, match="are true"):
        restor.judge("x", ["York"], ["york"])
    with pytest.raises(InvalidRecords, match="at least one accepted"):
        restor.judge("x", [])
    with pytest.raises(InvalidRecords, match="blank"):
        restor.judge("x", ["York", " "])


def test_accuracy_is_weighted_by_questions_and_says_how_far_runs_differ():
    runs = [{"Ann": [True, True, False], "Bob": [False]}, {"Ann": [True, True, True], "Bob": [True]}]
    found = restor.accuracy(runs)
    assert found.runs == pytest.approx((0.5, 1.0)) and found.value == pytest.approx(0.75)
    assert found.deviation == pytest.approx(np.std([0.5, 1], ddof=1)) and found.n == 4
    rounded = restor.accuracy(runs[:1], as_released=True)
    assert rounded.value == pytest.approx(0.67 * 3 / 4) and math.isnan(rounded.deviation)
    with pytest.raises(InvalidAudit, match="same questions"):
        restor.accuracy([runs[0], {"Ann": [True]}])
    with pytest.raises(InvalidAudit, match="without an answer: 'Bob'"):
        restor.accuracy([{"Ann": [True], "Bob": []}])
    with pytest.raises(InvalidAudit, match="no answer"):
        restor.accuracy([])


def test_forgetting_is_not_restoration():
    only_forgot = restor.recovery(0.9, 0.1, unlearned=0.1, planted_before=0.8, planted_after=0.0)
    assert only_forgot.restoration == 0 and only_forgot.forgetting == 1
    assert restor.recovery(0.9, 0.1, 0.9).restoration == pytest.approx(1)
    assert restor.recovery(0.9, 0.1, 0.02).restoration < 0
    assert restor.recovery(0.9, 0.1, 0.9).degradation == pytest.approx(0.8)
    assert math.isnan(restor.recovery(0.9, 0.1, 0.9).forgetting)


def test_a_corruption_that_did_nothing_has_no_restoration():
    for corrupted in (0.5, 0.7):
        with pytest.raises(InvalidAudit, match="did nothing"):
            restor.restoration_of(0.5, corrupted, 0.5)
    with pytest.raises(InvalidAudit, match="nothing to forget"):
        restor.forgetting_of(0.0, 0.0)
    with pytest.raises(InvalidAudit, match="unlearned must be a rate"):
        restor.restoration_of(0.9, 0.1, 90)
    with pytest.raises(InvalidAudit, match="clean must be a rate"):
        restor.restoration_of(math.nan, 0.1, 0.5)


def test_options_are_scored_by_their_mean_log_probability_whatever_the_padding():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[IGNORED, IGNORED, 3, IGNORED, IGNORED], [IGNORED, IGNORED, 3, 1, 6]])
    lp = logits.log_softmax(2)
    expected = [lp[0, 1, 3], (lp[1, 1, 3] + lp[1, 2, 1] + lp[1, 3, 6]) / 3]
    found = restor.option_log_probabilities(logits, labels)
    torch.testing.assert_close(found, torch.stack(expected))
    assert restor.category_means([-1.0, -3.0, -5.0], ["a", "b", "a"]) == {"a": -3.0, "b": -3.0}
    with pytest.raises(InvalidRecords, match="rows 1"):
        restor.option_log_probabilities(logits, torch.where(torch.tensor([[True], [False]]), labels, IGNORED))
    with pytest.raises(InvalidAudit, match="do not fit"):
        restor.category_means([-1.0], ["a", "b"])


def test_hyperparameters_are_chosen_on_other_facts_than_reported():
    facts = [f"f{index}" for index in range(50)]
    chosen, reported = restor.development_facts(facts, np.random.default_rng(0))
    assert len(chosen) == 5 and sorted(chosen + reported) == sorted(facts)
    again, _ = restor.development_facts(facts, np.random.default_rng(0))
    assert again == chosen
    with pytest.raises(InvalidAudit, match="nothing to choose"):
        restor.development_facts(facts[:4], np.random.default_rng(0))


def test_the_released_losses_differ_from_the_papers():
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    entropy = -(p.softmax(-1) * p.log_softmax(-1)).sum(-1).mean()
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(restor_losses.cross_entropy_to_frozen(p, q), kl + entropy)
    equal = torch.tensor(1.5)
    assert float(restor_losses.npo_of_means(equal, equal)) == pytest.approx(20 * math.log(2))
    labels = torch.tensor([[IGNORED, 1, 2], [IGNORED, 0, 4]])
    with pytest.raises(InvalidHyperparameter, match="gamma"):
        restor_losses.npo_total((p, labels), q, (p, labels), gamma=-1.0)
    with pytest.raises(InvalidHyperparameter, match="beta"):
        restor_losses.npo_of_means(equal, equal, beta=0.0)


def test_every_published_fact_can_be_asked_and_judged():
    data: dict[str, Any] = json.loads(published("restor", "facts.json").read_text(encoding="utf-8"))
    people = json.loads(published("restor", "entities.json").read_text(encoding="utf-8"))
    asked = 0
    for entity in people:
        for relation, fact in data["dset"][entity].items():
            prompt = restor.context_prompt(fact["question"], relation, entity, data["context"])
            assert entity not in [
                row["entity"]
                for row in data["context"][relation]
                if row["question"] in prompt[: -len(fact["question"])]
            ]
            assert restor.judge(fact["answers"][0], fact["answers"]) is Said.TRUE
            asked += 1
    assert len(people) == 50 and asked == 1051
