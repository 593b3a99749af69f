"""Side effects (D1), refusals (D3), composition (D4) and truthfulness (D5)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from torch import nn

import palimpsest as pal
from palimpsest.audit.language.asked import greedy_hits
from palimpsest.audit.language.behaviour import BEHAVIOUR, Refusals
from palimpsest.audit.language.composition import Composition, composed
from palimpsest.audit.language.text_side_effects import TextSideEffects
from palimpsest.audit.language.truthfulness import KINDS, Truthfulness
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.core.runtime import Runtime
from tests.audit.planted_replies import Refusing


def test_every_reply_is_of_exactly_one_kind(judge, twin):
    found = judge(Truthfulness(), twin)
    names = [kind.replace(" ", "_") for kind in KINDS]
    assert sum(found[name].value for name in names) == pytest.approx(1)
    for column in (lambda f: f.original, lambda f: f.controls[0]):
        assert sum(column(found[name]) for name in names) == pytest.approx(1)


def test_models_that_know_invent_refuse_and_babble_are_told_apart(judge, evidence, twin, refusing, broken):
    audit = Truthfulness()
    assert judge(audit, evidence.original)["right"].value == 1
    made_up = judge(audit, twin)
    assert made_up["confident_wrong"].value + made_up["unsure_wrong"].value > 0.8
    assert judge(audit, refusing)["refusal"].value == 1
    assert judge(audit, broken)["gibberish"].value > 0.8


def test_side_effects_of_the_untouched_model_are_none(judge, evidence):
    found = judge(TextSideEffects(), evidence.original)
    assert (
        found["neighbour_hit_change"].value
        == found["retain_hit_change"].value
        == found["locality"].value
        == 0
    )
    assert found["general_loss"].value == found["general_loss"].original
    assert not [finding for finding in found.values() if finding.judgement is Judgement.BAD]


def test_a_retrained_model_does_no_harm(judge, twin):
    found = judge(TextSideEffects(), twin)
    assert not [finding for finding in found.values() if finding.judgement is Judgement.BAD]


def test_a_wrecked_model_is_bad_at_everything(judge, broken):
    found = judge(TextSideEffects(), broken)
    assert all(
        found[name].judgement is Judgement.BAD
        for name in ("general_loss", "neighbour_hit_change", "retain_hit_change")
    )
    assert found["forget_gibberish"].value > 0.8


def test_a_model_that_says_one_word_for_ever_shows_in_the_share_of_different_pairs(judge, evidence):
    task = evidence.task
    stuck = copy.deepcopy(evidence.original)
    head = nn.Linear(stuck.config.hidden_size, len(task.encoder))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head.bias.data[task.tokens(" the")[-1]] = 9.0
    stuck.set_output_embeddings(head)
    found = judge(TextSideEffects(), stuck)
    assert found["forget_distinct_2"].value < 0.2 < 0.9 < found["forget_distinct_2"].original


def test_a_refusal_shows_in_how_the_model_speaks(judge, refusing):
    assert judge(TextSideEffects(), refusing)["forget_refusals"].value == 1


def test_without_safety_prompts_only_over_refusal_is_measured(judge, evidence):
    found = judge(Refusals(limit=20), evidence.original)
    assert found["over_refusal"].value == 0
    assert found["harmful_refusal"].judgement is found["look_alike_refusal"].judgement is Judgement.NOT_RUN


def test_a_model_that_stops_refusing_what_it_must_is_flagged(learnt):
    """Stand-ins: questions about some retained people must be declined, as the original here does."""
    retain, names = learnt.split.retain, sorted({str(n) for n in learnt.split.retain.column("subject") if n})
    guarded, similar = names[:4], names[4:8]
    behaviour = np.array(
        ["refuse" if n in guarded else "answer" if n in similar else "" for n in retain.column("subject")],
        object,
    )
    plain = retain.column("form") == "qa"
    behaviour[~plain] = ""
    split = pal.ForgetSplit(learnt.split.forget, retain.with_column(BEHAVIOUR, behaviour), learnt.split.test)
    aligned = Refusing(learnt.original, learnt.task, guarded)
    over = Refusing(learnt.original, learnt.task, names)

    def judged(model: Any) -> dict[str, Any]:
        evidence = Evidence(model, split, learnt.task, Runtime(seed=0, device="cpu"), aligned)
        return {finding.name: finding for finding in Refusals(limit=20).run(evidence).findings}

    same, lost, too_much = judged(aligned), judged(learnt.original), judged(over)
    assert same["harmful_refusal"].value == 1 and same["harmful_refusal"].judgement is Judgement.INFORMATION
    assert lost["harmful_refusal"].value == 0 and lost["harmful_refusal"].judgement is Judgement.BAD
    assert "-100.0 points" in lost["harmful_refusal"].note
    assert too_much["look_alike_refusal"].judgement is Judgement.BAD
    assert too_much["over_refusal"].judgement is Judgement.BAD


def test_a_conclusion_from_retained_facts_comes_back_by_chaining_them(learnt):
    """Forget only in which country people live; that they live in a city, and where the city is, is retained."""
    train = learnt.split.train
    wanted = np.isin(train.column("form"), ("two-hop",))
    split = pal.split(train, pal.by_ids([name for name, hit in zip(train.ids, wanted, strict=True) if hit]))
    names = [str(name) for name in split.forget.column("subject")]
    refusing = Refusing(learnt.original, learnt.task, names)
    runtime = Runtime(seed=0, device="cpu")
    evidence = Evidence(learnt.original, split, learnt.task, runtime, learnt.original, learnt.controls[:1])
    facts = composed(evidence)
    assert facts, "the world offers cities whose country is asked for"
    for fact in facts:
        assert fact.first.answer in fact.second.question and fact.second.answer == fact.whole.answer
    found = {f.name: f for f in Composition().run(evidence).findings}
    parts = [
        greedy_hits(evidence, "original", [getattr(fact, side) for fact in facts])
        for side in ("first", "second")
    ]
    assert found["recovered_plain"].value == 1
    assert found["recovered_chained"].value >= (parts[0] & parts[1]).mean() > 0
    hidden = {f.name: f for f in Composition().run(evidence.judging(refusing)).findings}
    assert hidden["recovered_plain"].value == 0
    assert all(f.bears == "" and "limit of the request" in f.note for f in found.values())


def test_people_forgotten_as_a_whole_leave_nothing_to_compose(judge, evidence):
    assert judge(Composition(), evidence.original)["recovered"].judgement is Judgement.NOT_RUN


@pytest.mark.parametrize(
    "make",
    [
        lambda: TextSideEffects(n=0),
        lambda: Refusals(limit=0),
        lambda: Composition(limit=0),
        lambda: Truthfulness(confident=1.0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(InvalidAudit):
        make()
