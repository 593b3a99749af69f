"""Membership (A6), privacy of the rest (D2) and the signals they are made of."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from palimpsest.audit.language.text_membership import TextMembership, alike, widening
from palimpsest.audit.language.text_privacy import TextPrivacy
from palimpsest.audit.language.token_signals import (
    gradient_signal,
    reference_signal,
    signals_of,
    token_scores,
)
from palimpsest.audit.membership import language_signals as single
from palimpsest.core.errors import InvalidAudit
from palimpsest.core.evidence import Evidence
from palimpsest.core.finding import Judgement
from palimpsest.core.records import Records
from palimpsest.core.runtime import Runtime


def test_one_pass_gives_what_each_signal_gives_alone(evidence, learnt):
    model, task, records = learnt.original, learnt.task, learnt.split.forget
    found = signals_of(evidence, "original", "forget", 0.2)
    for at in (0, 7, len(records) - 1):
        ids, start = task.encode(
            records[at].get("question"), records[at].get("answer") or records[at]["text"]
        )
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        here, targets = logits[start - 1 : -1], torch.tensor(ids[start:])
        log_p, z = (
            single.token_log_probabilities(here, targets),
            single.standardised_log_probabilities(here, targets),
        )
        assert found["loss"][at] == pytest.approx(single.mean_log_probability(log_p), rel=1e-3, abs=1e-4)
        assert found["min_k"][at] == pytest.approx(single.min_k(log_p), rel=1e-3, abs=1e-4)
        assert found["min_k_plus"][at] == pytest.approx(single.min_k(z), rel=0.05, abs=0.02)
        text = records[at].get("answer") or records[at]["text"]
        assert found["zlib"][at] == pytest.approx(single.zlib_score(log_p, text), rel=1e-3, abs=1e-6)


def test_all_shared_attacks_cost_one_pass_over_each_part(learnt):
    runtime = Runtime(seed=0, device="cpu")
    evidence = Evidence(learnt.original, learnt.split, learnt.task, runtime, None, learnt.controls[:1])
    TextMembership(lowercase=False).run(evidence)
    TextPrivacy().run(evidence)
    assert set(runtime._passes.values()) == {1}
    assert "unlearned/forget" in runtime._passes and "unlearned/holdout" in runtime._passes


def test_the_untouched_model_is_caught_and_a_retrained_one_is_not(judge, evidence, twin):
    audit = TextMembership(lowercase=False)
    untouched, forgot = judge(audit, evidence.original), judge(audit, twin)
    for name in ("loss_auc", "zlib_auc", "min_k_auc", "min_k_plus_auc"):
        assert untouched[name].value > 0.9 and untouched[name].k == pytest.approx(1)
        assert forgot[name].judgement is Judgement.AS_RETRAINED
    assert untouched["loss_auc"].bears == "outputs"
    assert untouched["privleak"].value < -50 < -40 < forgot["privleak"].value


def test_a_filtered_answer_does_not_hide_from_membership(judge, filtering):
    assert judge(TextMembership(lowercase=False), filtering)["loss_auc"].k == pytest.approx(1)


def test_the_lower_case_attack_takes_a_pass_of_its_own_and_finds_the_original(judge, evidence):
    found = judge(TextMembership(), evidence.original)
    assert found["lowercase_auc"].value > 0.9


def test_the_reference_attack_needs_a_control_to_refer_to(judge, evidence, learnt):
    alone = judge(TextMembership(lowercase=False), evidence.original)
    assert alone["reference_auc"].judgement is Judgement.NOT_RUN
    two = Evidence(
        learnt.original,
        learnt.split,
        learnt.task,
        Runtime(seed=0, device="cpu"),
        learnt.original,
        learnt.controls,
    )
    found = {finding.name: finding for finding in TextMembership(lowercase=False).run(two).findings}
    assert found["reference_auc"].value > 0.9
    assert len(found["reference_auc"].controls) == 1
    own, _, mask = token_scores(two, "original", "forget")
    other, _, _ = token_scores(two, "control 1", "forget")
    expected = ((own - other) * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(reference_signal(two, "original", "control 1", "forget"), expected, atol=1e-9)


def test_gradient_norms_leave_the_model_as_it_was(learnt):
    few = copy.copy(learnt.split)
    object.__setattr__(few, "forget", learnt.split.forget.select([0, 1, 2]))
    model = learnt.original
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = gradient_signal(
        Evidence(model, few, learnt.task, Runtime(seed=0, device="cpu")), "unlearned", "forget"
    )
    batch = learnt.task.collate([few.forget[0]])
    clone = copy.deepcopy(model)
    learnt.task.loss_per_example(clone, batch).mean().backward()
    expected = -np.mean([float(p.grad.norm()) if p.grad is not None else 0.0 for p in clone.parameters()])
    assert scores[0] == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_norms_of_a_batch_are_those_of_single_records(learnt, monkeypatch):
    few = copy.copy(learnt.split)
    object.__setattr__(few, "forget", learnt.split.forget.select(list(range(0, 40, 5))))

    def scores():
        made = Evidence(learnt.original, few, learnt.task, Runtime(seed=0, device="cpu"))
        return gradient_signal(made, "unlearned", "forget")

    together = scores()
    monkeypatch.setattr("palimpsest.audit.language.token_signals.sample_gradient_norms", lambda *_: None)
    alone = scores()
    assert len(together) == 8 and (together < 0).all()
    np.testing.assert_allclose(together, alone, rtol=1e-3)


def test_rates_that_cannot_be_resolved_are_refused(judge, evidence):
    found = judge(TextMembership(lowercase=False, rates=(0.001,)), evidence.original)
    assert found["loss_tpr_at_0.001"].judgement is Judgement.INVALID
    assert "not resolvable" in found["loss_tpr_at_0.001"].note


def rows(forms: list[str]) -> Records:
    items = [{"question": f"q{n}", "answer": "a"} for n in range(len(forms))]
    return Records(
        items, ids=[f"{forms[0]}-{n}" for n in range(len(forms))], columns={"form": np.array(forms, object)}
    )


def test_both_sides_hold_the_same_kinds_in_the_same_proportions():
    members, others = alike(rows(["qa"] * 4 + ["cloze"] * 2 + ["song"]), rows(["cloze"] * 3 + ["qa"] * 12))
    np.testing.assert_array_equal(members, [0, 1, 2, 3, 4, 5])
    assert len(others) == 9 and (others < 3).sum() == 3


def test_sides_without_a_common_kind_are_not_compared():
    assert [len(side) for side in alike(rows(["qa"]), rows(["cloze"]))] == [0, 0]


def test_texts_of_one_subject_widen_the_interval():
    members = np.repeat([3.0, -3.0, 2.0, -2.0], 10) + np.linspace(0, 0.1, 40)
    others = np.linspace(-4, 4, 50)
    assert widening(members, others, np.repeat(np.arange(4), 10)) > 2
    assert widening(members, others, np.arange(40)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("settings", [{"k": 0.0}, {"k": 1.5}, {"rates": (0.0,)}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidAudit):
        TextMembership(**settings)


def test_a_detector_tells_the_original_and_the_wreck_but_not_a_retrained_model(judge, evidence, twin, broken):
    found = {name: judge(TextPrivacy(), model)["detectability_auc"] for name, model in (
        ("original", evidence.original), ("twin", twin), ("broken", broken))}  # fmt: skip
    assert found["original"].value > 0.9 and found["broken"].value > 0.95
    assert found["twin"].value < 0.8


def test_retained_texts_are_not_called_harmed_where_nothing_happened(judge, evidence, twin):
    for model in (evidence.original, twin):
        assert judge(TextPrivacy(), model)["retain_membership_auc"].judgement is not Judgement.SEPARATED
